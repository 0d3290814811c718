"""Trainings of several processes: what a signal, a death and an error in one of them do to all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import environment  # noqa: E402 (its folder is known only now)

TINY = ("--training-mode", "SimCLR", "--arch", "resnet18", "--size", 8, "--epochs", 2,
        "--batch-size", 10, "--lr", 0.01, "--print-freq", 1, "--normalize")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture
def start(tmp_path, tiny_npz):
    """Function (*flags, processes=..., by=...) -> a started train.py of several processes.

    `by` are the words before the command.
    """
    running = []

    def begin(*flags, processes=2, by=()):
        process = subprocess.Popen(
            [*by, sys.executable, *TORCHRUN, str(processes), ROOT / "train.py", "--dataset",
             f"npz:{tiny_npz}", *map(str, (*TINY, *flags))],
            cwd=tmp_path, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1,SIGHUP"))
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def end(process):
    """(exit status, lines of the program on stderr; torchrun has its own) of a process."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, [line for line in errors.splitlines() if "train.py: " in line[:10]]


def records(home, name="temp"):
    path = home / "results" / name / "latest_exp/log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until_a_step(home, beginning="start"):
    """Wait for a step after a record of the start, or of the resume."""
    deadline = time.monotonic() + 200
    while True:
        events = [r["event"] for r in records(home)]
        if beginning in events and "step" in events[events.index(beginning):]:
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def workers(process):
    """Process ids of the children of a process, by number."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z" and int(parent) == process.pid:
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.usefixtures("terminal")
def test_a_signal_stops_all_at_one_step_and_another_number_of_processes_goes_on(start, tmp_path):
    process = start("--epochs", 60)
    until_a_step(tmp_path)
    os.kill(workers(process)[1], signal.SIGUSR1)  # rank 1 alone hears of it
    status, said = end(process)
    assert status == 1  # torchrun's, whatever its processes say
    assert any("stopped by SIGUSR1; the same command continues" in line for line in said)
    saved = torch.load(tmp_path / "results/temp/latest_exp/checkpoint/checkpoint.pth.tar",
                       weights_only=True)["progress"]
    assert saved["processes"] == 2

    process = start("--epochs", 60, processes=3)
    until_a_step(tmp_path, "resume")
    process.send_signal(signal.SIGTERM)  # which torchrun hands on
    status, said = end(process)
    assert any("trained with processes 2 so far and goes on with 3" in line for line in said)
    assert any("stopped by SIGTERM; the same command continues" in line for line in said)
    steps = [(r["epoch"], r["step"]) for r in records(tmp_path) if r["event"] == "step"]
    assert steps == [(i // 5, i % 5) for i in range(len(steps))]  # 48 images by 10, none twice
    assert len(steps) > saved["epoch"] * 5 + saved["step"]


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--fast",)])
def test_two_processes_on_a_gpu_lose_as_one_where_batch_norm_is_synchronised(
    start, tmp_path, flags
):
    losses = {}
    for processes in (1, 2):
        status, said = end(start("--sync-bn", "--exp-name", processes, *flags,
                                 processes=processes))
        assert status == 0, said
        losses[processes] = [r["loss"] for r in records(tmp_path, str(processes))
                             if r["event"] == "step"]
    assert losses[2] == pytest.approx(losses[1], rel=0.02)


def train_with(third_step, tmp_path, tiny_npz):
    """Train by two processes that run {rank: code} before their third step."""
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train, trainers, utils
from infra import program
step, calls = trainers.Step.__call__, []
def interrupted(*args):
    calls.append(1)
    if len(calls) == 3:
        exec({third_step!r}.get(int(os.environ.get("RANK", -1)), ""))
    return step(*args)
trainers.Step.__call__ = interrupted
program.run(train.main)
""")
    return subprocess.run(
        [sys.executable, *TORCHRUN, "2", script, "--dataset", f"npz:{tiny_npz}", *map(str, TINY)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def test_the_death_of_one_process_ends_all(tmp_path, tiny_npz):
    done = train_with({1: "os.kill(os.getpid(), signal.SIGKILL)"}, tmp_path, tiny_npz)
    assert done.returncode == 1
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun says which
    assert "train.py: error: process 1" not in done.stderr


@pytest.mark.parametrize("error", ['utils.RunError("no luck")', 'KeyError("no luck")'])
def test_an_error_in_one_process_ends_all_with_its_words(tmp_path, tiny_npz, error):
    done = train_with({1: f"raise {error}"}, tmp_path, tiny_npz)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    if error.startswith("utils"):
        assert said == [f"train.py: error: process 1 of 2 on {socket.gethostname()}: no luck"]
    else:
        assert said == []
        assert "KeyError: 'no luck'" in done.stderr  # nobody foresaw it
