#!/usr/bin/env python3
"""Time whole training steps of SimCLR beside the plain way: data, views, network, loss, update.

    python benchmarks/bench_step.py --fast             # ResNet-50, for a GPU; minutes
    python benchmarks/bench_step.py --quick --fast     # ResNet-18, 2 minutes of two CPU cores
    python benchmarks/bench_step.py --fast --profile   # and what the time goes into

The plain way is a DataLoader of 4 workers with torchvision's transforms on PIL images, float32 and
torch's ordinary SGD. Ours is the very step of train.py, without flags, and with the flags given
here if there are any. All take turns; a turn is --steps steps after which the device is waited
for, and begins with nothing prefetched. FLOPs are those of the network's products, forward and
backward, a multiply-add counted as two. Writes benchmarks/records/bench_step.json.
"""

import argparse
import statistics
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_augment
import common

import data
import losses
import models
import trainers
import utils

MODE = trainers.MODES["SimCLR"]
RATES = {"lr": 0.01, "momentum": 0.9}
PLAIN = {"precision": "fp32", "channels_last": False, "compile": False}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORKERS = 4
QUICK = {"arch": "resnet18", "batch_size": 32, "steps": 2, "repeats": 3, "warmup": 1}


def network_and_optimizer(arch, device, channels_last=False, **kwargs):
    """A fresh network in training mode with SGD of its weights."""
    network = models.build_model(arch, "SimCLR", generator=utils.generator(0, "weights"))
    layout = torch.channels_last if channels_last else torch.preserve_format
    network.to(device, memory_format=layout).train()
    return network, torch.optim.SGD(network.parameters(), **RATES, weight_decay=1e-4, **kwargs)


def our_step(pixels, arch, size, device, settings):
    """The step of train.py: function (index, epoch, step, lr, momentum)."""
    images = data.ImageSet("random", pixels, torch.zeros(len(pixels), dtype=torch.int64))
    network, optimizer = network_and_optimizer(
        arch, device, settings["channels_last"], fused=device.type == "cuda"
    )
    return trainers.Step(
        network, optimizer, data.to(images, device), MODE, size=size, mean=bench_augment.MEAN,
        std=bench_augment.STD, **settings,
    )


def our_turn(step, batch_size, steps):
    """Function that takes some steps of ours, each on other images."""
    batches = torch.arange(batch_size * steps, device=step.images.labels.device).split(batch_size)

    def turn():
        for number, index in enumerate(batches):
            step(index, 0, number, **RATES)

    return turn


class PlainImages(torch.utils.data.Dataset):
    """PIL images, each of which gives as many views as the mode asks for."""

    def __init__(self, pixels, size):
        from PIL import Image
        from torchvision import transforms

        self._images = [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).numpy()]
        self._view = transforms.Compose(list(bench_augment.plain_parts(size).values()))

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return [self._view(self._images[i]) for _ in range(MODE.views)]


def plain_turn(pixels, arch, size, device, batch_size):
    """Function that takes a pass over the images in the plain way."""
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker")  # as declared
    loader = torch.utils.data.DataLoader(
        PlainImages(pixels, size), batch_size, shuffle=True, num_workers=WORKERS,
        persistent_workers=True, pin_memory=device.type == "cuda",
    )
    network, optimizer = network_and_optimizer(arch, device)
    criterion = losses.SupConLoss()

    def turn():
        for views in loader:
            x = torch.cat(views).to(device, non_blocking=True)
            out = network(x).unflatten(0, (MODE.views, -1)).transpose(0, 1)
            optimizer.zero_grad()
            criterion(out).backward()
            optimizer.step()

    return turn


