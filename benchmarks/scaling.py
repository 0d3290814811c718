#!/usr/bin/env python3
"""Show how cost grows: of detection with the number of images, of training with that of processes.

    python benchmarks/scaling.py            # up to 10^6 images, 3 GB of disk: 4 minutes
    python benchmarks/scaling.py --quick    # up to 10^5 images, fewer steps: 1 minute

Detection reads random features from files as --feature-store leaves them, N to fit to and 10,000 of
test images and outliers each to score, in a process of its own for each N. "Grew by" is its peak of
resident memory above that of the same on 10,000 images, done before: what N costs. Memory in which
the system keeps files at hand does not count.

Training is the step of train.py on CPUs, with all cores in one process and with half of them in
each of two, on the same batches. Both are run in turns; a figure is the median of the steps of all
turns, without the first two of each. On a machine that does other work, as the record's load
average tells, seconds and this ratio are not to be trusted.

Then: what it costs to draw the parameters of a batch, whose random numbers each of several
processes draws for all; and a calculation of steps on GPUs from that and from what is not measured
here, with formulas and assumptions in docs/scaling.md.

Writes benchmarks/records/scaling.json (--quick only where --record says so) and prints its tables.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_step
import common
import numpy as np
import table
import torch
from numpy.lib import format as npy

import augment
import detection
import distributed
import features
import models
import utils

MIB = 2**20
DIMS = 512
SETS = {"test": 10_000, "ood": 10_000}  # files of features beside the training's
KNOWN = 500  # known outliers
KINDS = (("SSD", 1), ("SSD", 10), ("SSDk", 1))  # and their numbers of clusters
CHUNK = 4096  # rows written at a time
BATCH = 32  # images of the steps that are measured, of all processes
WARM_UP = 2  # steps of each turn that do not count
FULL = {"rows": (10_000, 100_000, 1_000_000), "turns": 3, "steps": 8, "draws": 15}
QUICK = {"rows": (10_000, 100_000), "turns": 1, "steps": 4, "draws": 5}

# The calculation: what is not measured here
BATCHES, GPUS = (512, 4096, 32768), (1, 8, 64)
RATE = 200e12  # FLOP/s of training a ResNet-50: a fifth of an H200's dense bfloat16 rate
WIDTH = 128  # of the head's outputs, float32
NODE = 8  # GPUs that NVLink joins
NVLINK, NETWORK = 450e9, 50e9  # bytes/s in one direction: of a GPU; of a node, 400 Gb/s
LATENCY = 50e-6  # s of a collective
BUCKETS = 5  # collectives that DistributedDataParallel makes of the gradients, 25 MB each
LAUNCHES = 5e-3  # s in which the host starts the kernels of a step


# --- what is measured, each part in a process of its own ------------------------------------------


def write_features(path, n, dims, seed):
    """Write random features [n, dims] as a feature store has them, a chunk at a time."""
    generator = torch.Generator().manual_seed(seed)
    with open(path, "wb") as file:
        npy.write_array_header_1_0(file, {
            "descr": npy.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False,
            "shape": (n, dims)})
        for start in range(0, n, CHUNK):
            file.write(torch.randn(min(CHUNK, n - start), dims, generator=generator).numpy())
        file.write(b"{}")


def peak():
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def detect(kind, clusters, train, test, ood):
    """Fit, score and measure; returns the seconds of the fit."""
    began = time.perf_counter()
    if kind == "SSD":
        detector = detection.SSD.fit(train, clusters)
        fitted = time.perf_counter() - began
        inside, outside = detector.score(test), detector.score(ood)
    else:
        detector = detection.SSDk.fit(train)
        fitted = time.perf_counter() - began
        known = detector.know(ood[:KNOWN])
        inside, outside = detector.score(test, known), detector.score(ood, known)
    detection.metrics(inside, outside)
    return fitted


def part_detection(folder, kind, clusters):
    """Detection with the files of a folder: seconds and memory."""
    files = {path.stem: features.Stored(path) for path in Path(folder).glob("*.npy")}
    detect(kind, clusters, files["test"], files["test"], files["ood"])
    before, began = peak(), time.perf_counter()
    fitted = detect(kind, clusters, files["train"], files["test"], files["ood"])
    return {
        "kind": kind, "clusters": clusters, "n": len(files["train"]),
        "file_mib": files["train"].path.stat().st_size / MIB, "peak_mib": peak(),
        "grew_by_mib": peak() - before, "seconds": time.perf_counter() - began,
        "seconds_of_the_fit": fitted,
    }


def part_training(arch, size, steps):
    """Seconds of each step of the batches 0, 1, ... in as many processes as there are."""
    pixels = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    step = bench_step.our_step(pixels, arch, size, device, bench_step.PLAIN)
    turn = bench_step.our_turn(step, BATCH, 1)
    return common.median_seconds(turn, steps, WARM_UP, device)[1]


def part_draws(views, repeats):
    """Seconds to draw the parameters of some views; of it for the uniform numbers alone."""
    generator = torch.Generator().manual_seed(0)
    turns = {"seconds": lambda: augment.draw_ssl(views, 32, 32, generator),
             "seconds_of_uniform": lambda: augment.uniform_ssl(views, generator)}
    found = common.interleaved(turns, repeats, 2, "cpu")
    return {"views": views} | {name: statistics.median(s) for name, s in found.items()}


PARTS = {"detection": part_detection, "training": part_training, "draws": part_draws}


def run(part, *arguments, threads, processes=1):
    """Run a part in one or several fresh processes on the CPU; returns what it measured."""
    variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    if processes > 1:
        variables["PET_NPROC_PER_NODE"] = str(processes)
    done = subprocess.run(
        [sys.executable, __file__, "--part", json.dumps([part, *arguments])],
        env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=False,
    )
    if done.returncode != 0:
        raise utils.RunError(f"the part {part} {arguments} ended with {done.returncode}")
    return json.loads(done.stdout)


def measure_detection(rows):
    """Detection with each number of rows in each way."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, n) in enumerate(SETS.items()):
            write_features(Path(folder) / f"{name}.npy", n, DIMS, seed=number)
        for n in rows:
            write_features(Path(folder) / "train.npy", n, DIMS, seed=len(SETS))
            for kind, clusters in KINDS:
                found.append(run("detection", folder, kind, clusters,
                                 threads=torch.get_num_threads()))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def measure_training(turns, steps, arch="resnet18", size=32):
    """Views a second in one process and in two, all cores in use both times."""
    seconds, cores = {1: [], 2: []}, common.usable_cores()
    for _ in range(turns):
        for processes, every in seconds.items():
            every += run("training", arch, size, steps, processes=processes,
                         threads=max(1, cores // processes))
    rates = {str(n): 2 * BATCH / statistics.median(s) for n, s in seconds.items()}
    return {"arch": arch, "size": size, "batch_size": BATCH, "cores": cores,
            "views_per_s": rates, "ratio": rates["2"] / rates["1"]}


# --- what is reckoned -----------------------------------------------------------------------------


def reckon(batch, gpus, draws, uniform, parameters, flop_per_view):
    """Reckon a step of SimCLR, two views of each image.

    Args:
        batch: images of all GPUs. gpus: their number, NODE in each node.
        draws: seconds to draw the parameters of the batch. uniform: of them for the random
            numbers, which every process draws for all.
        parameters: of the network. flop_per_view: forward and backward.

    Returns:
        dict, seconds: products, gather, gradients (of them "exposed": while nothing is computed),
        host, step. gather_bytes, gradient_bytes: that each GPU sends.

    Source: docs/scaling.md.
    """
    views, others = 2 * batch, (gpus - 1) / gpus
    speed, latency = NVLINK if gpus <= NODE else NETWORK, LATENCY * (gpus > 1)
    products = views * flop_per_view / gpus / RATE
    gather_bytes = 3 * others * views * WIDTH * 4
    gradient_bytes = 2 * others * parameters * 4
    gather = gather_bytes / speed + 2 * latency
    gradients = gradient_bytes / speed + BUCKETS * latency
    exposed = max(0, gradients - products * 2 / 3)
    host = uniform + (draws - uniform) / gpus + LAUNCHES
    return {
        "products": products, "gather": gather, "gradients": gradients, "exposed": exposed,
        "host": host, "step": max(host, products + gather + exposed),
        "gather_bytes": gather_bytes, "gradient_bytes": gradient_bytes,
    }


# --- tables ---------------------------------------------------------------------------------------


def lines(head, rows):
    """A table in Markdown, numbers to the right, with an empty line after it."""
    bars = ["---" if i == 0 else "---:" for i in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, bars, *rows)] + [""]


def detection_table(found):
    """How detection grows."""
    head = ("detection, 512 features", "N", "feature file, MiB", "peak memory, MiB", "grew by, MiB",
            "fit, s", "score, s")
    return lines(head, [(
        f"{r['kind']}, m = {r['clusters']}" if r["kind"] == "SSD" else r["kind"], f"{r['n']:,}",
        f"{r['file_mib']:,.0f}", f"{r['peak_mib']:,.0f}", f"{r['grew_by_mib']:,.0f}",
        table.figure(r["seconds_of_the_fit"]), table.figure(r["seconds"] - r["seconds_of_the_fit"]),
    ) for r in found])


def training_table(found):
    """How training grows."""
    head = ("training", "1 process, views/s", "2 processes, views/s", "ratio")
    what = f"{found['arch']}, {found['size']} pixels, batch {found['batch_size']}, " \
           f"{found['cores']} cores"
    rates = [table.figure(found["views_per_s"][n]) for n in "12"]
    return lines(head, [(what, *rates, f"{found['ratio']:.2f}")])


def draws_table(found):
    """What random numbers cost."""
    head = ("draws of a batch of", "views", "all, ms", "the uniform numbers alone, ms",
            "all, us a view")
    return lines(head, [(
        f"{r['views'] // 2:,}", f"{r['views']:,}", table.figure(1e3 * r["seconds"]),
        table.figure(1e3 * r["seconds_of_uniform"]), table.figure(1e6 * r["seconds"] / r["views"]),
    ) for r in found])


def reckoned_table(draws, parameters, flop_per_view):
    """Steps on GPUs."""
    head = ("batch", "GPUs", "products, ms", "gather, ms", "gradients, ms", "not hidden, ms",
            "host, ms", "step, ms", "of linear")
    rows = []
    for batch, drawn in zip(BATCHES, draws, strict=True):
        drawing = drawn["seconds"], drawn["seconds_of_uniform"]
        steps = {gpus: reckon(batch, gpus, *drawing, parameters, flop_per_view) for gpus in GPUS}
        for gpus, r in steps.items():
            ms = [table.figure(1e3 * r[key]) for key in
                  ("products", "gather", "gradients", "exposed", "host", "step")]
            share = steps[1]["step"] / (gpus * r["step"])
            rows.append((f"{batch:,}", str(gpus), *ms, f"{share:.0%}"))
    return lines(head, rows)


def tables(record):
    """All tables of a record as the text of docs/scaling.md has them."""
    return "\n".join([
        *detection_table(record["detection"]), *training_table(record["training"]),
        *draws_table(record["draws"]),
        *reckoned_table(record["draws"], record["parameters"], record["flop_per_view"]),
        f"All but the last table: {table.machine(record['facts'])}. Load average before it: "
        f"{record['load']:.1f}.",
    ])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="up to 10^5 images, fewer steps")
    p.add_argument("--record", type=Path, help="file of the record")
    p.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this file")
    p.add_argument("--part", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.part:
        distributed.start()
        part, *arguments = json.loads(args.part)
        found = PARTS[part](*arguments)
        if distributed.is_lead():
            print(json.dumps(found))
        return

    sizes = QUICK if args.quick else FULL
    network = models.build_model("resnet50", "SimCLR")
    record = {
        "facts": common.facts("cpu"),
        "load": os.getloadavg()[0],  # of what else the machine does
        "detection": measure_detection(sizes["rows"]),
        "training": measure_training(sizes["turns"], sizes["steps"]),
        "draws": [run("draws", 2 * batch, sizes["draws"], threads=1) for batch in BATCHES],
        "parameters": sum(p.numel() for p in network.parameters()),
        "flop_per_view": bench_step.flop_per_view("resnet50", 32),
    }
    made = tables(record)
    print(made)
    if args.record or not args.quick:
        print(f"written: {common.write_record('scaling', record, args.record)}")
    if args.write:
        text = table.put(args.write.read_text(encoding="utf-8"), made)
        with utils.whole_file(args.write, "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    utils.program(main)
