#!/usr/bin/env python3
"""Time detection beside the plain formulas, and beside the matrix products alone.

    python benchmarks/bench_detection.py           # 50,000 x 2,048: some 15 minutes on two cores
    python benchmarks/bench_detection.py --quick   # 10,000 x 512: half a minute

The plain way is the original's, in numpy: for each outlier set, and in it once for the test images
and once for the outliers, covariance, pseudo-inverse and quadratic form of each cluster anew (with
known outliers: scikit-learn's Ledoit-Wolf). One outlier set is timed and counted as often as there
are sets, since each costs the same. Ours is fit_each and score_each (SSDk: fit, know, score), from
raw features to scores. Both are given the clusters, so k-means is in neither.

"Products" are the dense float64 products alone, by torch as ours are: X'X once for each training
row, and one [n, D] x [D, D] for each scored row and cluster. No decomposition, standardisation or
conversion is among them. A few pieces of rows are timed and the seconds scaled to all rows. Ours
leaves half of each product out, so it may come out below them. Ours and the products take turns.
With OMP_NUM_THREADS=1 seconds are CPU time, for machines that do other work meanwhile.

The features are random: 16 clusters, scales that fall over two decades. The last case has a tenth
of its features dead, so that its covariance is singular and takes an eigendecomposition. Scores of
both ways are compared. Writes benchmarks/records/bench_detection_full.json, of --quick
bench_detection.json.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import detection
import utils

PIECES = 8  # of detection.ROWS rows, timed for the products
KNOWN = 500  # known outliers of each set


def draw(n, dims, dead, seed):
    """Random features [n, dims] of 16 clusters, as an encoder's: correlated, of falling scale."""
    centres = torch.randn(16, dims, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(dims, dims, generator=torch.Generator().manual_seed(1)) / dims**0.5
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, dims)
    rows = torch.randn(n, dims, generator=generator) * scale
    x = (rows + 0.3 * scale * centres[torch.arange(n) % 16]) @ mix
    x[:, : int(dead * dims)] = 0
    return x


# --- the plain way --------------------------------------------------------------------------------


def scaled(train, *others):
    """Unit length, then the training mean and deviation; float32 as the original's, and ours."""
    unit = []
    for x in (train, *others):
        x = x.astype(np.float64)
        unit.append(x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10))
    mean, deviation = unit[0].mean(axis=0), unit[0].std(axis=0) + 1e-10
    return [((x - mean) / deviation).astype(np.float32) for x in unit]


def distance(x, train, covariance_of):
    """Squared Mahalanobis distance of rows to training rows, from nothing."""
    centred = x - train.mean(axis=0, dtype=np.float64)
    return np.sum(centred * (np.linalg.pinv(covariance_of(train)) @ centred.T).T, axis=1)


def covariance(train):
    return np.cov(train.T, bias=True)


def shrunk(train):
    from sklearn.covariance import ledoit_wolf

    return ledoit_wolf(train.astype(np.float64))[0]


def plain_ssd(train, test, ood, labels):
    """Scores of the test images and of one outlier set, all fitted for them alone."""
    train, test, ood = scaled(train, test, ood)
    clusters = [train[labels == c] for c in np.unique(labels)]
    return [np.min([distance(x, c, covariance) for c in clusters], axis=0) for x in (test, ood)]


def plain_ssdk(train, test, ood, known):
    train, test, ood, known = scaled(train, test, ood, known)
    return [distance(x, train, shrunk) - distance(x, known, shrunk) for x in (test, ood)]


# --- ours, and the products -----------------------------------------------------------------------


def ours_ssd(train, test, oods, labels, device):
    m = len(labels.unique())
    detectors = detection.fit_each(train, [m], labels, device=device)
    return [detection.score_each(detectors, x)[m] for x in (test, *oods)]


def ours_ssdk(train, test, oods, knowns, device):
    detector = detection.SSDk.fit(train, device)
    inside = detector.distance(test)
    scores = []
    for ood, features in zip(oods, knowns, strict=True):
        known = detector.know(features)
        scores += [detector.score(test, known, inside=inside), detector.score(ood, known)]
    return [scores[0], *scores[1::2]]


def products_seconds(rows_fitted, rows_scored, dims, device):
    """Seconds of X'X over rows_fitted rows and of X W over rows_scored rows, dense and no more."""
    piece = torch.randn(detection.ROWS, dims, dtype=torch.float64, device=device)
    square = torch.randn(dims, dims, dtype=torch.float64, device=device)
    total = torch.zeros_like(square)
    rows = PIECES * len(piece)

    def fit():
        for _ in range(PIECES):
            total.addmm_(piece.T, piece)

    def score():
        for _ in range(PIECES):
            piece @ square

    return (common.timed(fit, device, clock_of(device)) * rows_fitted / rows
            + common.timed(score, device, clock_of(device)) * rows_scored / rows)


