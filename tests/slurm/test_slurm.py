"""The batch scripts on a real Slurm of one node, and what they make of their arguments.

`make test-slurm` runs them. Where no Slurm can be started the tests that need it are skipped. Some
jobs are of the real programs, most of a stand-in (stand_in.py); all of them are at work together.
"""

import functools
import hashlib
import json
import shutil
import socket
import subprocess

import pytest
import torch

ON_CPU = ("--gres=none",)  # where an interrupted and an unbroken run are equal bit for bit
TWO_TASKS = ("--gres=none", "--nodes=1", "--ntasks-per-node=2")
TRAIN = ("--in-classes", "0-2", "--arch", "resnet18", "--size", 8, "--batch-size", 8, "--lr", 0.05,
         "--epochs", 4, "--training-mode", "SimCLR")
CHECKPOINT = "checkpoint/checkpoint.pth.tar"

# How a program runs: batch script, options, arguments of the stand-in, its processes, and the
# signal and exit status with which it ends where Slurm warns of the time limit.
WAYS = {
    "one process": ("train", ON_CPU, (), 1, "SIGTERM", 75),
    "torchrun": ("train", ON_CPU, ("--processes", 2), 2, "SIGTERM", 1),
    "srun": ("train_nodes", TWO_TASKS, (), 2, "SIGUSR1", 75),
}


@pytest.fixture(scope="module")
def jobs(slurm, home, stage, tiny_npz):
    """All jobs that take their time, at work beside each other: their numbers, by name."""
    numbers = {
        # Slurm knows no time limit below a minute, of which this warns as early as it can.
        "limited": slurm.submit(stage, "eval", "stand_in.py", "--deaf", env={"RESTARTS": "0"},
                                options=(*ON_CPU, "--time=1", "--signal=B:USR1@60")),
        "dying": slurm.submit(stage, "train", "--end", 7, options=ON_CPU, env={"RESTARTS": "1"}),
        "finished": slurm.submit(stage, "train", "--stopped", 0, options=ON_CPU),
        "cancelled while saving": slurm.submit(stage, "train", "--saving", 4, options=ON_CPU),
        "preempted": slurm.submit(stage, "train_nodes", options=TWO_TASKS),
        "array": slurm.submit(stage, "eval", "stand_in.py", "a", "b", "--word", "{}",
                              options=(*ON_CPU, "--array=0-1")),
        "whole": slurm.submit(
            home, "train", 1, 2, "--dataset", f"npz:{tiny_npz}", *TRAIN, "--seed", "{}",
            "--exp-name", "whole-{}", options=(*ON_CPU, "--array=0-1")),
    }
    for seed in (1, 2):
        (home / f"seed_{seed}.yaml").write_text(f"exp-name: broken\nseed: {seed}\n")
    numbers["broken"] = slurm.submit(
        home, "train", "seed_1.yaml", "seed_2.yaml", "--dataset", f"npz:{tiny_npz}", *TRAIN,
        "--config", "{}", options=(*ON_CPU, "--array=0-1"))
    numbers["evaluated"] = slurm.submit(
        home, "eval", "eval_ssd.py", 1, 2, "--ckpt", f"results/whole-{{}}/latest_exp/{CHECKPOINT}",
        "--exp-name", "whole-{}", "--ood", "rest",
        options=(*ON_CPU, "--array=0-1", f"--dependency=aftercorr:{numbers['whole']}"))
    for way, (script, options, arguments, *_) in WAYS.items():
        for what in ("warned", "requeued", "cancelled"):
            # They are not given up after a restart, since it has found a checkpoint.
            numbers[what, way] = slurm.submit(stage, script, *arguments, "--saving", 2,
                                              options=options, env={"RESTARTS": "0"})

    def interrupt(name, *ways, processes=1, task=""):
        number = f"{numbers[name]}{task}"
        slurm.wait_for_text(number, "is at work", processes)
        for way in ways:
            way(number)

    for way, (*_, processes, _, _) in WAYS.items():
        interrupt(("warned", way), slurm.warn, processes=processes)
        interrupt(("requeued", way), slurm.requeue, processes=processes)
        interrupt(("cancelled", way), slurm.cancel, processes=processes)
    interrupt("preempted", functools.partial(slurm.command, "scancel", "--signal=TERM"),
              processes=2)
    interrupt("finished", slurm.warn)
    interrupt("cancelled while saving", slurm.warn, slurm.cancel)
    interrupt("array", task="_0")
    interrupt("array", slurm.warn, task="_1")
    slurm.wait_for_text(f"{numbers['broken']}_0", "Epoch 0,")
    slurm.requeue(f"{numbers['broken']}_0")
    slurm.wait_for_text(f"{numbers['broken']}_1", "Epoch 0,")
    slurm.warn(f"{numbers['broken']}_1")
    return numbers


