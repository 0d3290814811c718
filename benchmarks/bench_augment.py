#!/usr/bin/env python3
"""Time the "ssl" augmentation beside torchvision's PIL pipeline, on one thread of the CPU.

    python benchmarks/bench_augment.py           # a minute
    python benchmarks/bench_augment.py --quick   # seconds

The plain way is the original's transforms on each PIL image, without the cost of worker processes.
Ours takes all images as one uint8 tensor; sampling the random numbers is counted. Both ways take
turns, and so do their parts. Views/s of a core are counted in CPU time: what other processes take
of it is left out. Expect 7 times the plain way's at 32 pixels. Where torch sees a GPU, ours is
timed there too, as it is and compiled. Writes benchmarks/records/bench_augment.json.
"""

import functools
import itertools
import time

import common
import torch

import augment
from infra import program

SIZES = {"size": (32, "side of a view, pixels"), "source": (32, "side of an image"),
         "batch_size": (1024, "views at a time"), "repeats": (9, "timed calls"),
         "warmup": (2, "calls before them", 0)}
MEAN, STD = torch.tensor(common.MEAN), torch.tensor(common.STD)
QUICK = {"batch_size": 512, "repeats": 5}


def plain_parts(size):
    """The plain pipeline of one PIL image in three parts: {name: transform}."""
    from torchvision import transforms as t

    crop = t.RandomResizedCrop(size, augment.CROP_SCALE, augment.CROP_RATIO)
    jitter = t.RandomApply([t.ColorJitter(*augment.STRENGTH)], augment.JITTER)
    return {
        "crop, resize, flip": t.Compose([crop, t.RandomHorizontalFlip(augment.FLIP)]),
        "colours, grey": t.Compose([jitter, t.RandomGrayscale(augment.GRAYSCALE)]),
        "to tensor, normalise": t.Compose([t.ToTensor(), t.Normalize(MEAN, STD)]),
    }


def our_parts(p, size):
    """Our augmentation in the same parts, for pixels that the parameters p are of."""
    return {
        "crop, resize, flip": lambda x: augment.resized_crop(x, p.box, p.flip, size),
        "colours, grey": lambda x: augment.grayscale(
            augment.color_jitter(x.clone(), p.jitter, p.order, p.factor), p.gray),
        "to tensor, normalise": lambda x: augment.normalize(x.clone(), MEAN, STD),
    }


def chained(parts, x):
    """{part: function without arguments}, each working on what the part before it returned."""
    inputs = itertools.accumulate(parts.values(), lambda x, part: part(x), initial=x)
    return {name: functools.partial(parts[name], x) for name, x in zip(parts, inputs)}  # noqa: B905


def whole(pixels, size, apply=augment.apply_ssl):
    """Function that samples for a batch and augments it, as a training step does."""
    mean, std = MEAN.to(pixels.device), STD.to(pixels.device)
    generator = torch.Generator().manual_seed(0)

    def call():
        params = augment.sample_views(
            "ssl", 1, len(pixels), slice(None), *pixels.shape[2:], generator)
        return apply(pixels, augment.to(params, pixels.device), size, mean, std)

    return call


def views_per_s(seconds, views):
    return {name: round(views / s, 1) for name, s in common.medians(seconds).items()}


def on_cpu(pixels, size, repeats, warmup):
    """Both ways on one thread: {way: {part or "whole": views/s}}, {way: seconds of the whole}."""
    from PIL import Image

    # What a network's activations do in training: once such a block has been freed, the C library
    # keeps freed memory, and tensors no longer pay for new pages from the system.
    torch.empty(28 * 2**20, dtype=torch.uint8).fill_(0)
    images = [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    plain = {name: lambda images, part=part: [part(image) for image in images]
             for name, part in plain_parts(size).items()}
    measure = functools.partial(common.interleaved, repeats=repeats, warmup=warmup, device="cpu",
                                clock=time.process_time)
    # The parts of ours are timed on as many images as the whole works on at a time.
    few = pixels[: max(1, augment.CHUNK // size**2)]
    params = augment.sample_views("ssl", 1, len(few), slice(None), *few.shape[2:],
                                  torch.Generator().manual_seed(0))
    parts = {"plain": views_per_s(measure(chained(plain, images)), len(images)),
             "ours": views_per_s(measure(chained(our_parts(params, size), few)), len(few))}
    seconds = measure({
        "plain": lambda: torch.stack(functools.reduce(lambda x, f: f(x), plain.values(), images)),
        "ours": whole(pixels, size)})
    rates = views_per_s(seconds, len(pixels))
    return {way: parts[way] | {"whole": rates[way]} for way in parts}, seconds


def main(argv=None):
    args = common.parse_args(common.parser(__doc__, **SIZES), argv, QUICK)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = common.random_images(args.batch_size, args.source).pixels

    rates, seconds = on_cpu(pixels, args.size, args.repeats, args.warmup)
    print(f"views per CPU second of one thread, {args.source} -> {args.size} pixels, "
          f"{args.batch_size} views at a time, median of {args.repeats}")
    print(f"{'':24}{'plain':>10}{'ours':>10}{'ratio':>8}")
    for part, plain in rates["plain"].items():
        ours = rates["ours"][part]
        print(f"{part:24}{plain:10.0f}{ours:10.0f}{ours / plain:8.1f}")
    record = {
        "facts": common.facts("cpu"), "settings": {key: getattr(args, key) for key in SIZES},
        "views_per_s": rates, "seconds": seconds,
        "table": [common.row(f"augmentation on one core, {args.source} -> {args.size} pixels",
                             "views/s", rates["plain"]["whole"], rates["ours"]["whole"])],
    }
    if torch.cuda.is_available():
        pixels = pixels.cuda()
        compiled = torch.compile(augment.apply_ssl, fullgraph=True, dynamic=False)
        ways = {"eager": whole(pixels, args.size), "compiled": whole(pixels, args.size, compiled)}
        found = common.interleaved(ways, args.repeats, max(args.warmup, 3), "cuda")
        record["gpu"] = {"name": torch.cuda.get_device_name(),
                         "views_per_s": views_per_s(found, len(pixels))}
        print("ours on the GPU, views/s:", record["gpu"]["views_per_s"])
    common.write_record("bench_augment", record, args.record)


if __name__ == "__main__":
    program.run(main)
