#!/usr/bin/env python3
"""Time whole training steps of SimCLR beside the plain way: data, views, network, loss, update.

    python benchmarks/bench_step.py --fast             # ResNet-50, for a GPU; minutes
    python benchmarks/bench_step.py --quick --fast     # ResNet-18, 2 minutes of two CPU cores
    python benchmarks/bench_step.py --fast --profile   # and what the time goes into

The plain way is a DataLoader of 4 workers with torchvision's transforms on PIL images, float32 and
torch's ordinary SGD. Ours is the very step of train.py, without flags and with those given here.
All take turns; a turn is --steps steps and begins with nothing prefetched. FLOPs are those of the
network's products, forward and backward. Writes benchmarks/records/bench_step.json.
"""

import argparse
import functools
import warnings

import bench_augment
import common
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import models
import trainers
import utils
from infra import program
from trainers import Batch, Speed

MODE = trainers.TRAINING_MODES["SimCLR"]
LR_AND_MOMENTUM = {"lr": 0.01, "momentum": 0.9}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"size": (32, "side in pixels", 8), "batch_size": (512, "images a step", 2),
         "steps": (20, "of a turn, which is timed as one"), "repeats": (5, "timed turns"),
         "warmup": (2, "turns before them", 0)}
QUICK = {"arch": "resnet18", "batch_size": 32, "steps": 2, "repeats": 3, "warmup": 1}


def network_and_optimizer(arch, device, channels_last=False, fused=None):
    """A fresh network in training mode with SGD of its weights."""
    network = models.build_model(arch, MODE.head, generator=utils.generator(0, "weights"))
    network.to(device, memory_format=torch.channels_last if channels_last else None).train()
    return network, torch.optim.SGD(network.parameters(), **LR_AND_MOMENTUM, weight_decay=1e-4,
                                    fused=fused)


def our_step(images, arch, size, device, speed=Speed()):  # noqa: B008 (immutable)
    """The step of train.py."""
    network, optimizer = network_and_optimizer(
        arch, device, speed.channels_last, device.type == "cuda")
    return trainers.Step(network, optimizer, data.to(images, device), MODE, size=size,
                         mean=common.MEAN, std=common.STD, speed=speed)


def our_turn(step, batch_size, steps):
    """Function that takes some steps of ours, each on other images."""
    batches = torch.arange(batch_size * steps, device=step.device).split(batch_size)

    def turn():
        for number, index in enumerate(batches):
            step(Batch(index), 0, number, **LR_AND_MOMENTUM)

    return turn


def plain_turn(pixels, arch, size, device, batch_size):
    """Function that takes a pass over the images in the plain way."""
    from torchvision import transforms

    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker")  # as declared
    view = transforms.Compose(list(bench_augment.plain_parts(size).values()))
    loader = torch.utils.data.DataLoader(
        common.PILImages(pixels, view, MODE.views), batch_size, shuffle=True, num_workers=4,
        persistent_workers=True, pin_memory=device.type == "cuda")
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
    network = models.build_model(arch, MODE.head).to("meta")  # counted from shapes alone
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(2, 3, size, size, device="meta")).sum().backward()
    return counter.get_total_flops() / 2


def profile(turn, device):
    """Profile a turn: the ten most expensive [name, share of all kernels' time, calls]; of a GPU
    also the longest gap between two kernels, and the share of the time in which one ran."""
    turn()
    common.synchronize(device)
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA][: 1 + on_gpu]) as profiler:
        turn()
        common.synchronize(device)

    def counts(event):  # annotations span kernels and would count them twice
        of_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        return of_gpu == on_gpu and not getattr(event, "is_user_annotation", False)

    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if counts(e)]
    total = sum(getattr(e, field) for e in events)
    events.sort(key=lambda e: -getattr(e, field))
    found = {"most_expensive": [[e.key, getattr(e, field) / total, e.count] for e in events[:10]]}
    if on_gpu:
        spans = [(e.time_range.start, e.time_range.end) for e in profiler.events() if counts(e)]
        found["longest_gap_us"], found["busy_share"] = gaps(spans)
    return found


def gaps(spans):
    """(begin, end) of kernels, which may overlap -> longest time without, share of time with."""
    begin, end = torch.tensor(sorted(spans), dtype=torch.float64).T
    until = end.cummax(dim=0).values
    idle = (begin - until.roll(1)).clamp(min=0)  # before the first kernel it is 0
    return float(idle.max()), float(1 - idle.sum() / (until[-1] - begin[0]))