# --- jobs that are interrupted --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_job_near_its_time_limit_is_saved_and_requeues_itself(way, slurm, jobs):
    *_, processes, by, status = WAYS[way]
    number = jobs["warned", way]
    job, log = slurm.wait(number), slurm.log(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count(f"saved at {by}") == processes
    assert f"stopped with exit status {status}; to be requeued" in log
    assert f"train {number}: start 2 on " in log  # one log for all starts


@pytest.mark.parametrize("way", WAYS)
def test_a_job_that_slurm_requeues_is_saved_first(way, slurm, jobs):
    job, log = slurm.wait(jobs["requeued", way]), slurm.log(jobs["requeued", way])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("saved at SIGTERM") == WAYS[way][3]
    assert "to be requeued" not in log


@pytest.mark.parametrize("way", WAYS)
def test_a_cancelled_job_is_saved_and_stays_cancelled(way, slurm, jobs):
    job, log = slurm.wait(jobs["cancelled", way]), slurm.log(jobs["cancelled", way])
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), log
    assert log.count("saved at SIGTERM") == WAYS[way][3]


def test_tasks_that_are_stopped_for_a_preemption_with_a_grace_time_have_the_job_requeued(
    slurm, jobs
):
    job, log = slurm.wait(jobs["preempted"]), slurm.log(jobs["preempted"])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("saved at SIGTERM") == 2


def test_a_job_that_is_cancelled_while_it_saves_for_the_time_limit_stays_so(slurm, jobs):
    number = jobs["cancelled while saving"]
    job, log = slurm.wait(number), slurm.log(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), log
    assert "saved at SIGTERM" in log


def test_a_job_that_finishes_within_its_time_limit_is_not_requeued(slurm, jobs):
    job, log = slurm.wait(jobs["finished"]), slurm.log(jobs["finished"])
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), log


def test_the_last_task_of_an_array_requeues_itself_and_not_the_others(slurm, jobs):
    last = f"{jobs['array']}_1"
    job, log = slurm.wait(last), slurm.log(last)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert f"eval {last}: start 2 on " in log
    assert "-u stand_in.py --word b" in log
    first = slurm.job(f"{jobs['array']}_0")
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")


def test_slurms_warning_requeues_and_no_progress_within_the_limit_is_given_up(slurm, jobs):
    number = jobs["limited"]
    job, log = slurm.wait(number), slurm.log(number)
    assert log.count("is at work") == 1, log
    assert "stopped with exit status 143; to be requeued" in log
    assert "DUE TO TIME LIMIT" not in log  # Slurm itself never ended it
    assert f"eval {number}: error: gave up after 0 restarts without progress" in log
    assert job["JobState"] == "CANCELLED"


def test_a_job_that_dies_each_time_is_given_up_though_slurm_requeues_it(slurm, jobs):
    number = jobs["dying"]
    job, log = slurm.wait(number), slurm.log(number)
    assert log.count("start ") == 2, log
    assert f"train {number}: error: gave up after 1 restarts without progress" in log
    assert job["JobState"] == "CANCELLED"


# --- the real programs ----------------------------------------------------------------------------


