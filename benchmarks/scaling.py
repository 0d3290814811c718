#!/usr/bin/env python3
"""Show how cost grows: of detection with the number of images, of training with that of processes.

    python benchmarks/scaling.py            # up to 10^6 images, 3 GB of disk: 4 minutes
    python benchmarks/scaling.py --quick    # up to 10^5 images, fewer steps: 1 minute

Detection reads random features from files as --feature-store leaves them, N to fit to and 10,000 of
test images and outliers each to score, in a process of its own. "Grew by" is its peak of memory
above that of the same on 10,000 images, done before: what N costs. Training is the step of train.py
with all cores in one process and with half of them in each of two, in turns; a figure is the median
of all steps but the first two of each turn. Under other load, which the record tells, seconds and
ratio say nothing. Then: what it costs to sample the parameters of a batch, whose random numbers
every process draws; and a calculation of steps on GPUs, by the formulas of docs/costs.md.

Writes benchmarks/records/scaling.json (--quick only where --record says so), prints its tables.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench_step
import common
import costs
import numpy as np
import table
import torch
from table import figure

import augment
import features
import models
from infra import program

DIMS = 512
SETS = {"test": 10_000, "ood": 10_000}  # files of features beside the training's
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


def write_features(path, n, dims, seed):
    """Write random features [n, dims] as a feature store has them, a chunk at a time."""
    generator = torch.Generator().manual_seed(seed)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (n, dims))
    for start in range(0, n, CHUNK):
        rows = array[start : start + CHUNK]
        rows[:] = torch.randn(rows.shape, generator=generator).numpy()


def part_detection(folder, kind, clusters):
    """Detection with the files of a folder: seconds and memory."""
    files = {path.stem: features.DiskFeatures(path) for path in Path(folder).glob("*.npy")}
    train, test, oods = files["train"], files["test"], [files["ood"]]
    costs.detect(kind, clusters, test, test, oods)  # warm-up
    before, began = common.peak(), time.perf_counter()
    fitted = costs.detect(kind, clusters, train, test, oods)
    return {"kind": kind, "clusters": clusters, "n": len(train), "seconds_of_the_fit": fitted,
            "seconds": time.perf_counter() - began, "peak_mib": common.peak(),
            "grew_by_mib": common.peak() - before,
            "file_mib": train.path.stat().st_size / common.MIB}


def part_training(arch, size, steps):
    """Seconds of each of some steps, in as many processes as there are."""
    images = common.random_images(BATCH, size)
    step = bench_step.our_step(images, arch, size, torch.device("cpu"))
    turn = bench_step.our_turn(step, BATCH, 1)
    return common.interleaved({"step": turn}, steps, WARM_UP, "cpu")["step"]


def part_draws(views, repeats):
    """Seconds to sample the parameters of some views; of it for the uniform numbers alone."""
    generator = torch.Generator().manual_seed(0)
    turns = {"seconds": lambda: augment.sample_views("ssl", 1, views, slice(None), 32, 32,
                                                     generator),
             "seconds_of_uniform": lambda: augment.uniform_ssl(views, generator)}
    return {"views": views} | common.medians(common.interleaved(turns, repeats, 2, "cpu"))


def measure_detection(rows):
    """Detection with each number of rows in each way."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, n) in enumerate(SETS.items()):
            write_features(f"{folder}/{name}.npy", n, DIMS, seed)
        for n in rows:
            write_features(f"{folder}/train.npy", n, DIMS, len(SETS))
            for kind in KINDS:
                found.append(common.in_own_process(part_detection, folder, *kind))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def measure_training(turns, steps, arch="resnet18", size=32):
    """Views a second in one process and in two; all cores are in use both times."""
    seconds, cores = {"1": [], "2": []}, common.usable_cores()
    for _ in range(turns):
        for n, every in seconds.items():
            every += common.in_own_process(part_training, arch, size, steps, processes=int(n),
                                           threads=max(1, cores // int(n)))
    rates = {n: 2 * BATCH / statistics.median(s) for n, s in seconds.items()}
    return {"arch": arch, "size": size, "batch_size": BATCH, "cores": cores,
            "views_per_s": rates, "ratio": rates["2"] / rates["1"]}


def estimate(batch, gpus, draws, uniform, parameters, flop_per_view):
    """Estimate a step of SimCLR, two views of each image, by the formulas of docs/costs.md.

    Times are in seconds: draws for the parameters of the batch, of them uniform for the random
    numbers. "exposed" is what of the gradients' exchange nothing hides. Bytes are each GPU's.
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
    return {"products": products, "gather": gather, "gradients": gradients, "exposed": exposed,
            "host": host, "step": max(host, products + gather + exposed),
            "gather_bytes": gather_bytes, "gradient_bytes": gradient_bytes}


def estimated_rows(record):
    keys = ("products", "gather", "gradients", "exposed", "host", "step")
    for batch, drawn in zip(BATCHES, record["draws"], strict=True):
        steps = {gpus: estimate(batch, gpus, drawn["seconds"], drawn["seconds_of_uniform"],
                                record["parameters"], record["flop_per_view"]) for gpus in GPUS}
        for gpus, r in steps.items():
            yield (f"{batch:,}", str(gpus), *(figure(1e3 * r[key]) for key in keys),
                   f"{steps[1]['step'] / (gpus * r['step']):.0%}")


def tables(record):
    """All tables of a record as the text of docs/costs.md has them."""
    detection, draws, t = [], [], record["training"]
    for r in record["detection"]:
        fit = r["seconds_of_the_fit"]
        detection.append((
            f"{r['kind']}, m = {r['clusters']}" if r["kind"] == "SSD" else r["kind"],
            *(f"{r[key]:,.0f}" for key in ("n", "file_mib", "peak_mib", "grew_by_mib")),
            figure(fit), figure(r["seconds"] - fit)))
    training = (f"{t['arch']}, {t['size']} pixels, batch {t['batch_size']}, {t['cores']} cores",
                *(figure(t["views_per_s"][n]) for n in "12"), f"{t['ratio']:.2f}")
    for r in record["draws"]:
        ms = figure(1e3 * r["seconds"]), figure(1e3 * r["seconds_of_uniform"])
        draws.append((f"{r['views'] // 2:,}", f"{r['views']:,}", *ms,
                      figure(1e6 * r["seconds"] / r["views"])))
    made = (
        ("detection, 512 features|N|feature file, MiB|peak memory, MiB|grew by, MiB|fit, s"
         "|score, s", detection),
        ("training|1 process, views/s|2 processes, views/s|ratio", [training]),
        ("draws of a batch of|views|all, ms|the uniform numbers alone, ms|all, us a view", draws),
        ("batch|GPUs|products, ms|gather, ms|gradients, ms|not hidden, ms|host, ms|step, ms"
         "|of linear", estimated_rows(record)),
    )
    lines = [line for head, rows in made for line in table.markdown(head.split("|"), rows)]
    return "\n".join([*lines, f"All but the last table: {table.machine(record['facts'])}. Load "
                              f"average before it: {record['load']:.1f}."])


def main(argv=None):
    p = common.parser(__doc__)
    p.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this file")
    p.set_defaults(**FULL)
    args = common.parse_args(p, argv, QUICK)
    network = models.build_model("resnet50", "projection")
    record = {
        "facts": common.facts("cpu"), "load": os.getloadavg()[0],
        "detection": measure_detection(args.rows),
        "training": measure_training(args.turns, args.steps),
        "draws": [common.in_own_process(part_draws, 2 * batch, args.draws, threads=1)
                  for batch in BATCHES],
        "parameters": sum(p.numel() for p in network.parameters()),
        "flop_per_view": bench_step.flop_per_view("resnet50", 32),
    }
    made = tables(record)
    print(made)
    if args.record or not args.quick:
        common.write_record("scaling", record, args.record)
    if args.write:
        table.put(args.write, made, "scaling")


if __name__ == "__main__":
    program.run(main)