def variants(args, device):
    """{name: Speed} of what is timed: the plain way, ours, and ours as train.py's flags ask."""
    found = {"plain": Speed(), "ours": Speed()}
    speed = trainers.fast_speed(device) if args.fast else Speed()
    given = {key: getattr(args, key) for key in Speed._fields}
    speed = speed._replace(**{key: v for key, v in given.items() if v is not None})
    words = ["bf16"] if speed.precision == "bf16" else []
    words += [key.replace("_", "-") for key in Speed._fields[1:] if getattr(speed, key)]
    return found | ({f"ours, {' '.join(words)}": speed} if words else {})


def main(argv=None):
    p = common.parser(__doc__, **SIZES)
    p.add_argument("--arch", choices=list(models.ARCHITECTURES), default="resnet50")
    p.add_argument("--precision", choices=list(DTYPES))
    p.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction)
    p.add_argument("--fast", action="store_true", help="as train.py's")
    p.add_argument("--profile", action="store_true", help="show what the time goes into")
    args, device = common.parse_args(p, argv, QUICK), utils.device()
    torch.backends.cudnn.benchmark = True  # as train.py
    speeds = variants(args, device)

    images = common.random_images(args.batch_size * args.steps, args.size)
    steps = {name: our_step(images, args.arch, args.size, device, speed)
             for name, speed in speeds.items() if name != "plain"}
    yardsticks = {p: common.products(device, DTYPES[p], count=20)
                  for p in dict.fromkeys(speed.precision for speed in speeds.values())}
    turns = {"plain": plain_turn(images.pixels, args.arch, args.size, device, args.batch_size)}
    turns |= {name: our_turn(step, args.batch_size, args.steps) for name, step in steps.items()}
    turns |= {p: call for p, (call, _) in yardsticks.items()}
    seconds = common.interleaved(turns, args.repeats, args.warmup, device)
    median = common.medians(seconds)

    # What the machine could do at best, and the share of the views in a step
    flop = flop_per_view(args.arch, args.size)
    products = {p: flops / median[p] for p, (_, flops) in yardsticks.items()}
    where = Batch(torch.arange(args.batch_size, device=device)), 0, 0
    views = {name: functools.partial(step.views, *where) for name, step in steps.items()}
    views_s = common.medians(common.interleaved(views, 9, 3, device))

    print(f"SimCLR {args.arch}, {args.size} pixels, {args.batch_size} images a step; "
          f"{args.steps} steps a turn, {args.warmup} to warm up, median of {args.repeats}")
    print(f"{'':28}{'views/s':>10}{'GFLOP/s':>10}{'of products':>13}{'augmentation':>14}")
    what = f"SimCLR step, {args.arch}, {args.size} pixels, batch {args.batch_size}"
    results, table = {}, []
    for name, speed in speeds.items():
        step_s = median[name] / args.steps
        rate, most = MODE.views * args.batch_size / step_s, products[speed.precision] / flop
        results[name] = speed._asdict() | {
            "views_per_s": rate, "gflop_per_s": rate * flop / 1e9, "share_of_products": rate / most,
            "share_of_augmentation": None, "seconds_of_turns": seconds[name]}
        print(f"{name:28}{rate:10.1f}{rate * flop / 1e9:10.1f}{rate / most:13.1%}", end="")
        if name in steps:
            results[name]["share_of_augmentation"] = share = views_s[name] / step_s
            print(f"{share:14.2%}", end="")
            table.append(common.row(what + name.removeprefix("ours"), "views/s",
                                    results["plain"]["views_per_s"], rate, most))
        print()
    for precision, rate in products.items():
        print(f"matrix products alone, {precision}: {rate / 1e9:.1f} GFLOP/s; "
              f"{flop / 1e9:.2f} GFLOP a view")

    record = {
        "facts": common.facts(device), "gflop_per_view": flop / 1e9,
        "settings": {key: getattr(args, key) for key in ("arch", *SIZES)},
        "gflop_per_s_of_products": {p: rate / 1e9 for p, rate in products.items()},
        "results": results, "table": table,
    }
    if args.profile:
        record["profile"] = found = profile(turns[name], device)
        print(f"profile of {name}: share of all kernels' time, calls")
        for key, share, calls in found["most_expensive"]:
            print(f"  {share:6.1%} {calls:7d}  {key[:80]}")
        if device.type == "cuda":
            print(f"  a kernel ran {found['busy_share']:.1%} of the time; longest gap "
                  f"{found['longest_gap_us']:.0f} us")
    common.write_record("bench_step", record, args.record)


if __name__ == "__main__":
    program.run(main)