def clock_of(device):
    """The clock of all times: one thread's CPU time leaves out what other programs take of it."""
    one = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one else time.perf_counter


# --- one case -------------------------------------------------------------------------------------


def measure(name, clusters, dead, known, sizes, device):
    """Time one case; returns its part of the record."""
    train = draw(sizes.rows, sizes.dims, dead, seed=2)
    test = draw(sizes.scored, sizes.dims, dead, seed=3)
    oods = [draw(sizes.scored, sizes.dims, dead, seed=4 + i) for i in range(sizes.sets)]
    labels = torch.arange(sizes.rows) % clusters
    knowns = [ood[:KNOWN] for ood in oods]
    clock, scores, expected = clock_of(device), [], []

    def ours():
        if known:
            scores[:] = ours_ssdk(train, test, oods, knowns, device)
        else:
            scores[:] = ours_ssd(train, test, oods, labels, device)

    def plain():
        x = [a.numpy() for a in (train, test, oods[0])]
        expected[:] = (plain_ssdk(*x, knowns[0].numpy()) if known
                       else plain_ssd(*x, labels.numpy()))

    scored = (1 + sizes.sets) * sizes.scored * clusters
    fitted = sizes.rows
    if known:  # test and outliers by the inliers; test again and outliers by each set's known ones
        scored += 2 * sizes.sets * sizes.scored
        fitted += sizes.sets * KNOWN
    products_seconds(fitted, scored, sizes.dims, device)  # warm-up
    ours_s, products_s = [], []
    for _ in range(sizes.repeats):
        ours_s.append(common.timed(ours, device, clock))
        products_s.append(products_seconds(fitted, scored, sizes.dims, device))
    found = {"case": name, "ours_s": ours_s, "products_s": products_s,
             "ours": statistics.median(ours_s), "products": statistics.median(products_s)}
    if not dead:  # the plain way divides by the deviation of a dead feature
        found["plain_one_set_s"] = common.timed(plain, device, clock)
        found["plain"] = found["plain_one_set_s"] * sizes.sets
        found["difference"] = max(
            float(np.max(np.abs(a - b) / np.maximum(np.abs(b), np.median(np.abs(b)))))
            for a, b in zip(scores, expected, strict=False)
        )
    return found


def show(found):
    """Print one row of the table."""
    plain, ours, products = (found.get(k) for k in ("plain", "ours", "products"))
    compared = (f"{plain:10.1f}{plain / ours:8.1f}{found['difference']:12.0e}" if plain
                else f"{'':30}")
    print(f"{found['case']:18}{ours:10.2f}{products:10.2f}{ours / products:8.2f}{compared}",
          flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="10,000 x 512 instead of 50,000 x 2,048")
    p.add_argument("--rows", type=int, help="training features")
    p.add_argument("--dims", type=int, help="their width")
    p.add_argument("--scored", type=int, help="rows of the test set and of each outlier set")
    p.add_argument("--sets", type=int, default=4, help="outlier sets (default: 4)")
    p.add_argument("--repeats", type=int, default=3, help="of ours (default: 3)")
    p.add_argument("--record", type=Path, help="where to write instead")
    args = p.parse_args()
    sizes = {"rows": 10_000, "dims": 512, "scored": 2_000} if args.quick else {
        "rows": 50_000, "dims": 2_048, "scored": 10_000}
    for key, value in sizes.items():
        setattr(args, key, getattr(args, key) or value)
    device = utils.device()

    clock = clock_of(device).__name__
    print(f"N = {args.rows}, d = {args.dims}, {args.sets} outlier sets of {args.scored}; seconds "
          f"by {clock}, ours and products the median of {args.repeats}")
    print(f"{'':18}{'ours':>10}{'products':>10}{'ratio':>8}{'plain':>10}{'/ ours':>8}"
          f"{'difference':>12}")
    cases = []
    for name, clusters, dead, known in (
        ("SSD, m = 1", 1, 0, False), ("SSD, m = 10", 10, 0, False), ("SSDk", 1, 0, True),
        ("SSD, singular", 1, 0.1, False),
    ):
        cases.append(measure(name, clusters, dead, known, args, device))
        show(cases[-1])
    shape = f"{args.rows:,} x {args.dims:,}, {args.sets} outlier sets"
    record = {
        "facts": common.facts(device), "clock": clock,
        "settings": {k: getattr(args, k) for k in ("rows", "dims", "scored", "sets", "repeats")}
        | {"warmup": 1, "known": KNOWN, "rows_at_once": detection.ROWS},
        "cases": cases,
        "table": [
            common.row(f"{c['case']}: {shape}", "s", c["plain"], c["ours"], c["products"])
            for c in cases if "plain" in c
        ],
    }
    name = "bench_detection" if args.quick else "bench_detection_full"
    print(f"written: {common.write_record(name, record, args.record)}")


if __name__ == "__main__":
    utils.program(main)
