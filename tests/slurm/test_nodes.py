"""Training on several machines: slurm/train_nodes.sbatch, and two hosts that lose each other.

`make test-slurm` runs them. The hosts are namespaces of this machine (hosts.py).
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_slurm import CHECKPOINT, ON_CPU, TRAIN, run_folders

TASK_A_NODE = (*ON_CPU, "--ntasks-per-node=1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
KEEPS_TRYING = 3  # times that a host resends what is not acknowledged; Linux's 15 take 15 minutes


@pytest.fixture(scope="module")
def command(tiny_npz):
    """Function (name of the run) -> arguments of train.py."""
    return lambda name: [str(word) for word in (
        "--dataset", f"npz:{tiny_npz}", *TRAIN, "--exp-name", name)]


def train(home, *words, host=(), **variables):
    """Start train.py on a host; `variables` go into its environment."""
    return subprocess.Popen(
        [*host, sys.executable, *words], cwd=home, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | {name: str(value) for name, value in variables.items()})


@pytest.fixture(scope="module")
def two_processes(home, command):
    """The same training by two processes without Slurm, which nothing breaks off."""
    with train(home, *TORCHRUN, "train.py", *command("unbroken")) as process:
        yield process


@pytest.fixture(scope="module")
def jobs(slurm_of_two, home, command, two_processes):
    """Numbers of trainings on two nodes that were broken off, by name."""
    numbers = {name: slurm_of_two.submit(home, "train_nodes", *command(name), options=TASK_A_NODE)
               for name in ("warned", "killed")}
    slurm_of_two.wait_for_text(numbers["warned"], "Epoch 0,")
    slurm_of_two.warn(numbers["warned"])
    slurm_of_two.wait_for_text(numbers["killed"], "Epoch 0,")
    os.kill(task(numbers["killed"], "beta"), signal.SIGKILL)
    return numbers


@pytest.fixture(scope="module")
def plain_srun(jobs, slurm_of_two, two_hosts, home, command):
    """srun without a batch script, continuing the training that was killed."""
    slurm_of_two.wait(jobs["killed"])
    alpha = (*two_hosts.hosts[0].enter, "srun", "--nodes=2", "--ntasks-per-node=1")
    with train(home, "train.py", *command("killed"), host=alpha,
               SLURM_CONF=slurm_of_two.folder / "slurm.conf") as process:
        yield process


def task(job, node):
    """Process id of the train.py that srun started on a node."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}", "SLURM_STEP_NUM_TASKS=2"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
            variables = (folder / "environ").read_text().split("\0")
        except OSError:  # it ended meanwhile
            continue
        if wanted <= {*variables} and "train.py" in words:
            return int(folder.name)
    raise LookupError(f"no task of job {job} on {node}")


def test_the_signal_before_the_time_limit_stops_all_nodes_and_requeues_the_job(
    jobs, plain_srun, slurm_of_two
):
    job, log = slurm_of_two.wait(jobs["warned"]), slurm_of_two.log(jobs["warned"])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert f"train {jobs['warned']}: start 1 on alpha,beta with [no checkpoint]: " in log
    assert "stopped by SIGUSR1 after epoch " in log
    assert "stopped with exit status 75; to be requeued" in log


def test_a_node_that_loses_its_process_ends_the_job(jobs, slurm_of_two):
    job, log = slurm_of_two.wait(jobs["killed"]), slurm_of_two.log(jobs["killed"])
    assert job["JobState"] == "FAILED", log
    assert "srun: error: beta: task 1: Killed" in log
    assert len(re.findall(r"train\.py: error: .*lost the other processes", log)) == 1
    assert "Traceback" not in log


def test_two_nodes_end_with_the_weights_of_an_unbroken_training(
    jobs, slurm_of_two, two_processes, plain_srun, home
):
    for process in (two_processes, plain_srun):
        out, errors = process.communicate()
        assert process.returncode == 0, errors
    state, *others = (torch.load(home / "results" / name / "latest_exp" / CHECKPOINT,
                                 weights_only=True) for name in ("unbroken", "warned", "killed"))
    for other, log in zip(others, (slurm_of_two.log(jobs["warned"]), out), strict=True):
        assert re.search(r"continued: [1-3] of 4 epochs are done", log), log
        assert other["epoch"] == state["epoch"] == 4
        assert other["progress"]["processes"] == state["progress"]["processes"] == 2
        torch.testing.assert_close(other["state_dict"], state["state_dict"], rtol=0, atol=0)
    assert all(len(run_folders(home, name)) == 1 for name in ("warned", "killed"))


# --- without Slurm --------------------------------------------------------------------------------


def test_hosts_that_lose_each_other_say_so_in_one_line_each(two_hosts, home, command):
    both = []
    for rank, host in enumerate(two_hosts.hosts):
        two_hosts.keep_trying(host, KEEPS_TRYING)
        both.append(train(home, "-u", "train.py", *command("cable"), host=host.enter, RANK=rank,
                          WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="alpha", MASTER_PORT=29400))
    try:
        for line in both[0].stdout:
            if line.startswith("Epoch 0,"):
                break
        two_hosts.plug(two_hosts.hosts[1], "down")
        for process in both:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 1
            assert len(re.findall(r"train\.py: error: .*lost the other processes", errors)) == 1
    finally:
        two_hosts.plug(two_hosts.hosts[1])
        for process in both:
            process.kill()
            process.communicate()
