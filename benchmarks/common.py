"""What the benchmarks share: the machine's facts, timing that waits for the device, records.

    import common

    seconds = common.interleaved({"plain": plain, "ours": ours}, repeats=9, warmup=2, device=device)
    common.write_record("bench_x", {"facts": common.facts(device), ...})

Times are wall-clock seconds of single calls. A figure that is quoted is the median of `repeats`
calls after `warmup` calls that count for nothing. Candidates are timed in turns, so that what else
the machine does meanwhile hits them alike; ratios are to be trusted further than seconds.
"""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils

RECORDS = Path(__file__).resolve().parent / "records"
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is the yardstick


def facts(device=None):
    """Describe the machine and its software.

    Args:
        device: torch.device that is measured on; None for the first visible GPU, else the CPU.

    Returns:
        dict for JSON: cpu, cores (that this process may use), torch_threads, device, gpu (where
        the device is one), versions, time (UTC).
    """
    device = utils.device() if device is None else torch.device(device)
    found = {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "device": device.type,
        "versions": utils.versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def usable_cores():
    """Count the CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_model():
    """The CPU's name as Linux knows it, else what Python's platform module says."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize(device):
    """Wait until the device has done all that it was given; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device, clock=time.perf_counter):
    """Call a function once: seconds by the clock, the device idle before and after."""
    synchronize(device)
    began = clock()
    function()
    synchronize(device)
    return clock() - began


def median_seconds(function, repeats, warmup, device):
    """Time a function.

    Args:
        function: called without arguments.
        repeats, warmup: calls that are timed, and calls before them that are not.
        device: torch.device that is waited for before and after every call.

    Returns:
        (median, list of the seconds of every timed call).
    """
    seconds = interleaved({"": function}, repeats, warmup, device)[""]
    return statistics.median(seconds), seconds


def interleaved(functions, repeats, warmup, device, clock=time.perf_counter):
    """Time several functions in turns: first, second, ..., first, second, ...

    Args:
        functions: {name: function without arguments}. repeats, warmup, device: as for
            median_seconds.
        clock: time.process_time instead measures the CPU's work where one thread does it all.

    Returns:
        {name: list of seconds, one for each of the `repeats` rounds}.
    """
    seconds = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            spent = timed(function, device, clock)
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def products(device, dtype, count=1):
    """Make the yardstick for shares: a function that multiplies two large square matrices.

    Args:
        device: torch.device. dtype: of the matrices.
        count: products a call.

    Returns:
        (function without arguments, FLOPs of a call, a multiply-add counted as two).
    """
    side = MATMUL_SIDE[torch.device(device).type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def call():
        for _ in range(count):
            a @ b

    return call, 2 * side**3 * count


def row(what, unit, plain, ours, products=None):
    """Make a row of the README's table, which a record holds in a list under "table".

    Args:
        what: is measured, with its sizes; few words.
        unit: "s" (less is better) or a rate such as "views/s" (more is better).
        plain, ours: the figure of the plain way and of ours, measured in one run.
        products: what it would be if the matrix products alone took time; None leaves it empty.
    """
    return {"what": what, "unit": unit, "plain": plain, "ours": ours, "products": products}


def write_record(name, content, path=None):
    """Write a benchmark's result as JSON, whole or not at all.

    Args:
        name: of the record; also its file, benchmarks/records/NAME.json.
        content: dict of plain types; numbers must be finite.
        path: another file to write to.

    Returns:
        Path of the file.
    """
    path = RECORDS / f"{name}.json" if path is None else Path(path)
    utils.make_folder(path.parent, "--record")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with utils.whole_file(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path
