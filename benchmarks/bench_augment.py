#!/usr/bin/env python3
"""Time the "ssl" augmentation beside torchvision's PIL pipeline, on one thread of the CPU.

    python benchmarks/bench_augment.py           # a minute
    python benchmarks/bench_augment.py --quick   # seconds

The plain way is the original's: RandomResizedCrop, flip, ColorJitter, grayscale, ToTensor,
Normalize on each PIL image, here without the cost of worker processes. Ours takes all images as
one uint8 tensor; drawing the random numbers is counted. Both ways take turns, and so do their
parts. Views/s of a core are counted in CPU time: what other processes take of it is left out.
Expect 7 times the plain way's at 32 pixels. Where torch sees a GPU, ours is timed there too, as it
is and compiled. Writes benchmarks/records/bench_augment.json.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import augment
import data
import utils

MEAN, STD = data.SETS["cifar10"].mean, data.SETS["cifar10"].std


def plain_parts(size):
    """The plain pipeline of one PIL image in three parts: {name: transform}."""
    from torchvision import transforms as t

    jitter = t.ColorJitter(*augment.STRENGTH)
    parts = {
        "crop, resize, flip": [
            t.RandomResizedCrop(size, augment.CROP_SCALE, augment.CROP_RATIO),
            t.RandomHorizontalFlip(augment.FLIP),
        ],
        "colours, grey": [
            t.RandomApply([jitter], augment.JITTER), t.RandomGrayscale(augment.GRAYSCALE),
        ],
        "to tensor, normalise": [t.ToTensor(), t.Normalize(MEAN, STD)],
    }
    return {name: t.Compose(chain) for name, chain in parts.items()}


def our_parts(draws, size):
    """Our augmentation in the same parts, for pixels that `draws` are of."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def colours(x):
        x = augment.color_jitter(x.clone(), draws.jitter, draws.order, draws.factor)
        return augment.grayscale(x, draws.gray)

    return {
        "crop, resize, flip": lambda x: augment.resized_crop(x, draws.box, draws.flip, size),
        "colours, grey": colours,
        "to tensor, normalise": lambda x: augment.normalize(x.clone(), mean, std),
    }


def chained(parts, x):
    """{part: function without arguments}, each working on what the part before it returned."""
    calls = {}
    for name, part in parts.items():
        calls[name] = lambda part=part, x=x: part(x)
        x = part(x)
    return calls


def whole(pixels, size, apply=augment.apply_ssl):
    """Function that draws for a batch and augments it, as a training step does."""
    mean, std = (torch.tensor(v, device=pixels.device) for v in (MEAN, STD))
    generator = torch.Generator().manual_seed(0)

    def call():
        draws = augment.draw_ssl(len(pixels), *pixels.shape[2:], generator)
        return apply(pixels, augment.to(draws, pixels.device), size, mean, std)

    return call


def views_per_s(seconds, views):
    """{name: list of seconds} -> {name: views a second, of the median}."""
    return {name: round(views / statistics.median(s), 1) for name, s in seconds.items()}


def cpu_seconds(calls, repeats, warmup):
    """Time functions in turns by the CPU's work: {name: list of seconds}."""
    return common.interleaved(calls, repeats, warmup, "cpu", clock=time.process_time)


def on_cpu(pixels, size, repeats, warmup):
    """Both ways and their parts on one thread: {way: {part or "whole": views/s}}."""
    from PIL import Image

    # What a network's activations do in training: once such a block has been freed, the C library
    # keeps freed memory, and tensors no longer pay for new pages from the system.
    torch.empty(28 * 2**20, dtype=torch.uint8).fill_(0)
    images = [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    plain = {
        name: lambda images, part=part: [part(image) for image in images]
        for name, part in plain_parts(size).items()
    }

    def plain_way():
        x = images
        for part in plain.values():
            x = part(x)
        return torch.stack(x)

    # The parts of ours are timed on as many images as the whole works on at a time.
    few = pixels[: augment.PIECE // size**2]
    draws = augment.draw_ssl(len(few), *few.shape[2:], torch.Generator().manual_seed(0))
    found = {"plain": {}, "ours": {}}
    for way, count, calls in (
        ("plain", len(images), chained(plain, images)),
        ("ours", len(few), chained(our_parts(draws, size), few)),
    ):
        found[way] |= views_per_s(cpu_seconds(calls, repeats, warmup), count)
    ways = {"plain": plain_way, "ours": whole(pixels, size)}
    seconds = cpu_seconds(ways, repeats, warmup)
    for way, rate in views_per_s(seconds, len(pixels)).items():
        found[way]["whole"] = rate
    return found, seconds


def on_gpu(pixels, size, repeats, warmup):
    """Ours on the GPU, as it is and compiled: {way: views/s}."""
    pixels = pixels.cuda()
    compiled = torch.compile(augment.apply_ssl, fullgraph=True, dynamic=False)
    ways = {"eager": whole(pixels, size), "compiled": whole(pixels, size, compiled)}
    return views_per_s(common.interleaved(ways, repeats, max(warmup, 3), "cuda"), len(pixels))


def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--size", type=utils.number(int, 1), default=32, help="side of a view, pixels")
    p.add_argument("--source", type=utils.number(int, 1), default=32, help="side of an image")
    p.add_argument("--batch-size", type=utils.number(int, 1), default=1024, help="views at a time")
    p.add_argument("--repeats", type=utils.number(int, 1), default=9, help="timed calls")
    p.add_argument("--warmup", type=utils.number(int, 0), default=2, help="calls before them")
    p.add_argument("--quick", action="store_true", help="512 views, 5 repeats")
    p.add_argument("--record", type=Path, help="where to write (default: benchmarks/records/)")
    return p


def main():
    args = parser().parse_args()
    if args.quick:
        args.batch_size, args.repeats = min(args.batch_size, 512), min(args.repeats, 5)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (args.batch_size, 3, args.source, args.source)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    kwargs = dict(size=args.size, repeats=args.repeats, warmup=args.warmup)

    rates, seconds = on_cpu(pixels, **kwargs)
    print(f"views per CPU second of one thread, {args.source} -> {args.size} pixels, "
          f"{args.batch_size} views at a time, median of {args.repeats}")
    print(f"{'':24}{'plain':>10}{'ours':>10}{'ratio':>8}")
    for part, plain in rates["plain"].items():
        ours = rates["ours"][part]
        print(f"{part:24}{plain:10.0f}{ours:10.0f}{ours / plain:8.1f}")
    record = {
        "facts": common.facts("cpu"),
        "settings": {"size": args.size, "source": args.source, "batch_size": args.batch_size,
                     "repeats": args.repeats, "warmup": args.warmup},
        "views_per_s": rates,
        "seconds": seconds,
        "table": [common.row(f"augmentation on one core, {args.source} -> {args.size} pixels",
                             "views/s", rates["plain"]["whole"], rates["ours"]["whole"])],
    }
    if torch.cuda.is_available():
        record["gpu"] = {"name": torch.cuda.get_device_name(),
                         "views_per_s": on_gpu(pixels, **kwargs)}
        print("ours on the GPU, views/s:", record["gpu"]["views_per_s"])
    print(f"written: {common.write_record('bench_augment', record, args.record)}")


if __name__ == "__main__":
    utils.program(main)
