#!/usr/bin/env python3
"""Show what features and detection cost: peak memory, time, and how often a Gaussian is fitted.

    python benchmarks/costs.py [--rows N --dims D]     # 3 minutes on two cores, 5 GiB of memory

Claims shown: extraction holds one [N, D] float32 array and two batches; detection at 50,000 x 2,048
stays under 4 GiB; the training features' Gaussian is fitted once, whatever the number of outlier
sets. Each part has a process of its own, and random features. Writes benchmarks/records/costs.json.
"""

import time
from unittest import mock

import common
import torch

import detection
import features
import models
import utils
from infra import program

SCORED = 10_000  # test images, and images of each outlier set
KNOWN = 500  # known outliers
IMAGES = (4_000, 16_000)
CASES = (("SSD", 1, 1), ("SSD", 1, 4), ("SSD", 10, 4), ("SSDk", 1, 4))  # kind, clusters, sets


def part_extraction(n, size):
    """Features of n images by a ResNet-18: growth of the peak over a first pass of two batches."""
    network = models.build_model("resnet18", "projection").encoder
    images = common.random_images(n, size)
    settings = features.FeatureSettings(size, batch_size=256)
    features.extract(network, images.subset(torch.arange(min(n, 512))), settings)  # warm-up
    before, began = common.peak(), time.perf_counter()
    x = features.extract(network, images, settings)
    return {"n": n, "dims": x.shape[1], "seconds": time.perf_counter() - began,
            "array_mib": x.numel() * 4 / common.MIB, "peak_growth_mib": common.peak() - before}


def detect(kind, clusters, train, test, oods):
    """Fit once, score test images and outlier sets, an iterable; returns the seconds of the fit."""
    began = time.perf_counter()
    if kind == "SSD":
        detector = detection.SSD.fit(train, clusters=clusters)
        fitted = time.perf_counter() - began
        inside = detector.score(test)
        for ood in oods:
            detection.metrics(inside, detector.score(ood))
    else:
        detector = detection.SSDk.fit(train)
        fitted = time.perf_counter() - began
        for ood in oods:
            known = detector.know(ood[:KNOWN])
            detection.metrics(detector.score(test, known), detector.score(ood, known))
    return fitted


def part_detection(n, dims, sets, kind, clusters):
    """Detection in n training features: seconds, memory, and the rows of each Gaussian's fit."""
    generator, fits, fit = torch.Generator().manual_seed(0), [], detection.Gaussian.fit

    def counted(x, **kwargs):
        fits.append(len(x))
        return fit(x, **kwargs)

    train, test = (torch.randn(rows, dims, generator=generator) for rows in (n, SCORED))
    oods = (torch.randn(SCORED, dims, generator=generator) for _ in range(sets))  # one at a time
    held, began = common.peak(), time.perf_counter()
    with mock.patch.object(detection.Gaussian, "fit", counted):
        fitted = detect(kind, clusters, train, test, oods)
    return {"n": n, "dims": dims, "sets": sets, "seconds": time.perf_counter() - began,
            "seconds_of_the_fit": fitted, "features_mib": held, "peak_mib": common.peak(),
            "clusters": clusters, "fits": len(fits),
            "rows_fitted": sum(fits) - (KNOWN * sets if kind == "SSDk" else 0)}


def main(argv=None):
    p = common.parser(__doc__, rows=(50_000, "training features"), dims=(2048, "their width"))
    args = utils.parse_args(p, argv)
    results = []
    for n in IMAGES:
        r = common.in_own_process(part_extraction, n, 8)
        results.append({"part": "extraction"} | r)
        print(f"extraction  N={n:6d} D={r['dims']}: array {r['array_mib']:6.1f} MiB, peak grew by "
              f"{r['peak_growth_mib']:6.1f} MiB, {r['seconds']:.1f} s", flush=True)
    for kind, clusters, sets in CASES:
        r = common.in_own_process(part_detection, args.rows, args.dims, sets, kind, clusters)
        results.append({"part": "detection"} | r | {"kind": kind})
        print(f"{kind:4} m={clusters:<2} N={args.rows} D={args.dims}, {sets} outlier sets of "
              f"{SCORED:,}: peak {r['peak_mib'] / 1024:.2f} GiB, {r['seconds']:.0f} s, "
              f"{r['seconds_of_the_fit']:.0f} s of it fitting; each training feature fitted "
              f"{r['rows_fitted'] / args.rows:.0f} time(s)", flush=True)
    common.write_record("costs", {"facts": common.facts("cpu"), "results": results}, args.record)


if __name__ == "__main__":
    program.run(main)