def run_folders(home, name):
    """{seed: folder} of the runs of a name."""
    found = [(json.loads(path.read_text())["config"]["seed"], path.parent)
             for path in (home / "results" / name).glob("*--*/config.json")]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_trainings_end_with_the_weights_of_unbroken_ones_although_they_were_broken_off(
    slurm, jobs, home
):
    for task in (0, 1):
        for name in ("whole", "broken"):
            number = f"{jobs[name]}_{task}"
            job = slurm.wait(number)
            assert job["JobState"] == "COMPLETED", slurm.log(number)
            assert job["Restarts"] == str(int(name == "broken"))
        assert "continued: " in slurm.log(f"{jobs['broken']}_{task}")
    broken = run_folders(home, "broken")  # one name, but never one folder
    assert broken.keys() == {1, 2}
    for seed, folder in broken.items():
        states = [torch.load(path / CHECKPOINT, weights_only=True)
                  for path in (folder, home / f"results/whole-{seed}/latest_exp")]
        assert [state["epoch"] for state in states] == [4, 4]
        torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], rtol=0, atol=0)
        momentum, expected = ([v["momentum_buffer"] for v in state["optimizer"]["state"].values()]
                              for state in states)
        torch.testing.assert_close(momentum, expected, rtol=0, atol=0)


def test_each_task_evaluates_the_network_of_its_own_training_by_dependency(slurm, jobs, home):
    for task, seed in enumerate((1, 2)):
        number = f"{jobs['evaluated']}_{task}"
        assert slurm.wait(number)["JobState"] == "COMPLETED", slurm.log(number)
        (folder,) = run_folders(home, f"whole-{seed}").values()
        (line,) = (home / f"eval_results/whole-{seed}_ssd.txt").read_text().splitlines()
        assert line.startswith("In-data = ")
        assert line in slurm.log(number)
        (record,) = map(json.loads, (home / f"eval_results/whole-{seed}_ssd.jsonl").open())
        assert record["sha256"] == hashlib.sha256((folder / CHECKPOINT).read_bytes()).hexdigest()


# --- jobs of a second -----------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "state"), [(0, "COMPLETED"), (3, "FAILED")])
@pytest.mark.parametrize(("script", "options"), [("train", ON_CPU), ("train_nodes", TWO_TASKS)])
def test_the_job_has_the_exit_status_of_the_program(
    script, options, status, state, slurm, stage
):
    job = slurm.wait(slurm.submit(stage, script, "--end", status, options=options))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == (state, f"{status}:0", "0")


@pytest.fixture
def first_gpu(slurm, stage):
    """A job that holds the first GPU."""
    number = slurm.submit(stage, "train")
    slurm.wait_for_text(number, "is at work")
    yield
    slurm.cancel(number)


def seen(slurm, number):
    """Values of the variables that each process of a job saw, one dict each."""
    slurm.wait(number)
    lines = [line.split()[1:] for line in slurm.log(number).splitlines() if line[:5] == "sees "]
    return [dict(word.split("=") for word in line) for line in lines]


@pytest.mark.usefixtures("first_gpu")
def test_the_program_sees_the_gpu_that_slurm_gave_the_job(slurm, stage):
    (found,) = seen(slurm, slurm.submit(stage, "eval", "stand_in.py", "--end", 0))
    assert found["CUDA_VISIBLE_DEVICES"] == found["SLURM_JOB_GPUS"] == "1"


@pytest.mark.usefixtures("first_gpu")
@pytest.mark.parametrize("option", [
    ("--gres=gpu:2",), ("--gres=none", "--gpus-per-node=2"), ("--gres=gpu:3", "--gpus-per-node=2"),
])
def test_several_machines_have_a_process_for_each_gpu(option, slurm, stage):
    found = seen(slurm, slurm.submit(stage, "train_nodes", "--end", 0,
                                     options=("--nodes=1", *option)))
    assert len(found) == 2
    for process in found:
        assert process["SLURM_STEP_NUM_TASKS"] == "2"
        assert process["CUDA_VISIBLE_DEVICES"] == "1,2"


def test_processes_meet_at_a_port_of_the_job_or_the_next_free_one(slurm, stage):
    number = slurm.submit(stage, "train_nodes", "--end", 0, options=(*TWO_TASKS, "--hold"))
    port = 10000 + int(number) % 20000
    with socket.create_server(("", port)):
        slurm.command("scontrol", "release", number)
        found = seen(slurm, number)
    assert [int(process["MASTER_PORT"]) for process in found] == [port + 1] * 2


# --- what the scripts make of their arguments: no Slurm needed ------------------------------------


