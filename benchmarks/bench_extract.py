#!/usr/bin/env python3
"""Time the extraction of features beside a DataLoader with PIL transforms, and the cache.

    python benchmarks/bench_extract.py           # ResNet-50: half an hour on a CPU
    python benchmarks/bench_extract.py --quick   # ResNet-18, 256 images: half a minute

The plain way is the original's: PIL images in a DataLoader, batches of 256, features gathered in a
list; but without the gradients that it kept. Ours is in fp32, in bf16, and with a cache that is
filled, then read, the hash of the weights included. All ways take turns. With OMP_NUM_THREADS=1
seconds are CPU time, for machines that do other work meanwhile, and the DataLoader has no workers.
Writes benchmarks/records/bench_extract.json.
"""

import shutil
import tempfile
import time
from dataclasses import replace

import common
import torch
from torchvision import transforms as t

import features
import models
import utils
from infra import program

PLAIN_BATCH = 256
QUICK = {"arch": "resnet18", "images": 256}


def plain(network, pixels, workers):
    device = next(network.parameters()).device
    chain = t.Compose([t.Resize(32), t.ToTensor(), t.Normalize(common.MEAN, common.STD)])
    images = common.PILImages(pixels, chain)
    network.eval()
    with torch.no_grad():
        return torch.cat([network(x.to(device)).cpu() for x, in torch.utils.data.DataLoader(
            images, PLAIN_BATCH, num_workers=workers)])


def measure(arch, n, repeats, device, clock, workers):
    """Time all ways in turns: ({way: seconds}, largest relative difference to the plain way)."""
    generator = utils.generator(0)
    network = models.build_model(arch, "projection", generator=generator).encoder.to(device)
    images = common.random_images(n, 32)
    batch = features.default_batch_size(device)
    settings = features.FeatureSettings(32, batch, common.MEAN, common.STD)
    found = {}

    def ours(**changes):
        return lambda: features.extract(network, images, replace(settings, **changes))

    def cached():
        cache = features.FeatureCache(folder, network)
        found["x"] = features.extract(network, images, settings, cache)

    ways = {
        "plain": lambda: found.update(plain=plain(network, images.pixels, workers)),
        "ours": ours(), "ours, batch of 256": ours(batch_size=PLAIN_BATCH),
        "ours, bf16": ours(precision="bf16"),
        "filling the cache": lambda: (shutil.rmtree(folder), cached()), "from the cache": cached,
    }
    warm = images.subset(torch.arange(min(n, batch)))
    for precision in features.PRECISIONS:
        features.extract(network, warm, replace(settings, precision=precision))
    with tempfile.TemporaryDirectory() as folder:
        seconds = common.interleaved(ways, repeats, 0, device, clock)
    difference = (found["x"] - found["plain"]).abs().max() / found["plain"].abs().max()
    return seconds, float(difference)


def main(argv=None):
    device = utils.device()
    n = 10_000 if device.type == "cuda" else 1_000
    p = common.parser(__doc__, images=(n, "how many"), repeats=(3, "turns"))
    p.add_argument("--arch", choices=list(models.ARCHITECTURES), default="resnet50")
    args = common.parse_args(p, argv, QUICK)
    clock = common.clock_of(device)
    workers = 0 if clock is time.process_time else min(4, common.usable_cores())

    seconds, difference = measure(args.arch, args.images, args.repeats, device, clock, workers)
    rates = {way: args.images / s for way, s in common.medians(seconds).items()}
    print(f"{args.arch}, {args.images} images of 32 pixels; images/s by {clock.__name__}, median "
          f"of {args.repeats}")
    for way, rate in rates.items():
        print(f"{way:20}{rate:10.0f}{rate / rates['plain']:8.1f} x plain")
    print(f"largest difference between plain and ours: {difference:.0e} of the largest feature")
    what = f"features of {args.arch}, 32 pixels"
    record = {
        "facts": common.facts(device), "clock": clock.__name__,
        "settings": {"arch": args.arch, "images": args.images, "repeats": args.repeats,
                     "plain_batch": PLAIN_BATCH, "batch": features.default_batch_size(device),
                     "workers": workers, "warmup": "one batch of each precision"},
        "images_per_s": rates, "seconds": seconds, "difference": difference,
        "table": [common.row(what, "images/s", rates["plain"], rates["ours"]),
                  common.row(f"{what}, second evaluation", "images/s", rates["plain"],
                             rates["from the cache"])],
    }
    common.write_record("bench_extract", record, args.record)


if __name__ == "__main__":
    program.run(main)
