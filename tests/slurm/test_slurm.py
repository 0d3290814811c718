"""The Slurm templates: on a real Slurm of one node, and what they make of their arguments.

`make test-slurm` runs them. Where no Slurm can be started the tests that need it are skipped.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ON_CPU = ("--gres=none",)  # where an interrupted and an unbroken run are equal bit for bit
TRAIN = ("--dataset", "digits", "--in-classes", "0-5", "--arch", "resnet18", "--size", 8,
         "--batch-size", 128, "--lr", 0.1)
LONG = (*TRAIN, "--epochs", 24, "--save-steps", 3)
SHORT = (*TRAIN, "--epochs", 2)
CHECKPOINT = "latest_exp/checkpoint/checkpoint.pth.tar"
SCRIPTS = {
    "status.py": "import sys; sys.exit(int(sys.argv[2]))",
    "sleep.py": "import time; print('asleep', flush=True); time.sleep(600)",
    "device.py": "import os\n"
                 "print(*(os.environ[k] for k in ('CUDA_VISIBLE_DEVICES', 'SLURM_JOB_GPUS')))",
}


@pytest.fixture(scope="module")
def scripts(home):
    """Programs that end at once or never, beside the real ones."""
    for name, text in SCRIPTS.items():
        (home / name).write_text(text)


@pytest.fixture(scope="module")
def jobs(slurm, submit, home, scripts):
    """All jobs that take their time, at work beside each other: their numbers, by name."""
    for seed in (1, 2):
        (home / f"seed_{seed}.yaml").write_text(f"exp-name: shared\nseed: {seed}\n")
    numbers = {
        "requeued": submit(ON_CPU, "train", *LONG, "--exp-name", "requeued"),
        "limited": submit(ON_CPU, "train", *LONG, "--exp-name", "limited"),
        "seeds": submit((*ON_CPU, "--array=0-1"), "train", 1, 2, *SHORT, "--seed", "{}",
                        "--exp-name", "seed-{}"),
        "recipes": submit((*ON_CPU, "--array=0-1"), "train", "seed_1.yaml", "seed_2.yaml",
                          *SHORT, "--config", "{}"),
        # Its weights overflow in the first epoch: exit status 1, which this Slurm requeues itself
        "dying": submit(ON_CPU, "train", *TRAIN, "--epochs", 1, "--lr", "1e30", "--exp-name",
                        "dying", env={"RESTARTS": "2"}),
        "stuck": submit((*ON_CPU, "--time=1", "--signal=B:USR1@60"), "eval", "sleep.py",
                        env={"RESTARTS": "1"}),
    }
    numbers["evaluated"] = submit(
        (*ON_CPU, "--array=0-1", f"--dependency=aftercorr:{numbers['seeds']}"), "eval",
        "eval_ssd.py", 1, 2, "--ckpt", f"results/seed-{{}}/{CHECKPOINT}", "--exp-name", "seed-{}",
        "--ood", "rest",
    )
    logs = {name: home / f"slurm/logs/train-{numbers[name]}.log" for name in numbers}
    wait_for_text(slurm, logs["requeued"], "Epoch 1,", 1)
    slurm.command("scontrol", "requeue", numbers["requeued"])
    wait_for_text(slurm, logs["limited"], "Epoch 1,", 1)
    run_into_time_limit(slurm, numbers["limited"])
    return numbers


def run_into_time_limit(slurm, number):
    """Leave a running job 1 to 2 minutes until Slurm, which looks every 30 s, has warned it."""
    hours, minutes, _ = map(int, slurm.job(number)["RunTime"].split(":"))
    limit = 60 * hours + minutes + 2
    slurm.command("scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")
    slurm.until(lambda: slurm.job(number)["Restarts"] != "0", 200, "the time limit")
    slurm.command("scontrol", "update", f"JobId={number}", "TimeLimit=600")


@pytest.fixture(scope="module")
def unbroken(jobs, home):
    """The checkpoint of the same training without Slurm."""
    done = subprocess.run(
        [sys.executable, "train.py", *map(str, LONG), "--exp-name", "unbroken"], cwd=home,
        env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(home / "results/unbroken" / CHECKPOINT, weights_only=True)


@pytest.mark.parametrize("name", ["requeued", "limited"])
def test_a_training_ends_with_the_weights_of_an_unbroken_one_although_it_was(
    name, slurm, jobs, home, unbroken
):
    job = slurm.wait(jobs[name])
    log = (home / f"slurm/logs/train-{jobs[name]}.log").read_text()
    assert job["JobState"] == "COMPLETED", log
    assert int(job["Restarts"]) >= 1
    assert f"train {jobs[name]}: start {int(job['Restarts']) + 1} on " in log  # one log for all
    assert len(run_folders(home, name)) == 1
    state = torch.load(home / "results" / name / CHECKPOINT, weights_only=True)
    assert state["epoch"] == unbroken["epoch"] == 24
    for key, value in unbroken["state_dict"].items():
        assert torch.equal(state["state_dict"][key], value), key
    for number, values in unbroken["optimizer"]["state"].items():
        momentum = state["optimizer"]["state"][number]["momentum_buffer"]
        assert torch.equal(momentum, values["momentum_buffer"]), number


def test_a_time_limit_requeues_the_job_by_the_job_itself(slurm, jobs, home):
    slurm.wait(jobs["limited"])
    log = (home / f"slurm/logs/train-{jobs['limited']}.log").read_text()
    assert "stopped for the time limit with exit status 75; to be requeued" in log
    assert "DUE TO TIME LIMIT" not in log  # Slurm itself never ended it


def test_a_job_that_dies_at_once_each_time_is_given_up_after_so_many_restarts(slurm, jobs, home):
    job = slurm.wait(jobs["dying"])
    log = (home / f"slurm/logs/train-{jobs['dying']}.log").read_text()
    assert log.count("start ") == 3, log
    assert f"train {jobs['dying']}: error: gave up after 2 restarts without progress" in log
    assert job["JobState"] == "CANCELLED"
    assert not list((home / "slurm/logs").glob(f"*-{jobs['dying']}.restarts"))


def test_a_job_that_gets_nowhere_within_its_time_limit_is_given_up(slurm, jobs, home):
    job = slurm.wait(jobs["stuck"])
    log = (home / f"slurm/logs/eval-{jobs['stuck']}.log").read_text()
    assert log.count("asleep") == 2, log
    assert log.count("stopped for the time limit with exit status 138; to be requeued") == 1
    assert f"eval {jobs['stuck']}: error: gave up after 1 restarts without progress" in log
    assert job["JobState"] == "CANCELLED"


def test_tasks_of_an_array_with_one_name_never_share_a_run_folder(slurm, jobs, home):
    for task in (0, 1):
        job = slurm.wait(f"{jobs['recipes']}_{task}")
        assert job["JobState"] == "COMPLETED", job
    folders = run_folders(home, "shared")
    assert sorted(f.name.partition("--")[0] for f in folders) == ["1", "2"]
    assert sorted(seed_of(f) for f in folders) == [1, 2]


def test_each_task_evaluates_the_network_of_its_own_training_by_dependency(slurm, jobs, home):
    for task, seed in enumerate((1, 2)):
        job = slurm.wait(f"{jobs['evaluated']}_{task}")
        assert job["JobState"] == "COMPLETED", job
        (folder,) = run_folders(home, f"seed-{seed}")
        assert seed_of(folder) == seed
        lines = (home / f"eval_results/seed-{seed}_ssd.txt").read_text().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("In-data = digits, OOD = rest, Clusters = 1, FPR95 = ")


def wait_for_text(slurm, log, text, times):
    slurm.until(lambda: log.exists() and log.read_text().count(text) >= times, 600,
                f"{text!r} in {log}")


def run_folders(home, name):
    return [f for f in (home / "results" / name).iterdir() if not f.is_symlink() and f.is_dir()]


def seed_of(folder):
    return json.loads((folder / "config.json").read_text())["config"]["seed"]


@pytest.mark.parametrize(("status", "state"), [(0, "COMPLETED"), (3, "FAILED")])
def test_the_job_has_the_exit_status_of_the_program(status, state, slurm, submit, scripts):
    job = slurm.wait(submit((), "eval", "status.py", "--with", status), 100)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == (state, f"{status}:0", "0")


def test_the_program_sees_the_gpu_that_slurm_gave_the_job(slurm, submit, home, scripts):
    other = submit((), "eval", "sleep.py")
    slurm.until(lambda: slurm.job(other)["JobState"] == "RUNNING", 60, "a job on the first GPU")
    number = submit((), "eval", "device.py")
    slurm.wait(number, 100)
    slurm.command("scancel", other)
    given = (home / f"slurm/logs/eval-{number}.log").read_text().splitlines()[-1]
    assert given == "1 1"


def test_a_cancelled_job_stays_cancelled(slurm, submit, home, scripts):
    number = submit((), "eval", "sleep.py")
    log = home / f"slurm/logs/eval-{number}.log"
    wait_for_text(slurm, log, "asleep", 1)
    slurm.command("scancel", number)
    job = slurm.wait(number, 100)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")


def test_the_last_task_of_an_array_requeues_itself_and_not_the_others(
    slurm, submit, home, scripts
):
    array = submit((*ON_CPU, "--array=0-1"), "eval", "sleep.py", "a", "b", "--word", "{}")
    last = f"{array}_1"
    logs = [Path(slurm.job(f"{array}_{task}")["StdOut"]) for task in (0, 1)]
    for log in logs:
        wait_for_text(slurm, log, "asleep", 1)
    slurm.command("scancel", "--batch", "--signal=USR1", last)  # as at the time limit
    wait_for_text(slurm, logs[1], "asleep", 2)
    restarts = [slurm.job(f"{array}_{task}")["Restarts"] for task in (0, 1)]
    slurm.command("scancel", array)
    assert restarts == ["0", "1"]
    assert f"eval {last}: start 2 on " in logs[1].read_text()
    assert "-u 'sleep.py' '--word' 'b'" in logs[1].read_text()


# --- what the templates make of their arguments: no Slurm needed ----------------------------------


@pytest.fixture
def template(home):
    """Function (name, *arguments, task=None) -> status, stdout, stderr; Python shows its words."""
    show = home / "show"
    show.write_text("#!/bin/sh\nprintf '%s|' \"$@\"\n")
    show.chmod(0o755)

    def run(name, *arguments, task=None):
        array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
        log = home / "slurm/logs/by_hand.log"
        with log.open("w") as out:
            done = subprocess.run(
                ["bash", f"slurm/{name}.sbatch", *arguments], cwd=home, stdout=out,
                stderr=subprocess.PIPE, text=True, check=False,
                env={"PATH": "/usr/bin:/bin", "PYTHON": "./show", "SLURM_JOB_ID": "9",
                     "SLURM_JOB_NAME": name} | (array if task is not None else {}),
            )
        return done.returncode, log.read_text().splitlines(), done.stderr.strip()

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
def test_the_program_gets_the_arguments_of_the_template(name, arguments, task, command, template):
    status, lines, errors = template(name, *arguments, task=task)
    assert (status, lines[-1], errors) == (0, f"-u|{command}|", "")


@pytest.mark.parametrize(("name", "arguments", "task", "message"), [
    ("train", ["a.yaml", "b.yaml", "--config", "{}"], None,
     "train 9: error: the list 'a.yaml b.yaml' needs sbatch --array=0-1"),
    ("train", ["a.yaml", "--config", "{}"], 2,
     "train 7_2: error: --array has task 2, the list only 0-0: a.yaml"),
    ("train", ["--config", "a.yaml"], 0,
     "train 7_0: error: an array needs a list before the first flag, and {} where each task takes "
     "its own of it: 1 2 3 --seed {}"),
    ("train", ["1", "2", "--seed", "1"], 0,
     "train 7_0: error: an array needs a list before the first flag, and {} where each task takes "
     "its own of it: 1 2 3 --seed {}"),
    ("eval", ["--ckpt", "x"], None,
     "eval 9: error: the first argument is eval_ssd.py or eval_ssdk.py, not '--ckpt'"),
])
def test_arguments_that_cannot_be_meant_are_refused(name, arguments, task, message, template):
    assert template(name, *arguments, task=task) == (2, [], message)


def test_a_missing_python_is_named(home):
    done = subprocess.run(
        ["bash", "slurm/train.sbatch"], cwd=home, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "9", "SLURM_JOB_NAME": "train"},
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"train 9: error: PYTHON=.venv/bin/python is no program, seen from {home}\n"
    )


@pytest.mark.parametrize("name", ["train_nodes", "eval"])
def test_the_templates_want_the_same_signals_restarts_and_logs_of_slurm(name, home):
    ways = ("--output=", "--open-mode=", "--signal=", "--requeue")
    wanted = [[line.split()[1] for line in (home / f"slurm/{file}.sbatch").read_text().splitlines()
               if line.startswith("#SBATCH") and line.split()[1].startswith(ways)]
              for file in ("train", name)]
    assert wanted[0] == wanted[1]
    assert len(wanted[0]) == 4


def test_a_number_of_processes_that_is_none_is_named(home):
    done = subprocess.run(
        ["bash", "slurm/train_nodes.sbatch"], cwd=home, capture_output=True, text=True,
        check=False, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "9", "SLURM_JOB_NAME": "train",
                          "PROCESSES": "0"},
    )
    assert (done.returncode, done.stderr) == (
        2, "train 9: error: PROCESSES=0 is no number of processes\n")


def test_shellcheck_finds_nothing_in_the_templates(home):
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, (home / "slurm").glob("*.sbatch")), "slurm/job.sh"],
        cwd=home, capture_output=True, text=True, check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
