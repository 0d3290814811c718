"""Every flag that decides a number is seen to decide it, and what must decide none does not.

A row is a flag with another value than that of the run it is compared with. A new flag needs a row.
"""

import csv
import functools
import re
import shlex

import numpy as np
import pytest
import torch
from tiny import TinyEncoder, write_images

import eval_ssd
import eval_ssdk
import models
import train
from infra import checkpoints

PROGRAMS = {"train.py": train, "eval_ssd.py": eval_ssd, "eval_ssdk.py": eval_ssdk}
# The evaluations are of a checkpoint that says nothing of itself, so that flags say how it was
# trained.
EVALUATION = ("--ckpt bare.pth --training-mode SimCLR --dataset npz:good.npz --arch tiny --size 8 "
              "--normalize --ood npz:odd.npz --seed 3 --scores s.csv ")
BASE = {
    "train.py": "--training-mode SimCLR --dataset npz:good.npz --arch tiny --size 8 --epochs 2 "
    "--batch-size 12 --lr 0.05 --weight-decay 0.01 --normalize --seed 3 ",
    "eval_ssd.py": EVALUATION + "--clusters 3 ",
    "eval_ssdk.py": EVALUATION + "--k 1 --copies 3 ",
}
GREY = "--mean .4 .4 .4 --std .2 .2 .2"
CHANGES_BOTH_EVALUATIONS = [
    "--ckpt other.pth", "--arch wide --ckpt wide.pth", "--dataset npz:other.npz",
    "--in-classes 0,1", "--ood npz:other.npz", "--size 12", "--no-normalize", "--data-mode org",
    "--data-mode ssl", "--precision bf16", "--seed 4",
]
CHANGES = {
    "train.py": [
        "--seed 4", "--training-mode SupCon", "--training-mode SupCE", "--arch wide",
        "--dataset npz:other.npz", "--dataset npz --data-dir other.npz", "--in-classes 0,1",
        "--size 10", "--no-normalize", GREY, "--epochs 3", "--batch-size 11", "--lr 0.06",
        "--momentum 0.8", "--weight-decay 0.02", "--warmup", "--temperature 0.6",
        "--ckpt bare.pth", "--precision bf16",
        ("--std .3 .2 .2", GREY),  # beside GREY
        ("--mean .3 .4 .4", GREY),
        ("--no-cycle-momentum", "--warmup"),
        ("--num-classes 6", "--training-mode SupCE"),
    ],
    "eval_ssd.py": [
        *CHANGES_BOTH_EVALUATIONS, "--clusters 2", "--score ssd knn --neighbours 3",
        ("--neighbours 5", "--score ssd knn --neighbours 3"),
    ],
    "eval_ssdk.py": [*CHANGES_BOTH_EVALUATIONS, "--k 2", "--copies 2"],
}
CHANGES_NOTHING_AT_ALL = "--exp-name e --results-dir elsewhere --gpu 0 --no-download"
KEEPS_BOTH_EVALUATIONS = [CHANGES_NOTHING_AT_ALL, "--batch-size 7", "--workers 2", "--cache-dir c",
                          "--feature-store f", "--data-dir elsewhere"]
KEEPS = {
    "train.py": [
        f"{CHANGES_NOTHING_AT_ALL} --method m --no-resume", "--print-freq 1", "--save-freq 1",
        "--save-steps 1", "--val-freq 2", "--workers 0", "--channels-last", "--deterministic",
    ],
    "eval_ssd.py": [*KEEPS_BOTH_EVALUATIONS, "--export e.npz"],
    "eval_ssdk.py": [*KEEPS_BOTH_EVALUATIONS, "--clusters 1"],
}
# Flags that tests of their own are about
ELSEWHERE = {
    "train.py": "--config --compile --fast --sync-bn",
    "eval_ssd.py": "--config --classes --training-mode --encoder --features --scores --plot",
    "eval_ssdk.py": "--config --classes --training-mode --encoder --scores --plot",
}


class WideEncoder(TinyEncoder):
    width = 12


def run(call, folder, script, flags):
    done = call(script, *shlex.split(flags), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def train_weights(call, folder, flags):
    """Train in a folder: the weights."""
    done = run(call, folder, "train.py", flags)
    place = folder / done.stdout.partition("run folder ")[2].splitlines()[0]
    return checkpoints.load_checkpoint(place / "checkpoint/checkpoint.pth.tar")[0]


@pytest.fixture(scope="module")
def home(tiny_arch, call, tmp_path_factory):
    """A folder with image sets and checkpoints that hold weights alone."""
    folder = tmp_path_factory.mktemp("flags")
    for seed, name in enumerate(("good", "odd", "other")):
        write_images(folder / f"{name}.npz", train=40, test=24, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.ARCHITECTURES, "wide", WideEncoder)
        for name, flags in (("bare", ""), ("other", "--seed 5"), ("wide", "--arch wide")):
            weights = train_weights(call, folder, f"{BASE['train.py']} --exp-name {name} {flags}")
            torch.save(weights, folder / f"{name}.pth")
        yield folder


@pytest.fixture(scope="module")
def outcome(home, call):
    """Function (script, flags) -> what comes out: weights of the encoder, or all scores; float."""
    @functools.cache
    def of(script, flags):
        if script == "train.py":
            weights = train_weights(call, home, f"{BASE[script]} --no-resume {flags}")
            return weights["encoder.conv.weight"].numpy().ravel()
        run(call, home, script, BASE[script] + flags)
        return np.array([float(row["score"]) for row in csv.DictReader((home / "s.csv").open())])

    return of


def table(rows):
    return pytest.mark.parametrize(
        ("script", "flags"), [(script, flags) for script in rows for flags in rows[script]])


@table(CHANGES)
def test_a_flag_decides_a_number(outcome, script, flags):
    flags, beside = (flags, "") if isinstance(flags, str) else flags
    before, now = outcome(script, beside), outcome(script, f"{beside} {flags}")
    assert np.isfinite(now).all()
    assert before.shape != now.shape or not np.allclose(before, now, rtol=1e-4, atol=1e-6)


@table(KEEPS)
def test_a_flag_decides_no_number(outcome, script, flags):
    atol = 1e-5 if flags in ("--batch-size 7", "--channels-last") else 0  # rounding
    np.testing.assert_allclose(outcome(script, flags), outcome(script, ""), rtol=atol, atol=atol)


@pytest.mark.parametrize("script", PROGRAMS)
def test_every_flag_has_a_row(script):
    rows = " ".join(" ".join(row) if isinstance(row, tuple) else row
                    for row in (*CHANGES[script], *KEEPS[script], ELSEWHERE[script]))
    known = set(re.findall(r"--[a-z][a-z-]*", rows)) | {"--help"}
    missing = [action.option_strings for action in PROGRAMS[script].parser()._actions
               if not known & set(action.option_strings)]
    assert not missing
