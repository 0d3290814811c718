"""A run that was broken off and taken up ends as the unbroken one, bit for bit."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

TINY = ("--arch", "resnet18", "--size", 8, "--epochs", 2, "--batch-size", 16, "--lr", 0.01,
        "--print-freq", 1, "--save-steps", 2, "--normalize")
VOLATILE = ("views_per_s", "seconds", "monitor_seconds")


def end_of(home, name="temp"):
    """What must not depend on where a run was broken off: weights, best network, log records."""
    run = (home / "results" / name / "latest_exp").resolve()
    end = {"folder": run.name}
    for which in ("checkpoint", "model_best"):
        saved = torch.load(run / f"checkpoint/{which}.pth.tar", weights_only=True)
        assert saved["progress"].pop("log_bytes") > 0  # a resumed log has one more record
        saved.pop("config")
        end[which] = saved
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    end["records"] = [{k: v for k, v in r.items() if k not in VOLATILE} for r in records
                      if r["event"] in ("step", "epoch", "end")]
    return end


def assert_equal(first, second, at="end"):
    """Compare nested dicts and lists, tensors bit for bit."""
    assert type(first) is type(second), at
    if isinstance(first, dict):
        assert first.keys() == second.keys(), at
        for key in first:
            assert_equal(first[key], second[key], f"{at}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), at
        for i, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{at}[{i}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), at
    else:
        assert first == second, at


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, command, tiny_npz):
    """Function (flags) -> the end of a run that nothing broke, trained once for each flags."""
    ends = {}

    def train(*flags):
        if flags not in ends:
            home = tmp_path_factory.mktemp("unbroken")
            done = command("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, *flags, cwd=home)
            assert done.returncode == 0, done.stderr
            ends[flags] = end_of(home)
            shutil.rmtree(home)
        return ends[flags]

    return train


KILLS = {  # where each life of a run ends, one after the other
    "SimCLR": [("step", 2), ("rename", 4), ("monitor", 1), ("link", 2), ("append", 3)],
    "SupCon": [("sync", 2), ("step", 4), ("rename", 3)],
    "SupCE": [("append", 5), ("monitor", 1), ("link", 1)],
}


@pytest.mark.parametrize("mode", list(KILLS))
def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(
    mode, unbroken, command, tmp_path, tiny_npz
):
    flags = ("--training-mode", mode, *(("--warmup",) if mode == "SimCLR" else ()))
    typed = ("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, *flags)
    for place, n in KILLS[mode]:
        killed = command("tests/kill_at.py", place, n, *typed, cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, (place, killed.stderr)
    done = command(*typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continued: " in done.stdout
    assert_equal(unbroken(*flags), end_of(tmp_path))
    assert not list(tmp_path.rglob("*.damaged"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
@pytest.mark.usefixtures("terminal")
def test_a_signal_saves_the_state_at_the_next_step_and_says_so(name, unbroken, tmp_path, tiny_npz):
    flags = ("--training-mode", "SupCE", "--warmup")
    typed = [sys.executable, "-u", str(ROOT / "train.py"), "--dataset", f"npz:{tiny_npz}",
             *map(str, (*TINY, *flags))]
    process = subprocess.Popen(typed, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while "Warm-up epoch 1 " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert f"stopped by {name} after epoch -" in out
    assert "the same command continues" in err
    assert "Traceback" not in err
    (run,) = (tmp_path / "results/temp").glob("1--*")
    assert (run / "claim.json").read_text() == ""
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "continued: " in done.stdout
    assert_equal(unbroken(*flags), end_of(tmp_path))


def test_a_disk_that_fills_costs_no_run_and_the_exit_status_tells(
    unbroken, tmp_path, tiny_npz
):
    """A limit on the size of files stands in for a full disk: checkpoints fail, logs do not."""
    typed = [sys.executable, str(ROOT / "train.py"), "--dataset", f"npz:{tiny_npz}",
             *map(str, (*TINY, "--training-mode", "SupCE"))]
    limited = ["bash", "-c", 'ulimit -f 2000; exec "$@"', "-", *typed]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: trained to the end, but ")
    assert "checkpoint.pth.tar could not be written" in last
    assert "was not written (File too large)" in done.stderr
    (run,) = (tmp_path / "results/temp").glob("1--*")
    assert not list((run / "checkpoint").iterdir())  # no half of a file either
    subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert_equal(unbroken("--training-mode", "SupCE"), end_of(tmp_path))


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_that_changed_while_a_run_was_down_are_refused(
    split, command, tmp_path, tiny_npz
):
    copy = tmp_path / "images.npz"
    shutil.copy(tiny_npz, copy)
    typed = ("train.py", "--dataset", f"npz:{copy}", *TINY, "--training-mode", "SupCE")
    assert command("tests/kill_at.py", "step", 2, *typed, cwd=tmp_path).returncode < 0
    with np.load(tiny_npz) as file:
        arrays = dict(file)
    arrays[f"{split}_images"] = 255 - arrays[f"{split}_images"]
    np.savez(copy, **arrays)
    refused = command(*typed, cwd=tmp_path)
    assert refused.returncode == 2
    (line,) = refused.stderr.strip().splitlines()
    (run,) = (tmp_path / "results/temp").glob("1--*")
    before = json.loads((run / "config.json").read_text())["images"][split]
    folder = run.relative_to(tmp_path)
    assert f"the {split} images are not those that {folder} was started with" in line
    assert f"it was {before}" in line


def test_two_starts_at_once_train_one_run(tmp_path, tiny_npz):
    typed = [sys.executable, str(ROOT / "train.py"), "--dataset", f"npz:{tiny_npz}",
             *map(str, (*TINY, "--training-mode", "SupCE", "--warmup"))]
    both = [subprocess.Popen(typed, cwd=tmp_path, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [p.communicate(timeout=240)[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 2], errors
    assert "is being trained by process" in "".join(errors)
    assert [f.name for f in (tmp_path / "results/temp").glob("[0-9]*")] == [
        "1--dataset-npz-arch-resnet18-lr-0.01_epochs-2"]


def test_fast_says_what_it_chose_and_keeps_to_what_was_asked(command, tmp_path, tiny_npz):
    done = command("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, "--training-mode", "SupCE",
                   "--fast", "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: --fast is here fp32, channels-last, no compile" in done.stderr
    run = (tmp_path / "results/temp/latest_exp").resolve()
    config = json.loads((run / "config.json").read_text())["config"]
    chosen = {k: config[k] for k in ("precision", "channels_last", "compile")}
    assert chosen == {"precision": "fp32", "channels_last": True, "compile": False}


def test_deterministic_changes_nothing_on_a_cpu(unbroken, command, tmp_path, tiny_npz):
    flags = ("--training-mode", "SupCE")
    done = command("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, *flags, "--deterministic",
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_equal(unbroken(*flags), end_of(tmp_path))


def test_the_monitor_looks_as_often_as_it_is_told_and_at_the_end(command, tmp_path, tiny_npz):
    done = command("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, "--epochs", 3,
                   "--val-freq", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = (tmp_path / "results/temp/latest_exp").resolve()
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    watched = [r["monitor"] is not None for r in records if r["event"] == "epoch"]
    assert watched == [False, True, True]
