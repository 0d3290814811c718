#!/usr/bin/env python3
"""Time detection beside the plain formulas, and beside the matrix products alone.

    python benchmarks/bench_detection.py           # 50,000 x 2,048: some 15 minutes on two cores
    python benchmarks/bench_detection.py --quick   # 10,000 x 512: half a minute

The plain way is the original's, in numpy: for each outlier set, and in it once for the test images
and once for the outliers, covariance, pseudo-inverse and quadratic form of each cluster anew. One
outlier set is timed and counted as often as there are sets, since each costs the same. Ours goes
from raw features to scores. Both are given the clusters, so k-means is in neither.

"Products" are the dense float64 products alone: X'X once for each training row, and one [n, D] x
[D, D] for each scored row and cluster, of a few pieces of rows after a warm-up, in turns with ours,
scaled to all rows. Ours leaves half of each product out, so it may come out below them. With
OMP_NUM_THREADS=1 seconds are CPU time, for machines that do other work meanwhile. Features are
random; a tenth of the last case's is dead, whose covariance is singular and takes an
eigendecomposition. Writes benchmarks/records/bench_detection_full.json or bench_detection.json.
"""

import functools
import statistics

import common
import numpy as np
import torch
from sklearn.covariance import ledoit_wolf

import detection
import utils
from infra import program

QUICK = {"rows": 10_000, "dims": 512, "scored": 2_000}
SIZES = {"rows": (50_000, "training features"), "dims": (2_048, "their width"),
         "scored": (10_000, "rows of the test set and of each outlier set"),
         "sets": (4, "outlier sets"), "repeats": (3, "of ours")}
CASES = (  # name, clusters, share of dead features, whether outliers are known
    ("SSD, m = 1", 1, 0, False), ("SSD, m = 10", 10, 0, False), ("SSDk", 1, 0, True),
    ("SSD, singular", 1, 0.1, False))
PIECES = 8  # of detection.ROWS rows, timed for the products
KNOWN = 500  # known outliers of each set


def sample(n, dims, dead, seed):
    """Random features [n, dims] of 16 clusters, as an encoder's: correlated, of falling scale."""
    centres = torch.randn(16, dims, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(dims, dims, generator=torch.Generator().manual_seed(1)) / dims**0.5
    rows = torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))
    scale = torch.logspace(0, -2, dims)
    x = (rows * scale + 0.3 * scale * centres[torch.arange(n) % 16]) @ mix
    x[:, : int(dead * dims)] = 0
    return x


def scaled(train, *others):
    """Unit length, then the training mean and standard deviation; float32 as the original's."""
    doubles = (x.astype(np.float64) for x in (train, *others))
    unit = [x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10) for x in doubles]
    mean, deviation = unit[0].mean(axis=0), unit[0].std(axis=0) + 1e-10
    return [((x - mean) / deviation).astype(np.float32) for x in unit]


def distance(x, train, covariance):
    """Squared Mahalanobis distance of rows to training rows."""
    centred = x - train.mean(axis=0, dtype=np.float64)
    return np.sum(centred * (np.linalg.pinv(covariance(train)) @ centred.T).T, axis=1)


def plain(train, test, ood, labels, known):
    """Scores of the test images and of one outlier set, all fitted for them alone."""
    if known:
        def shrunk(x):
            return ledoit_wolf(x.astype(np.float64))[0]

        train, test, ood, known = scaled(train, test, ood, ood[:KNOWN])
        return [distance(x, train, shrunk) - distance(x, known, shrunk) for x in (test, ood)]
    covariance = functools.partial(np.cov, rowvar=False, bias=True)
    train, test, ood = scaled(train, test, ood)
    clusters = [train[labels == c] for c in np.unique(labels)]
    return [np.min([distance(x, c, covariance) for c in clusters], axis=0) for x in (test, ood)]


def ours(train, test, oods, labels, known, device):
    """Scores of the test images, for SSDk those beside the first set, and of all outlier sets."""
    if not known:
        m = len(labels.unique())
        detectors = detection.fit_each(train, [m], labels, device=device)
        return [detection.score_each(detectors, x)[m] for x in (test, *oods)]
    detector, scores = detection.SSDk.fit(train, device), []
    inside = detector.distance(test)
    for ood in oods:
        known = detector.know(ood[:KNOWN])
        scores += [detector.score(test, known, inside=inside), detector.score(ood, known)]
    return [scores[0], *scores[1::2]]


