"""Processes that srun has started: torch's variables from those of Slurm."""

import pytest
import torch
import torch.distributed as dist

from infra import distributed

# What a task of srun has; its batch script has none of the SLURM_STEP_ variables.
TASK = {"SLURM_JOB_ID": "31234", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "vm"}


def task(**changes):
    return TASK | {f"SLURM_{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(("layout", "node", "local_world_size"), [
    ("8", 0, 8), ("8(x4)", 3, 8), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("4,2(x2),3", 1, 2),
    ("4,2(x2),3", 3, 3),
])
def test_ranks_are_those_of_the_step(layout, node, local_world_size):
    env = task(PROCID="5", LOCALID="1", NODEID=str(node), STEP_NUM_TASKS="32",
               STEP_TASKS_PER_NODE=layout)
    found = distributed.slurm_variables(env)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "32", "1")
    assert found["LOCAL_WORLD_SIZE"] == str(local_world_size)


@pytest.mark.parametrize(("nodes", "first"), [
    ("alpha", "alpha"), ("alpha,beta", "alpha"), ("gpu[07-09,12],other", "gpu07"),
    ("other,gpu[07-09]", "other"), ("gpu[3,5]", "gpu3"), ("rack[2-3]-node[10-11]", "rack2-node10"),
    ("node-a.cluster,node-b.cluster", "node-a.cluster"),
])
def test_processes_meet_at_the_first_node_of_the_step_at_a_port_of_the_job(nodes, first):
    found = distributed.slurm_variables(task(STEP_NODELIST=nodes))
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == (first, "21234")


def test_the_batch_script_may_say_where_processes_meet():
    found = distributed.slurm_variables(task() | {"MASTER_ADDR": "beta", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("beta", "29500")


@pytest.fixture
def joined(monkeypatch):
    """Function (environment) -> (rank, world size, backend) of the group that start() joins."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def start(env):
        groups = []
        monkeypatch.setattr(distributed.os, "environ", dict(env))
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: groups.append(
            (distributed.rank(), distributed.world_size(), backend)))
        monkeypatch.setattr(distributed, "_main_group", lambda: None)
        distributed.start()
        return groups[0] if groups else None

    return start


def test_several_tasks_of_srun_join(joined):
    assert joined(task(PROCID="1")) == (1, 2, "gloo")


@pytest.mark.parametrize("env", [
    task(STEP_NUM_TASKS="1", STEP_TASKS_PER_NODE="1"),
    # A batch script for two tasks, in which only srun would start a second one.
    {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
     "SLURM_NPROCS": "2", "SLURM_TASKS_PER_NODE": "2"},
])
def test_one_task_of_srun_and_a_batch_script_are_one_process(joined, env):
    assert joined(env) is None


def test_processes_of_torchrun_within_a_task_of_srun_have_torchruns_ranks(joined):
    env = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert joined(task(PROCID="1") | env) == (2, 4, "gloo")


@pytest.mark.parametrize(("visible", "on_node", "backend"), [
    (2, "2", "cpu:gloo,cuda:nccl"),
    (1, "2", "cpu:gloo,cuda:nccl"),  # --gpus-per-task=1
    (1, "1", "gloo"),  # two processes share a GPU
])
def test_nccl_needs_a_gpu_for_each_process_of_the_node(
    joined, monkeypatch, visible, on_node, backend
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert joined(task(GPUS_ON_NODE=on_node)) == (0, 2, backend)
