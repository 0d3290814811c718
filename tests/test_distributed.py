"""Many processes: exactly what one computes, one voice, and an end together."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from conftest import ROOT, environment
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

import distributed

TINY = ("--arch", "resnet18", "--size", 8, "--epochs", 2, "--batch-size", 10, "--lr", 0.01,
        "--print-freq", 1, "--normalize")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{world: {case: {name: tensor}}} of 1, 2 and 3 processes, see ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (1, 2, 3):
        words = [*TORCHRUN, str(world)] if world > 1 else []
        done = subprocess.run(
            [sys.executable, *words, str(ROOT / "tests/ranks.py"), str(folder)],
            env=environment(), capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    return {world: torch.load(folder / f"{world}.pt", weights_only=True) for world in (1, 2, 3)}


def relative_error(ours, expected):
    """Of a tensor: the largest error against its largest value, or as it is where that is 0."""
    return float((ours - expected).abs().max()) / (float(expected.abs().max()) or 1)


CASES = [f"{mode}, {norm}" for mode, norm in (
    ("SimCLR", "plain"), ("SimCLR", "frozen"), ("SupCon", "plain"), ("SupCon", "frozen"),
    ("SupCE", "plain"), ("SimCLR", "synced"), ("SupCE", "synced"))]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_final_weights_are_those_of_one_process(results, world, case):
    ours, expected = results[world][case], results[1][case]
    assert len(ours["losses"]) == ranks.STEPS * ranks.EPOCHS
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("loss", ["SimCLR", "SupCon"])
@pytest.mark.parametrize("n", [2, 11])
def test_gathered_loss_and_gradient_are_those_of_one_process(results, world, loss, n):
    ours, expected = (results[w][f"contrast of {n}, {loss}"] for w in (world, 1))
    assert expected["gradient"].shape == (n, 2, 16)
    for name in ("loss", "gradient"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-14)


def test_a_run_of_two_processes_goes_on_with_three_as_if_nothing_had_been(results):
    ours, expected = results[3]["SimCLR, frozen, resumed"], results[1]["SimCLR, frozen"]
    done = ranks.BROKEN_AT[0] * ranks.STEPS + ranks.BROKEN_AT[1]
    torch.testing.assert_close(ours["losses"], expected["losses"][done:], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["means"], expected["means"][1:], rtol=1e-6, atol=0)
    for name in expected.keys() - {"losses", "means"}:
        assert relative_error(ours[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_over_all_takes_bfloat16(results, world):
    ours, expected = results[world]["bfloat16"], results[1]["bfloat16"]
    torch.testing.assert_close(ours["out"], expected["out"], rtol=0.01, atol=0.01)
    torch.testing.assert_close(ours["variance"], expected["variance"], rtol=0.01, atol=0)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("mode", ["SimCLR", "SupCE"])
def test_processes_watch_together_and_measure_the_network_of_rank_0(results, world, mode):
    ours, expected = (results[w][f"monitor of {mode}"] for w in (world, 1))
    assert 0 < expected["score"] < 1
    assert ours["score"] == expected["score"]
    assert torch.equal(ours["statistics"], torch.zeros(64))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 11, 512])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_a_partition_and_differ_by_one_at_most(n, world):
    shares = [distributed._share(n, rank, world) for rank in range(world)]
    assert [i for s in shares for i in range(n)[s]] == list(range(n))
    sizes = [s.stop - s.start for s in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # rank 0 has an image whenever there is one


def test_a_single_process_needs_no_group():
    x = torch.arange(6.0).view(3, 2)
    assert distributed.gather(x, 3) is x
    assert torch.equal(distributed.total(x), x)
    assert distributed.total(x) is not x
    assert distributed.from_lead("a") == "a"
    assert distributed.everyones("a") == ["a"]
    agreement = distributed.Agreement()
    assert [agreement.hear(v) for v in (0, 15, 0)] == [0, 15, 0]
    assert agreement.now(10) == 10
    distributed.barrier()


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, tiny_npz):
    """Function (*flags, several=..., by=..., **variables) -> a started train.py that starts some.

    `by` are the words before the command.
    """
    running = []

    def begin(*flags, several=2, by=(), **variables):
        process = subprocess.Popen(
            [*by, sys.executable, "-u", ROOT / "train.py", "--dataset", f"npz:{tiny_npz}",
             *map(str, (*TINY, *flags))],
            cwd=tmp_path, env=environment(PET_NPROC_PER_NODE=several, **variables), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def temporary(tmp_path):
    """A folder in place of /tmp, where no launcher is to leave its logs."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def end(process):
    """(exit status, lines of stderr) of a process."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, [line for line in errors.splitlines() if "it/s]" not in line]


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
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return sorted(pid for pid in pids if is_alive(pid, of=process.pid))


def is_alive(pid, of=None):
    """Tell whether a process, of a parent if one is named, is there and has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return stat[0] != "Z" and of in (None, int(stat[1]))