@pytest.fixture
def by_hand(stage):
    """Function (script, *arguments, task, **variables) -> status, stdout, stderr without Slurm."""
    show = stage / "show"
    show.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\n")
    show.chmod(0o755)

    def run(name, *arguments, task=None, **variables):
        array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(
            ["bash", f"slurm/{name}.sbatch", *arguments], cwd=stage, capture_output=True,
            text=True, check=False, env={
                "PATH": "/usr/bin:/bin", "PYTHON": "./show", "SLURM_JOB_ID": "9",
                "SLURM_JOB_NAME": name} | (array if task is not None else {}) | variables)
        return done.returncode, done.stdout.splitlines(), done.stderr.strip()

    return run


@pytest.mark.parametrize(("name", "arguments", "task", "command"), [
    ("train", ["--lr", "0.1", "--exp-name", "a b"], None, "train.py|--lr|0.1|--exp-name|a b"),
    ("train", [], None, "train.py"),
    ("train", ["a.yaml", "b.yaml", "--config", "{}"], 1, "train.py|--config|b.yaml"),
    ("train", ["1", "2", "3", "--seed", "{}", "--exp-name", "s-{}"], 0,
     "train.py|--seed|1|--exp-name|s-1"),
    ("train", ["a&b", "--exp-name", "{}-{}"], 0, "train.py|--exp-name|a&b-a&b"),
    ("eval", ["eval_ssd.py", "--clusters", "1", "5"], None, "eval_ssd.py|--clusters|1|5"),
    ("eval", ["eval_ssdk.py", "x", "y", "--ckpt", "results/{}/c"], 1,
     "eval_ssdk.py|--ckpt|results/y/c"),
])
def test_the_program_gets_the_arguments_of_the_script(name, arguments, task, command, by_hand):
    status, lines, errors = by_hand(name, *arguments, task=task)
    assert (status, lines[-1], errors) == (0, f"-u|{command}|", "")


@pytest.mark.parametrize(("name", "arguments", "task", "message"), [
    ("train", ["a.yaml", "b.yaml", "--config", "{}"], None,
     "train 9: error: the list 'a.yaml b.yaml' needs sbatch --array=0-1"),
    ("train", ["a.yaml", "--config", "{}"], 2,
     "train 7_2: error: --array has task 2, the list only 0-0: a.yaml"),
    ("train", ["a", "b", "c", "d", "--config", "{}"], 1,
     "train 7_1: error: --array has 3 tasks, the list 4 words: a b c d"),
    ("eval", ["eval_ssd.py", "a", "b", "--config", "{}"], 1,
     "eval 7_1: error: --array has 3 tasks, the list 2 words: a b"),
    ("train", ["--config", "a.yaml"], 0,
     "train 7_0: error: an array needs a list before the first flag, and {} where each task takes "
     "its own of it: 1 2 3 --seed {}"),
    ("train", ["1", "2", "--seed", "1"], 0,
     "train 7_0: error: an array needs a list before the first flag, and {} where each task takes "
     "its own of it: 1 2 3 --seed {}"),
    ("eval", ["--ckpt", "x"], None,
     "eval 9: error: the first argument is eval_ssd.py or eval_ssdk.py, not '--ckpt'"),
])
def test_arguments_that_cannot_be_meant_are_refused(name, arguments, task, message, by_hand):
    count = {"SLURM_ARRAY_TASK_COUNT": "3"} if "3 tasks" in message else {}
    assert by_hand(name, *arguments, task=task, **count) == (2, [], message)


def test_a_missing_python_is_named(by_hand, stage):
    assert by_hand("train", PYTHON=".venv/bin/python") == (
        2, [], f"train 9: error: PYTHON=.venv/bin/python is no program, seen from {stage}")


@pytest.mark.parametrize("name", ["train_nodes", "eval"])
def test_the_scripts_want_the_same_signals_restarts_and_logs_of_slurm(name, stage):
    ways = ("--output=", "--open-mode=", "--signal=", "--requeue")
    wanted = [[line.split()[1] for line in (stage / f"slurm/{file}.sbatch").read_text().splitlines()
               if line.startswith("#SBATCH") and line.split()[1].startswith(ways)]
              for file in ("train", name)]
    assert wanted[0] == wanted[1]
    assert len(wanted[0]) == 4


def test_shellcheck_finds_nothing_in_the_scripts(stage):
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, (stage / "slurm").glob("*.sbatch")), "slurm/job.sh"],
        cwd=stage, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