def flop_per_view(arch, size):
    """FLOPs of the network's products for one view, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    network = models.build_model(arch, "SimCLR").to("meta")  # counted from shapes alone
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.empty(2, 3, size, size, device="meta")).sum().backward()
    return counter.get_total_flops() / 2


def profile(step, batch_size, steps, device):
    """Profile some steps: the ten most expensive kernels or operations, and the longest pause.

    Returns:
        dict: "most_expensive", a list of [name, share of all kernels' time, calls]; on a GPU
        "busy_share", of the time from the first kernel to the last, and "longest_gap_us".
    """
    turn = our_turn(step, batch_size, steps)
    turn()
    common.synchronize(device)
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=kinds) as profiler:
        turn()
        common.synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU

    def counts(event):  # annotations span kernels and would count them twice
        return event.device_type == wanted and not getattr(event, "is_user_annotation", False)

    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [(e.key, getattr(e, field), e.count) for e in profiler.key_averages() if counts(e)]
    rows.sort(key=lambda r: -r[1])
    total = sum(r[1] for r in rows)
    found = {"most_expensive": [[key, t / total, count] for key, t, count in rows[:10]]}
    if on_gpu:
        spans = [(e.time_range.start, e.time_range.end) for e in profiler.events() if counts(e)]
        found["longest_gap_us"], found["busy_share"] = gaps(spans)
    return found


def gaps(spans):
    """(begin, end) of kernels -> longest time in which none ran, share of time in which one did.

    The time counts from the first begin to the last end; kernels may overlap.
    """
    spans = sorted(spans)
    until, idle, longest = spans[0][1], 0, 0
    for begin, end in spans:
        gap = max(0, begin - until)
        idle, longest, until = idle + gap, max(longest, gap), max(until, end)
    return longest, 1 - idle / (until - spans[0][0])


def speed_settings(args, device):
    """What train.py would do with these flags: {precision, channels_last, compile}."""
    base = trainers.fast_settings(device) if args.fast else PLAIN
    given = {key: getattr(args, key) for key in PLAIN}
    return {key: base[key] if value is None else value for key, value in given.items()}


def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    whole = utils.number(int, 1)
    p.add_argument("--arch", choices=list(models.ARCHITECTURES), default="resnet50")
    p.add_argument("--size", type=utils.number(int, 8), default=32, help="side in pixels")
    p.add_argument("--batch-size", type=utils.number(int, 2), default=512, help="images a step")
    p.add_argument("--steps", type=whole, default=20, help="of a turn, which is timed as one")
    p.add_argument("--repeats", type=whole, default=5, help="timed turns")
    p.add_argument("--warmup", type=utils.number(int, 0), default=2, help="turns before them")
    p.add_argument("--precision", choices=list(DTYPES))
    p.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction)
    p.add_argument("--fast", action="store_true", help="as train.py's")
    p.add_argument("--profile", action="store_true", help="show what the time goes into")
    p.add_argument("--quick", action="store_true", help="sizes for a CPU: "
                   + ", ".join(f"{key} {value}" for key, value in QUICK.items()))
    p.add_argument("--record", type=Path, help="where to write (default: benchmarks/records/)")
    return p


def main():
    args = parser().parse_args()
    if args.quick:
        vars(args).update(QUICK)
    device = utils.device()
    torch.backends.cudnn.benchmark = True  # as train.py
    variants = {"ours": PLAIN}
    settings = speed_settings(args, device)
    if settings != PLAIN:
        name = ["bf16"] if settings["precision"] == "bf16" else []
        name += [key.replace("_", "-") for key in ("channels_last", "compile") if settings[key]]
        variants[f"ours, {' '.join(name)}"] = settings

    # Random images of the size of the views: speed does not depend on what they show
    n = args.batch_size * args.steps
    pixels = torch.randint(256, (n, 3, args.size, args.size), dtype=torch.uint8)
    steps = {name: our_step(pixels, args.arch, args.size, device, how)
             for name, how in variants.items()}
    turns = {"plain": plain_turn(pixels, args.arch, args.size, device, args.batch_size)}
    turns |= {name: our_turn(step, args.batch_size, args.steps) for name, step in steps.items()}
    variants = {"plain": PLAIN} | variants
    yardsticks = {p: common.products(device, DTYPES[p], count=20)
                  for p in dict.fromkeys(how["precision"] for how in variants.values())}
    turns |= {f"products {p}": call for p, (call, _) in yardsticks.items()}
    seconds = common.interleaved(turns, args.repeats, args.warmup, device)

    # What the machine could do at best, and the share of the views in a step
    flop = flop_per_view(args.arch, args.size)
    products = {p: flops / statistics.median(seconds[f"products {p}"])
                for p, (_, flops) in yardsticks.items()}
    batch = pixels[: args.batch_size].to(device)
    views_s = {
        name: common.median_seconds(lambda step=step: step.views(batch, 0, 0), 9, 3, device)[0]
        for name, step in steps.items()
    }
    print(f"SimCLR {args.arch}, {args.size} pixels, {args.batch_size} images a step; "
          f"{args.steps} steps a turn, {args.warmup} to warm up, median of {args.repeats}")
    print(f"{'':28}{'views/s':>10}{'GFLOP/s':>10}{'of products':>13}{'augmentation':>14}")
    results, table = {}, []
    what = f"SimCLR step, {args.arch}, {args.size} pixels, batch {args.batch_size}"
    for name, how in variants.items():
        step_s = statistics.median(seconds[name]) / args.steps
        rate = MODE.views * args.batch_size / step_s
        most = products[how["precision"]] / flop
        share = views_s[name] / step_s if name in views_s else None
        results[name] = how | {
            "views_per_s": rate, "gflop_per_s": rate * flop / 1e9, "share_of_products": rate / most,
            "share_of_augmentation": share, "seconds_of_turns": seconds[name],
        }
        print(f"{name:28}{rate:10.1f}{rate * flop / 1e9:10.1f}{rate / most:13.1%}"
              + (f"{share:14.2%}" if share is not None else ""))
        if name != "plain":
            plain = results["plain"]["views_per_s"]
            table.append(common.row(what + name.removeprefix("ours"), "views/s", plain, rate, most))
    for precision, rate in products.items():
        print(f"matrix products alone, {precision}: {rate / 1e9:.1f} GFLOP/s; "
              f"{flop / 1e9:.2f} GFLOP a view")

    record = {
        "facts": common.facts(device),
        "settings": {key: getattr(args, key) for key in
                     ("arch", "size", "batch_size", "steps", "repeats", "warmup")},
        "gflop_per_view": flop / 1e9,
        "gflop_per_s_of_products": {p: rate / 1e9 for p, rate in products.items()},
        "results": results,
        "table": table,
    }
    if args.profile:
        name, step = list(steps.items())[-1]
        record["profile"] = found = profile(step, args.batch_size, args.steps, device)
        print(f"profile of {name}: share of all kernels' time, calls")
        for key, share, calls in found["most_expensive"]:
            print(f"  {share:6.1%} {calls:7d}  {key[:80]}")
        if "longest_gap_us" in found:
            print(f"  a kernel ran {found['busy_share']:.1%} of the time; longest gap "
                  f"{found['longest_gap_us']:.0f} us")
    print(f"written: {common.write_record('bench_step', record, args.record)}")


if __name__ == "__main__":
    utils.program(main)