@pytest.mark.usefixtures("terminal")
def test_a_signal_stops_all_at_one_step_and_another_number_of_processes_goes_on(start, tmp_path):
    process = start("--epochs", 60)
    until_a_step(tmp_path)
    os.kill(workers(process)[1], signal.SIGUSR1)  # rank 1 alone hears of it
    status, errors = end(process)
    assert status == 75
    assert len(errors) == 1
    assert "stopped by SIGUSR1; the same command continues" in errors[0]
    saved = torch.load(tmp_path / "results/temp/latest_exp/checkpoint/checkpoint.pth.tar",
                       weights_only=True)["progress"]
    assert saved["processes"] == 2

    process = start("--epochs", 60, several=3)
    until_a_step(tmp_path, "resume")
    process.send_signal(signal.SIGHUP)  # a terminal that is closed; the launcher hands it on
    status, errors = end(process)
    assert status == 75
    assert any("trained with processes 2 so far and goes on with 3" in e for e in errors)
    steps = [(r["epoch"], r["step"]) for r in records(tmp_path) if r["event"] == "step"]
    assert steps == [(i // 5, i % 5) for i in range(len(steps))]  # 48 images by 10, none twice
    assert len(steps) > saved["epoch"] * 5 + saved["step"]


@pytest.mark.usefixtures("terminal")
def test_nohup_keeps_processes_from_a_terminal_that_is_closed(start, tmp_path, temporary):
    process = start("--epochs", 4, by=["nohup"], TMPDIR=temporary)
    until_a_step(tmp_path)
    assert all(os.getsid(pid) == pid for pid in workers(process))  # they have no terminal
    process.send_signal(signal.SIGHUP)
    status, errors = end(process)
    assert (status, errors) == (0, [])
    assert not list(temporary.glob("torchelastic_*"))


def test_the_death_of_one_process_ends_all_with_its_name(start, tmp_path, temporary):
    process = start("--epochs", 60, TMPDIR=temporary)
    until_a_step(tmp_path)
    victim = workers(process)[1]
    os.kill(victim, signal.SIGKILL)
    status, errors = end(process)
    assert status == 1
    assert len(errors) == 1
    assert f"error: process 1 (pid {victim} on {socket.gethostname()}) was ended by SIGKILL" \
        in errors[0]
    assert not list(temporary.glob("torchelastic_*"))


def test_processes_whose_launcher_is_killed_save_and_end(start, tmp_path):
    process = start("--epochs", 60)
    until_a_step(tmp_path)
    left = workers(process)
    process.kill()
    assert "stopped by SIGTERM; the same command continues" in end(process)[1][0]
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in left):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (tmp_path / "results/temp/latest_exp/checkpoint/checkpoint.pth.tar").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--fast",)])
def test_two_processes_on_a_gpu_lose_as_one_where_batch_norm_is_synchronised(
    start, tmp_path, flags
):
    losses = {}
    for several in (1, 2):
        status, errors = end(start("--sync-bn", "--exp-name", several, *flags, several=several))
        assert status == 0, errors
        losses[several] = [r["loss"] for r in records(tmp_path, str(several))
                           if r["event"] == "step"]
    assert losses[2] == pytest.approx(losses[1], rel=0.02)


def train_with(third_step, tmp_path, tiny_npz):
    """Train by two processes that run {rank: code} before their third step."""
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train, trainers, utils
step, calls = trainers.Step.__call__, []
def interrupted(*args):
    calls.append(1)
    if len(calls) == 3:
        exec({third_step!r}.get(int(os.environ.get("RANK", -1)), ""))
    return step(*args)
trainers.Step.__call__ = interrupted
utils.program(train.main)
""")
    return subprocess.run(
        [sys.executable, script, "--dataset", f"npz:{tiny_npz}", *map(str, TINY)], cwd=tmp_path,
        env=environment(PET_NPROC_PER_NODE=2), capture_output=True, text=True, timeout=300,
        check=False)


def test_the_death_of_a_process_is_told_though_another_was_busy_when_it_was_ended(
    tmp_path, tiny_npz
):
    done = train_with({0: "time.sleep(4)", 1: "os.kill(os.getpid(), signal.SIGKILL)"},
                      tmp_path, tiny_npz)
    assert done.returncode == 1
    assert re.fullmatch(r"train\.py: error: process 1 \(pid \d+ on \S+\) was ended by SIGKILL; "
                        r"the others were stopped\n", done.stderr)


@pytest.mark.parametrize("error", ['utils.RunError("no luck")', 'KeyError("no luck")'])
def test_an_error_in_one_process_ends_all_with_its_words(tmp_path, tiny_npz, error):
    done = train_with({1: f"raise {error}"}, tmp_path, tiny_npz)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    if error.startswith("utils"):
        assert lines == [f"train.py: error: process 1 of 2 on {socket.gethostname()}: no luck"]
    else:
        assert done.stderr.count("Traceback") == 1  # nobody foresaw it
        assert lines[-1].endswith("KeyError: 'no luck'")


@pytest.mark.parametrize(("flags", "message"), [
    (("--batch-size", 2), "--batch-size 2 with 48 training images: 3 processes need at least an "
                          "image each a step"),
    (("--training-mode", "SupCE", "--batch-size", 5), "leaves a step of 1 image of 48 for one of 3 "
                                                      "processes"),
    (("--ckpt", "missing"), "--ckpt missing: no such file"),
])
def test_what_is_wrong_everywhere_is_said_once(start, flags, message):
    status, errors = end(start(*flags, several=3))
    assert status == 2
    assert len(errors) == 1
    assert message in errors[0]


def test_a_loss_that_is_not_finite_is_said_once(start, tmp_path):
    status, errors = end(start("--lr", "1e25", "--weight-decay", "1e25"))
    assert status == 1
    assert len(errors) == 1
    assert "the loss is nan at epoch 0" in errors[0] or "not finite" in errors[0]
    assert len(list((tmp_path / "results/temp").glob("1--*"))) == 1


def free_port():
    """A port that is free, below those that the system gives to others meanwhile."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def test_processes_with_other_arguments_are_refused_by_the_flag(start):
    meeting = dict(PET_NNODES=2, PET_RDZV_ENDPOINT=f"localhost:{free_port()}", several=1)
    ended = [end(p) for p in [start(**meeting), start("--momentum", 0.8, **meeting)]]
    assert [status for status, _ in ended] == [2, 2]
    errors = [line for _, lines in ended for line in lines]
    assert len(errors) == 1
    assert "--momentum is 0." in errors[0]
    assert "in process 0" in errors[0]
    assert "in process 1" in errors[0]


def test_a_first_node_that_ends_before_the_others_came_is_one_line(start):
    port = free_port()
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    keys = store.num_keys()
    second = start(PET_NNODES=2, PET_RDZV_ENDPOINT=f"localhost:{port}",
                   PET_RDZV_CONF="is_host=0", several=1)
    deadline = time.monotonic() + 120
    while store.num_keys() == keys and time.monotonic() < deadline:
        time.sleep(0.1)
    del store
    status, errors = end(second)
    assert (status, len(errors)) == (1, 1), errors
    assert f"no meeting of the nodes at localhost:{port}" in errors[0]


def test_a_meeting_that_was_closed_is_one_line(start):
    port = free_port()
    store = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    DynamicRendezvousHandler.from_backend(
        "none", store, C10dRendezvousBackend(store, "none"), min_nodes=2, max_nodes=2,
    ).set_closed()
    status, errors = end(start(PET_NNODES=2, PET_RDZV_ENDPOINT=f"localhost:{port}",
                               PET_RDZV_CONF="is_host=0", several=1))
    assert (status, len(errors)) == (1, 1), errors
    assert errors[0].endswith("the first node does not answer or has ended (closed)")


def test_a_missing_machine_and_a_port_in_use_are_one_line_each(start):
    port = free_port()
    meeting = dict(PET_NNODES=2, PET_RDZV_ENDPOINT=f"localhost:{port}", several=1)
    status, errors = end(start(PET_RDZV_CONF="join_timeout=2", **meeting))
    assert (status, len(errors)) == (1, 1)
    assert f"not all of the 2 nodes came to localhost:{port} in time" in errors[0]
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        status, errors = end(start(PET_RDZV_CONF="is_host=1,join_timeout=2", **meeting))
    assert (status, len(errors)) == (1, 1)
    assert f"no meeting of the nodes at localhost:{port}: the port is in use" in errors[0]


def test_under_torchrun_one_process_speaks_and_a_wrong_flag_is_said_once(tmp_path, tiny_npz):
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", ROOT / "train.py", "--dataset", f"npz:{tiny_npz}",
         "--lr", "fast"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    # rank 0, or another one that came to it half a second before
    assert len(re.findall(r"train\.py: error: (process \d of 2 on \S+: )?argument --lr",
                          done.stderr)) == 1
