#!/usr/bin/env python3
"""Time detection beside the plain formulas, and beside the matrix products alone.

    python benchmarks/bench_detection.py           # 50,000 x 2,048: about an hour on two cores
    python benchmarks/bench_detection.py --quick   # 10,000 x 512: two minutes

The plain way is the original's, in numpy (knn's is scikit-learn's): for each outlier set, and in it
for test images and for outliers, the formula anew; one set is timed and counted as often as there
are sets. Ours goes from raw features to scores. "Products" are the dense float64 products alone, of
training rows X'X, of scored ones [n, D] x [D, D] for each cluster or [D, N] for knn, in turns with
ours, which leaves half of SSD's out. With OMP_NUM_THREADS=1 seconds are CPU time.
"""

import functools
import statistics

import common
import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors

import detection
import utils
from infra import program

QUICK = {"rows": 10_000, "dims": 512, "scored": 2_000}
SIZES = {"rows": (50_000, "training features"), "dims": (2_048, "their width"),
         "scored": (10_000, "rows of the test set and of each outlier set"),
         "sets": (4, "outlier sets"), "repeats": (3, "of ours")}
CASES = (  # name, score, value of its setting
    ("SSD, m = 1", "ssd", 1), ("SSD, m = 10", "ssd", 10), ("tied, m = 10", "tied", 10),
    ("shrunk, m = 1", "shrunk", 1), ("knn, k = 50", "knn", 50), ("SSDk", "ssdk", 1),
    ("crossval", "crossval", 1))
PIECES = 8  # of detection.ROWS rows, timed for the products
KNOWN = 500  # known outliers of each set


def sample(n, dims, seed):
    """Random features [n, dims] of 16 clusters, as an encoder's: correlated, of falling scale."""
    centres = torch.randn(16, dims, generator=torch.Generator().manual_seed(0))
    mix = torch.randn(dims, dims, generator=torch.Generator().manual_seed(1)) / dims**0.5
    rows = torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))
    scale = torch.logspace(0, -2, dims)
    return (rows * scale + 0.3 * scale * centres[torch.arange(n) % 16]) @ mix


def scaled(standardise, *sets):
    """Unit length, then the first set's mean and deviation; float32 as the original's."""
    doubles = (x.astype(np.float64) for x in sets)
    unit = [x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10) for x in doubles]
    mean, deviation = unit[0].mean(axis=0), unit[0].std(axis=0) + 1e-10
    return [((x - mean) / deviation).astype(np.float32) for x in unit] if standardise else unit


def distance(x, train, covariance):
    """Squared Mahalanobis distance of rows to training rows."""
    centred = x - train.mean(axis=0, dtype=np.float64)
    return np.sum(centred * (np.linalg.pinv(covariance) @ centred.T).T, axis=1)


def shrunk(x):
    return ledoit_wolf(x.astype(np.float64))[0]


def plain(score, value, train, test, ood, labels):
    """Scores of the test images and of one outlier set, all fitted for them alone."""
    train, *sets, known = scaled(score != "knn", train, test, ood, ood[:KNOWN])
    cov = shrunk if score in ("shrunk", "ssdk") else functools.partial(np.cov, rowvar=0, bias=1)
    if score == "knn":
        machine = NearestNeighbors(n_neighbors=value, algorithm="brute")
        return [machine.fit(train).kneighbors(x)[0][:, -1] ** 2 for x in sets]
    if score == "ssdk":
        return [distance(x, train, cov(train)) - distance(x, known, cov(known)) for x in sets]
    clusters, scores = [train[labels == c] for c in np.unique(labels)], []
    for x in sets:
        found = [cov(c) for c in clusters]
        if score == "tied":
            found = [np.average(found, axis=0, weights=np.bincount(labels))] * value
        scores.append(np.min([*map(distance, [x] * value, clusters, found)], axis=0))
    return scores


def ours(score, value, train, test, oods, labels, device):
    """Scores of the test images, for SSDk those beside the first set, and of all outlier sets."""
    if score != "ssdk":
        detector = detection.Choice(score, value).fit(train, labels, device=device)
        return [detector.score(x) for x in (test, *oods)]
    detector = detection.SSDk.fit(train, device=device)
    inside = detector.inlier_score(test)
    pairs = [(detector.score(test, known, inside=inside), detector.score(ood, known))
             for ood in oods for known in [detector.know(ood[:KNOWN])]]
    return [pairs[0][0], *(scores for _, scores in pairs)]


def measure(name, score, value, sizes, device):
    """Time one case; returns its part of the record."""
    train = sample(sizes.rows, sizes.dims, seed=2)
    test, *oods = (sample(sizes.scored, sizes.dims, 3 + i) for i in range(1 + sizes.sets))
    labels = torch.arange(sizes.rows) % value
    clock, scores = common.clock_of(device), {}
    piece, square, total = (torch.randn(n, sizes.dims, dtype=torch.float64, device=device)
                            for n in (detection.ROWS, sizes.dims, sizes.dims))
    ways = {"fit": common.repeated(lambda: total.addmm_(piece.T, piece), PIECES),
            "score": common.repeated(lambda: piece @ square, PIECES)}
    common.interleaved(ways, 1, 0, device)  # warm-up
    ways["ours"] = lambda: scores.update(ours=ours(score, value, train, test, oods, labels, device))
    seconds = common.interleaved(ways, sizes.repeats, 0, device, clock)
    scored, fitted = (1 + sizes.sets) * sizes.scored * value, sizes.rows
    if score == "knn":
        scored, fitted = scored / value * sizes.rows / sizes.dims, 0
    if score == "ssdk":  # test and outliers by the inliers, then by each set's known outliers
        scored, fitted = scored + 2 * sizes.sets * sizes.scored, fitted + sizes.sets * KNOWN
    products_s = [(fit * fitted + one * scored) / (PIECES * detection.ROWS)
                  for fit, one in zip(seconds["fit"], seconds["score"], strict=True)]
    found = {"case": name, "ours_s": seconds["ours"], "products_s": products_s,
             "ours": statistics.median(seconds["ours"]), "products": statistics.median(products_s)}
    if score != "crossval":
        way = {"": lambda: scores.update(plain=plain(
            score, value, *(x.numpy() for x in (train, test, oods[0], labels))))}
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
