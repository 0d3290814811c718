"""A run that was broken off and resumed ends as the unbroken one, bit for bit.

Here a run is broken off by an exception at a place of its program, in the test's process; real
kills, signals and full disks are in tests/faults.
"""

import gc
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import call_program
from kill_at import interrupt_at

TINY = ("--arch", "tiny", "--size", 8, "--epochs", 2, "--batch-size", 16, "--lr", 0.01,
        "--print-freq", 1, "--save-steps", 2, "--normalize")
pytestmark = pytest.mark.usefixtures("tiny_arch")
VOLATILE = ("views_per_s", "seconds", "monitor_seconds")


class Killed(BaseException):
    """What ends a run here; nothing in the programs catches it."""


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


def killed_at(place, n, typed, home):
    """Start a command that ends just before the n-th call of a place."""
    def kill():
        raise Killed

    restore = interrupt_at(place, n, kill)
    try:
        with pytest.raises(Killed):
            call_program(*typed, cwd=home)
    finally:
        restore()
    gc.collect()  # the exception held the run, and with it the lock of its folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_arch, tiny_npz):
    """Function (flags) -> the end of a run that nothing broke, trained once for each flags."""
    ends = {}

    def train(*flags):
        if flags not in ends:
            home = tmp_path_factory.mktemp("unbroken")
            done = call_program("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, *flags, cwd=home)
            assert done.returncode == 0, done.stderr
            ends[flags] = end_of(home)
            shutil.rmtree(home)
        return ends[flags]

    return train


KILLS = {  # where each life of a run ends, one after the other
    "SimCLR": [("step", 2), ("rename", 4), ("monitor", 1), ("link", 2), ("append", 3)],
    "SupCon": [("sync", 3), ("append", 6), ("step", 1)],
    "SupCE": [("rename", 1), ("link", 1), ("sync", 5), ("append", 9), ("monitor", 1)],
}


@pytest.mark.parametrize("mode", KILLS)
def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(
    mode, unbroken, tmp_path, tiny_npz
):
    flags = ("--training-mode", mode)
    typed = ("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, *flags)
    for place, n in KILLS[mode]:
        killed_at(place, n, typed, tmp_path)
    done = call_program(*typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continued: " in done.stdout
    assert_equal(unbroken(*flags), end_of(tmp_path))
    assert not list(tmp_path.rglob("*.damaged"))


@pytest.mark.usefixtures("terminal")
def test_a_signal_saves_the_state_at_the_next_step_and_says_so(unbroken, tmp_path, tiny_npz):
    flags = ("--training-mode", "SupCE")
    typed = ("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, *flags)
    restore = interrupt_at("step", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        done = call_program(*typed, cwd=tmp_path)
    finally:
        restore()
    assert done.returncode == 75
    assert "stopped by SIGTERM after epoch 0, step 2 of 3; saved" in done.stdout
    assert "the same command continues" in done.stderr
    done = call_program(*typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continued: 0 of 2 epochs are done, and 2 of 3 steps of the next" in done.stdout
    assert_equal(unbroken(*flags), end_of(tmp_path))


def test_images_that_changed_while_a_run_was_down_are_refused(tmp_path, tiny_npz):
    copy = tmp_path / "images.npz"
    shutil.copy(tiny_npz, copy)
    typed = ("train.py", "--dataset", f"npz:{copy}", *TINY, "--training-mode", "SupCE")
    killed_at("step", 2, typed, tmp_path)
    with np.load(tiny_npz) as file:
        arrays = dict(file)
    for split in ("train", "test"):
        changed = {f"{split}_images": 255 - arrays[f"{split}_images"]}
        np.savez(copy, **(arrays | changed))
        refused = call_program(*typed, cwd=tmp_path)
        assert refused.returncode == 2
        (line,) = refused.stderr.strip().splitlines()
        (run,) = (tmp_path / "results/temp").glob("1--*")
        before = json.loads((run / "config.json").read_text())["images"][split]
        folder = run.relative_to(tmp_path)
        assert f"the {split} images are not those that {folder} was started with" in line
        assert f"it was {before}" in line


def test_fast_says_what_it_chose_and_keeps_to_what_was_asked(tmp_path, tiny_npz):
    done = call_program("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, "--training-mode",
                        "SupCE", "--fast", "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: --fast is here fp32, channels-last, no compile" in done.stderr
    run = (tmp_path / "results/temp/latest_exp").resolve()
    config = json.loads((run / "config.json").read_text())["config"]
    chosen = {k: config[k] for k in ("precision", "channels_last", "compile")}
    assert chosen == {"precision": "fp32", "channels_last": True, "compile": False}


def test_the_network_is_validated_as_often_as_told_and_at_the_end(tmp_path, tiny_npz):
    done = call_program("train.py", "--dataset", f"npz:{tiny_npz}", *TINY, "--epochs", 3,
                        "--val-freq", 2, "--training-mode", "SupCE", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = (tmp_path / "results/temp/latest_exp").resolve()
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    validated = [r["monitor"] is not None for r in records if r["event"] == "epoch"]
    assert validated == [False, True, True]
