"""What the benchmarks share: command lines, timing that waits for the device, processes, records.

    seconds = interleaved({"plain": plain, "ours": ours}, repeats=9, warmup=2, device=device)
    write_record("bench_x", {"facts": facts(device), ...}, args.record)

Candidates are timed in turns, so that what else the machine does meanwhile affects them alike;
ratios are to be trusted further than seconds. This module puts the root on the import path.
"""

import json
import multiprocessing
import os
import platform
import re
import resource
import socket
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import utils
from infra import distributed, storage

RECORDS = Path(__file__).resolve().parent / "records"
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is the yardstick
MEAN, STD = data.DATASETS["cifar10"].mean, data.DATASETS["cifar10"].std
MIB = 2**20


def parser(doc, **sizes):
    """Make the parser of a script; sizes: flag=(default, help) or (default, help, smallest)."""
    p = utils.Parser(doc)
    p.add_argument("--record", type=Path, help="where to write (default: benchmarks/records/)")
    for name, (default, text, *low) in sizes.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=utils.number(int, *low or [1]),
                       default=default, help=text)
    return p


def parse_args(p, argv, quick):
    """Parse a command line with --quick, which stands for other defaults, {flag: value}."""
    p.add_argument("--quick", action="store_true",
                   help=", ".join(f"{name} {value}" for name, value in quick.items()))
    if utils.parse_args(p, argv).quick:
        p.set_defaults(**quick)
    return utils.parse_args(p, argv)


def facts(device):
    """Describe the machine and its software, and a device of it: a dict for JSON, time in UTC."""
    device, info = torch.device(device), Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.is_file() else "", re.M)
    found = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": usable_cores(), "torch_threads": torch.get_num_threads(),
        "device": device.type, "versions": utils.versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def usable_cores():
    """Count the CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak():
    """Return the peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def synchronize(device):
    """Wait until a device has done all that it was given; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device):
    """Return CPU time, without other programs', where one thread does it all; else wall time."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if one_thread else time.perf_counter


def interleaved(functions, repeats, warmup, device, clock=time.perf_counter):
    """Time functions in turns, after warm-up rounds that do not count, the device idle before and
    after every call: {name: function without arguments} -> {name: list of seconds [repeats]}.
    """
    seconds = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            synchronize(device)
            began = clock()
            function()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(clock() - began)
    return seconds


def medians(seconds):
    """{name: list of seconds} -> {name: their median}."""
    return {name: statistics.median(s) for name, s in seconds.items()}


def repeated(function, count):
    """Return a function that calls another one so many times."""
    def call():
        for _ in range(count):
            function()

    return call


def products(device, dtype, count):
    """Return a function that makes some products of large square matrices, and its FLOPs."""
    side = MATMUL_SIDE[torch.device(device).type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return repeated(lambda: a @ b, count), 2 * side**3 * count


def random_images(n, size):
    """Make a set of n random images; what is measured does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return data.ImageSet("random", pixels, torch.zeros(n, dtype=torch.int64))


class PILImages(torch.utils.data.Dataset):
    """The plain way's images: uint8 [N, 3, H, W] -> `views` transformed PIL images of each."""

    def __init__(self, pixels, transform, views=1):
        self._pixels = pixels.permute(0, 2, 3, 1).numpy()
        self._transform, self._views = transform, views

    def __len__(self):
        return len(self._pixels)

    def __getitem__(self, i):
        from PIL import Image

        image = Image.fromarray(self._pixels[i])
        return [self._transform(image) for _ in range(self._views)]


def in_own_process(function, *arguments, threads=None, processes=1):
    """Call a function in a fresh process on the CPU, whose peak of memory is its own, or in a
    group of them with so many threads each; returns what it returned in the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"WORLD_SIZE": processes, "MASTER_PORT": free.getsockname()[1]}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        calls = [pool.submit(_call, group | {"RANK": rank}, threads, function, arguments)
                 for rank in range(processes)]
        try:
            return calls[0].result()
        except BrokenProcessPool:
            raise utils.RunError(f"a process of {function.__name__}{arguments} died") from None


def _call(group, threads, function, arguments):
    """Call a function as one process of a group."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in group.items()}
    if threads:
        torch.set_num_threads(threads)
    distributed.start()
    found = function(*arguments)
    distributed.shutdown()
    return found


def row(what, unit, plain, ours, products=None):
    """Make a row of the table in docs/costs.md, of which a record holds a list under "table".

    unit: "s" or a rate. products: what it were if matrix products alone took time, if known.
    """
    return {"what": what, "unit": unit, "plain": plain, "ours": ours, "products": products}


def write_record(name, content, path=None):
    """Write a result, finite numbers and plain types, to a path or to records/NAME.json."""
    path = path or RECORDS / f"{name}.json"
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    storage.make_output_folder(path.parent, "--record")
    with storage.atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"written: {path}")