def measure(name, clusters, dead, known, sizes, device):
    """Time one case; returns its part of the record."""
    train = sample(sizes.rows, sizes.dims, dead, seed=2)
    test = sample(sizes.scored, sizes.dims, dead, seed=3)
    oods = [sample(sizes.scored, sizes.dims, dead, seed=4 + i) for i in range(sizes.sets)]
    labels = torch.arange(sizes.rows) % clusters
    arrays = [x.numpy() for x in (train, test, oods[0], labels)]
    clock, scores = common.clock_of(device), {}
    piece, square, total = (torch.randn(n, sizes.dims, dtype=torch.float64, device=device)
                            for n in (detection.ROWS, sizes.dims, sizes.dims))
    ways = {"fit": common.repeated(lambda: total.addmm_(piece.T, piece), PIECES),
            "score": common.repeated(lambda: piece @ square, PIECES)}
    common.interleaved(ways, 1, 0, device)  # warm-up
    ways["ours"] = lambda: scores.update(ours=ours(train, test, oods, labels, known, device))
    seconds = common.interleaved(ways, sizes.repeats, 0, device, clock)
    scored, fitted = (1 + sizes.sets) * sizes.scored * clusters, sizes.rows
    if known:  # test and outliers by the inliers; test again and outliers by each set's known ones
        scored += 2 * sizes.sets * sizes.scored
        fitted += sizes.sets * KNOWN
    products_s = [(fit * fitted + score * scored) / (PIECES * detection.ROWS)
                  for fit, score in zip(seconds["fit"], seconds["score"], strict=True)]
    found = {"case": name, "ours_s": seconds["ours"], "products_s": products_s,
             "ours": statistics.median(seconds["ours"]), "products": statistics.median(products_s)}
    if not dead:  # the plain way divides by the standard deviation of a dead feature
        way = {"": lambda: scores.update(plain=plain(*arrays, known))}
        [one_set] = common.interleaved(way, 1, 0, device, clock)[""]
        found |= {"plain_one_set_s": one_set, "plain": one_set * sizes.sets}
        found["difference"] = max(
            float(np.max(np.abs(a - b) / np.maximum(np.abs(b), np.median(np.abs(b)))))
            for a, b in zip(scores["ours"], scores["plain"], strict=False))
    return found


def main(argv=None):
    args = common.parse_args(common.parser(__doc__, **SIZES), argv, QUICK)
    device = utils.device()
    clock = common.clock_of(device).__name__
    print(f"N = {args.rows}, d = {args.dims}, {args.sets} outlier sets of {args.scored}; seconds "
          f"by {clock}, ours and products the median of {args.repeats}\n{'':18}{'ours':>10}"
          f"{'products':>10}{'ratio':>8}{'plain':>10}{'/ ours':>8}{'difference':>12}")
    cases = []
    for case in CASES:
        cases.append(c := measure(*case, args, device))
        print(f"{c['case']:18}{c['ours']:10.2f}{c['products']:10.2f}"
              f"{c['ours'] / c['products']:8.2f}", end="" if "plain" in c else "\n")
        if "plain" in c:
            print(f"{c['plain']:10.1f}{c['plain'] / c['ours']:8.1f}{c['difference']:12.0e}")
    shape = f"{args.rows:,} x {args.dims:,}, {args.sets} outlier sets"
    record = {
        "facts": common.facts(device), "clock": clock, "cases": cases,
        "settings": {key: getattr(args, key) for key in SIZES}
        | {"warmup": 1, "known": KNOWN, "rows_at_once": detection.ROWS},
        "table": [common.row(f"{c['case']}: {shape}", "s", c["plain"], c["ours"], c["products"])
                  for c in cases if "plain" in c],
    }
    common.write_record("bench_detection" + "_full" * (not args.quick), record, args.record)


if __name__ == "__main__":
    program.run(main)
