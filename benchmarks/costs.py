#!/usr/bin/env python3
"""Show what features and detection cost: peak memory, time, and how often a Gaussian is fitted.

    python benchmarks/costs.py            # about 3 minutes on two cores, 5 GiB of memory free
    python benchmarks/costs.py --rows 5000 --dims 512

Claims shown: extraction holds one [N, D] float32 array and one batch; detection at 50,000 x 2,048
stays under 4 GiB; the training features' Gaussian is fitted once, whatever the number of outlier
sets. Each part runs in a process of its own, whose peak is its alone. Writes
benchmarks/records/costs.json. Random features: cost does not depend on their values.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

MIB = 1024**2


def peak():
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def part_extraction(n, size):
    """Features of n images by a ResNet-18: growth of the peak over a first pass of one batch."""
    import torch

    import data
    import features
    import models

    network = models.build_model("resnet18", "SimCLR").encoder
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=generator).to(torch.uint8)
    images = data.ImageSet("random", pixels, torch.zeros(n, dtype=torch.int64))
    kwargs = dict(size=size, batch_size=256)
    features.extract(network, images.take(torch.arange(512)), **kwargs)  # warm-up: buffers exist
    before, began = peak(), time.perf_counter()
    x = features.extract(network, images, **kwargs)
    return {
        "n": n, "dims": x.shape[1], "seconds": time.perf_counter() - began,
        "array_mib": x.numel() * 4 / MIB, "peak_growth_mib": (peak() - before) / MIB,
    }


def part_detection(n, dims, sets, kind, clusters):
    """Fit once and score the test set and several outlier sets of 10,000."""
    import torch

    import detection

    generator = torch.Generator().manual_seed(0)

    def draw(rows):
        return torch.randn(rows, dims, generator=generator)

    fits = []
    fit = detection.Gaussian.fit.__func__

    def counted(cls, x, **kwargs):
        fits.append(len(x))
        return fit(cls, x, **kwargs)

    detection.Gaussian.fit = classmethod(counted)
    train, test = draw(n), draw(10_000)
    held, began = peak(), time.perf_counter()
    if kind == "SSD":
        detector = detection.SSD.fit(train, clusters)
        fitted = time.perf_counter() - began
        inside = detector.score(test)
        for _ in range(sets):
            detection.metrics(inside, detector.score(draw(10_000)))
    else:
        detector = detection.SSDk.fit(train)
        fitted = time.perf_counter() - began
        for _ in range(sets):
            known = detector.know(draw(500))
            detection.metrics(detector.score(test, known), detector.score(draw(10_000), known))
    return {
        "n": n, "dims": dims, "sets": sets, "seconds": time.perf_counter() - began,
        "seconds_of_the_fit": fitted, "features_mib": held / MIB, "peak_mib": peak() / MIB,
        "clusters": clusters, "fits": len(fits),
        "rows_fitted": sum(fits) - (500 * sets if kind == "SSDk" else 0),
    }


def in_own_process(part, *arguments):
    """Run one part in a fresh process and return what it measured."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", json.dumps([part, *arguments])],
        check=True, stdout=subprocess.PIPE, text=True,
    )
    return {"part": part, **json.loads(done.stdout)}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, default=50_000, help="training features (default: 50000)")
    p.add_argument("--dims", type=int, default=2048, help="their width (default: 2048)")
    p.add_argument("--record", type=Path, default=HERE / "records/costs.json")
    p.add_argument("--part", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        part, *arguments = json.loads(args.part)
        print(json.dumps({"extraction": part_extraction, "detection": part_detection}[part](
            *arguments)))
        return

    import numpy
    import torch

    results = []
    for n in (4_000, 16_000):
        results.append(in_own_process("extraction", n, 8))
        r = results[-1]
        print(f"extraction  N={n:6d} D={r['dims']}: array {r['array_mib']:6.1f} MiB, peak grew by "
              f"{r['peak_growth_mib']:6.1f} MiB, {r['seconds']:.1f} s", flush=True)
    for kind, clusters, sets in (("SSD", 1, 1), ("SSD", 1, 4), ("SSD", 10, 4), ("SSDk", 1, 4)):
        found = in_own_process("detection", args.rows, args.dims, sets, kind, clusters)
        results.append(r := found | {"kind": kind})
        print(f"{kind:4} m={clusters:<2} N={args.rows} D={args.dims}, {sets} outlier sets of "
              f"10,000: peak {r['peak_mib'] / 1024:.2f} GiB, {r['seconds']:.0f} s, "
              f"{r['seconds_of_the_fit']:.0f} s of it fitting; each training feature fitted "
              f"{r['rows_fitted'] / args.rows:.0f} time(s)", flush=True)
    record = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__,
        "numpy": numpy.__version__, "results": results,
    }
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.record}")


if __name__ == "__main__":
    main()
