#!/usr/bin/env python3
"""Time the extraction of features beside a DataLoader with PIL transforms, and the cache.

    python benchmarks/bench_extract.py           # ResNet-50: half an hour on a CPU
    python benchmarks/bench_extract.py --quick   # ResNet-18, 256 images: half a minute

The plain way is the original's: images through PIL, ToTensor and Normalize in a DataLoader, batches
of 256, features gathered in a list; but without the gradients that it kept. Ours is features.take:
fp32, also in batches of 256, bf16, a first evaluation that fills a cache, a second one that reads
it, the hash of the weights included. Random 32-pixel images and weights: cost does not depend on
them. All ways take turns. With OMP_NUM_THREADS=1 seconds are CPU time, for machines that do other
work meanwhile; a DataLoader without workers is then the plain way. Writes
benchmarks/records/bench_extract.json.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import data
import features
import models
import utils

MEAN, STD = data.SETS["cifar10"].mean, data.SETS["cifar10"].std
PLAIN_BATCH = 256
WAYS = ("plain", "ours", "ours, batch of 256", "ours, bf16", "filling the cache", "from the cache")


class PILImages(torch.utils.data.Dataset):
    """Images as a torchvision set gives them: a PIL image at a time, transformed."""

    def __init__(self, pixels):
        from torchvision import transforms

        self.pixels = pixels.permute(0, 2, 3, 1).numpy()
        self.transform = transforms.Compose(
            [transforms.Resize(32), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[i]))


def plain(network, pixels, workers):
    """Features by a DataLoader, as a list of batches put together."""
    device = next(network.parameters()).device
    loader = torch.utils.data.DataLoader(PILImages(pixels), PLAIN_BATCH, num_workers=workers)
    network.eval()
    with torch.no_grad():
        return torch.cat([network(x.to(device)).cpu() for x in loader])


def measure(arch, n, repeats, device, clock, workers):
    """Time all ways in turns: ({way: seconds}, largest relative difference to the plain way)."""
    generator = torch.Generator().manual_seed(0)
    network = models.build_model(arch, "SimCLR", generator=generator).encoder.to(device)
    pixels = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = data.ImageSet("random", pixels, torch.zeros(n, dtype=torch.int64))
    kwargs = dict(size=32, batch_size=features.default_batch_size(device), mean=MEAN, std=STD)
    folder = tempfile.mkdtemp()
    found = {}

    def cached():
        cache = features.Cache(folder, network)
        found["x"] = features.take(network, images, cache=cache, **kwargs)

    ways = dict(zip(WAYS, (
        lambda: found.update(plain=plain(network, pixels, workers)),
        lambda: features.take(network, images, **kwargs),
        lambda: features.take(network, images, **kwargs | {"batch_size": PLAIN_BATCH}),
        lambda: features.take(network, images, precision="bf16", **kwargs),
        lambda: (shutil.rmtree(folder), cached()),
        cached,
    ), strict=True))
    warm = images.take(torch.arange(min(n, kwargs["batch_size"])))
    for precision in features.PRECISIONS:
        features.take(network, warm, precision=precision, **kwargs)
    try:
        seconds = common.interleaved(ways, repeats, 0, device, clock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    difference = (found["x"] - found["plain"]).abs().max() / found["plain"].abs().max()
    return seconds, float(difference)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="ResNet-18 and 256 images")
    p.add_argument("--arch", choices=list(models.ARCHITECTURES), help="default: resnet50")
    p.add_argument("--images", type=int, help="default: 10,000 on a GPU, 1,000 on a CPU")
    p.add_argument("--repeats", type=int, default=3, help="default: 3")
    p.add_argument("--record", type=Path, help="where to write instead")
    args = p.parse_args()
    device = utils.device()
    arch = args.arch or ("resnet18" if args.quick else "resnet50")
    n = args.images or (256 if args.quick else 10_000 if device.type == "cuda" else 1_000)
    one = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one else time.perf_counter
    workers = 0 if one else min(4, common.usable_cores())

    seconds, difference = measure(arch, n, args.repeats, device, clock, workers)
    rates = {way: n / statistics.median(times) for way, times in seconds.items()}
    print(f"{arch}, {n} images of 32 pixels; images/s by {clock.__name__}, median of "
          f"{args.repeats}")
    for way, rate in rates.items():
        print(f"{way:20}{rate:10.0f}{rate / rates['plain']:8.1f} x plain")
    print(f"largest difference between plain and ours: {difference:.0e} of the largest feature")
    what = f"features of {arch}, 32 pixels"
    record = {
        "facts": common.facts(device), "clock": clock.__name__,
        "settings": {"arch": arch, "images": n, "repeats": args.repeats, "plain_batch": PLAIN_BATCH,
                     "batch": features.default_batch_size(device), "workers": workers,
                     "warmup": "one batch of each precision"},
        "images_per_s": rates, "seconds": seconds, "difference": difference,
        "table": [
            common.row(what, "images/s", rates["plain"], rates["ours"]),
            common.row(f"{what}, second evaluation", "images/s", rates["plain"],
                       rates["from the cache"]),
        ],
    }
    print(f"written: {common.write_record('bench_extract', record, args.record)}")


if __name__ == "__main__":
    utils.program(main)
