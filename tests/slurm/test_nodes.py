"""Training on several nodes: slurm/train_nodes.sbatch, and two hosts that lose each other.

`make test-slurm` runs them. The hosts are namespaces of this machine (hosts.py).
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_slurm import CHECKPOINT, ON_CPU, TRAIN, run_folders, wait_for_text

TINY = (*TRAIN, "--epochs", 5, "--save-steps", 3)
KEEPS_TRYING = 3  # times that a host resends what is not acknowledged; Linux's 15 take 15 minutes


@pytest.fixture(scope="module")
def jobs(slurm, submit, slurm_of_two, submit_to_two, home):
    """Jobs of two processes each that were broken off: (their Slurm, number, log), by name."""

    def job(cluster, number):
        return cluster, number, home / f"slurm/logs/train-{number}.log"

    found = {
        "processes": job(slurm, submit(
            (*ON_CPU, "--nodes=1", "--hold"), "train_nodes", *TINY, "--exp-name", "processes",
            env={"PROCESSES": "2"})),
        "nodes": job(slurm_of_two, submit_to_two(
            ON_CPU, "train_nodes", *TINY, "--exp-name", "nodes")),
    }
    _, number, log = found["nodes"]
    wait_for_text(slurm_of_two, log, "Epoch 0,", 1)
    slurm_of_two.command("scancel", "--batch", "--signal=USR1", number)  # as at the time limit
    _, number, log = found["processes"]
    with socket.create_server(("", 10000 + int(number) % 20000)):  # the port that it would take
        slurm.command("scontrol", "release", number)
        wait_for_text(slurm, log, "Epoch 0,", 1)
    slurm.command("scontrol", "requeue", number)
    return found


@pytest.fixture(scope="module")
def unbroken(jobs, home):
    """The checkpoint of the same training by two processes without Slurm."""
    done = train(home, *TINY, "--exp-name", "unbroken_2", PET_NPROC_PER_NODE=2)
    _, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    return torch.load(home / "results/unbroken_2" / CHECKPOINT, weights_only=True)


def train(home, *arguments, host=(), **variables):
    """Start train.py on a host; `variables` go into its environment."""
    return subprocess.Popen(
        [*host, sys.executable, "-u", "train.py", *map(str, arguments)], cwd=home, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | {k: str(v) for k, v in variables.items()},
    )


@pytest.mark.parametrize("name", ["processes", "nodes"])
def test_two_end_with_the_weights_of_an_unbroken_training_although_they_were_stopped_as(
    name, jobs, home, unbroken
):
    cluster, number, log = jobs[name]
    job = cluster.wait(number)
    assert job["JobState"] == "COMPLETED", log.read_text()
    assert int(job["Restarts"]) >= 1
    assert len(run_folders(home, name)) == 1
    state = torch.load(home / "results" / name / CHECKPOINT, weights_only=True)
    assert state["epoch"] == unbroken["epoch"] == 5
    assert state["progress"]["processes"] == unbroken["progress"]["processes"] == 2
    for key, value in unbroken["state_dict"].items():
        assert torch.equal(state["state_dict"][key], value), key


def test_the_signal_before_the_time_limit_stops_all_nodes_and_requeues_the_job(jobs):
    cluster, number, log = jobs["nodes"]
    cluster.wait(number)
    text = log.read_text()
    assert f"train {number}: start 1 on alpha,beta: " in text
    assert "stopped for the time limit with exit status 75; to be requeued" in text
    assert "[c10d]" not in text


def test_a_node_that_loses_its_launcher_ends_the_job_and_nothing_is_lost(
    jobs, slurm_of_two, submit_to_two, home
):
    arguments = (ON_CPU, "train_nodes", *TINY, "--exp-name", "killed")
    number = submit_to_two(*arguments)
    log = home / f"slurm/logs/train-{number}.log"
    wait_for_text(slurm_of_two, log, "Epoch 0,", 1)
    os.kill(launcher(number, "beta"), signal.SIGKILL)
    assert slurm_of_two.wait(number, 150)["JobState"] == "FAILED", log.read_text()
    assert "Traceback" not in log.read_text()
    number = submit_to_two(*arguments)
    assert slurm_of_two.wait(number, 150)["JobState"] == "COMPLETED"
    log = (home / f"slurm/logs/train-{number}.log").read_text()
    assert re.search(r"continued: [1-5] of 5 epochs are done", log), log
    assert len(run_folders(home, "killed")) == 1


def launcher(job, node):
    """Process id of the train.py that Slurm started on a node."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            variables = (folder / "environ").read_text().split("\0")
        except OSError:  # it ended meanwhile
            continue
        ours = {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}", "SLURM_PROCID=1"} <= {*variables}
        if ours and "train.py" in words and not any(v.startswith("RANK=") for v in variables):
            return int(folder.name)
    raise LookupError(f"no launcher of job {job} on {node}")


# --- without Slurm --------------------------------------------------------------------------------


@pytest.fixture
def start(two_hosts, home):
    """Function (host, exp_name, patience) -> train.py started there, one of two that meet."""
    started = []

    def run(host, name, patience=60):
        started.append(train(
            home, *TINY, "--exp-name", name, host=host.enter, PET_NNODES=2, PET_NPROC_PER_NODE=1,
            PET_RDZV_ENDPOINT="alpha:29400", PET_RDZV_ID=name, PET_LOCAL_ADDR=host.name,
            PET_RDZV_CONF=f"join_timeout={patience},read_timeout={patience}",
        ))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("present", "message"), [
    (0, "train.py: error: not all of the 2 nodes came to alpha:29400 in time; stopped\n"),
    (1, "train.py: error: no meeting of the nodes at alpha:29400: "),
])
def test_a_missing_host_is_one_line(present, message, start, two_hosts):
    process = start(two_hosts.hosts[present], "missing", patience=5)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_hosts_that_lose_each_other_say_so_and_the_same_command_continues(
    start, two_hosts, home
):
    for host in two_hosts.hosts:
        two_hosts.keep_trying(host, KEEPS_TRYING)
    both = [start(host, "cable") for host in two_hosts.hosts]
    checkpoint = home / "results/cable" / CHECKPOINT
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    two_hosts.plug(two_hosts.hosts[1], "down")
    for process in both:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 1
        assert re.fullmatch(r"train\.py: error: .*\n", errors)
    two_hosts.plug(two_hosts.hosts[1])
    outputs = [process.communicate(timeout=120) for process in
               [start(host, "cable") for host in two_hosts.hosts]]
    assert re.search(r"continued: [0-5] of 5 epochs are done, and \d of 7 steps", outputs[0][0])
    assert "done: results/cable/" in outputs[0][0]
    assert len(run_folders(home, "cable")) == 1
