"""Configuration, run folders, whole files, checkpoints of all dialects, generators."""

import argparse
import functools
import json
import os

import numpy as np
import pytest
import torch

import models
import utils
from infra import checkpoints, storage


def small_parser():
    p = utils.Parser("a program")
    p.add_argument("--epochs", type=utils.number(int, 1), default=500)
    p.add_argument("--lr", type=utils.number(float, above=0), default=0.5)
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--clusters", type=utils.number(int, 1), nargs="+", default=[1])
    p.add_argument("--exp-name", type=utils.experiment, default="temp")
    p.add_argument("--mean", type=utils.number(float, 0, 1), nargs=3, metavar=("R", "G", "B"))
    p.add_argument("--mode", choices=["slow", "slower"])
    p.add_argument("--ckpt", required=True)
    return p


def parse(tmp_path, text, *argv):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return utils.parse_args(small_parser(), ["--config", str(path), *argv])


def test_a_file_replaces_defaults_and_the_command_line_wins(tmp_path):
    text = ("epochs: 20\nlr: 1e-3\nnormalize: true\nclusters: [1, 6]\nexp-name: a\nckpt: x.pt\n"
            "mean: [0, 0.5, 1]\n")
    args = parse(tmp_path, text, "--lr", "0.25", "--no-normalize")
    assert vars(args) == {
        "config": str(tmp_path / "c.yaml"), "epochs": 20, "lr": 0.25, "normalize": False,
        "clusters": [1, 6], "exp_name": "a", "ckpt": "x.pt", "mean": [0, 0.5, 1],
        "mode": None,
    }


def test_keys_may_be_written_with_either_dash(tmp_path):
    assert parse(tmp_path, "exp_name: b\nckpt: x").exp_name == "b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["unknown key 'epoch'", "ckpt, clusters, epochs, exp-name, lr"]),
        ("epochs: 3\nepochs: 4", ["key 'epochs' is given 2 times"]),
        ("exp-name: a\nexp_name: b", ["key 'exp-name' is given 2 times"]),
        ("epochs: fast", ["epochs", "an integer at least 1", "'fast'"]),
        ("epochs: 1.5", ["epochs", "an integer", "1.5"]),
        ("epochs: yes", ["epochs", "one value", "True"]),
        ("lr: true", ["lr", "one value", "True"]),
        ("epochs: 0", ["epochs", "at least 1"]),
        ("epochs: 99999999999", ["epochs", "at most 2147483647"]),
        ("lr: .nan", ["lr", "above 0", "nan"]),
        ("lr: .inf", ["lr", "above 0", "inf"]),
        ("epochs: [1, 2]", ["epochs", "one value, not [1, 2]"]),
        ("epochs: {a: 1}", ["epochs", "one value"]),
        ("epochs:", ["epochs", "None"]),
        ("normalize: 1", ["normalize", "true or false"]),
        ("no-normalize: true", ["unknown key 'no-normalize'"]),
        ("clusters: []", ["clusters", "a list of 1"]),
        ("clusters: [1, x]", ["clusters", "'x'"]),
        ("mean: 0.5", ["mean", "a list of 3"]),
        ("mean: [0.5, 0.5]", ["mean", "a list of 3"]),
        ("mean: [0.5, 0.5, 123.7]", ["mean", "at most 1"]),
        ("mean: [0.5, 0.5, null]", ["mean", "one value, not None"]),
        ("exp-name: 3", ["exp-name", "text"]),
        ("exp-name: ../x", ["exp-name", "not a name below the results folder"]),
        ('exp-name: "a\\0b"', ["exp-name", "text", "\\x00"]),
        ("mode: fast", ["mode", "expected one of slow, slower, not 'fast'"]),
        ("- epochs", ["'flag: value' lines"]),
        ("a: b: c", ["not YAML"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_key_and_what_is_allowed(
    tmp_path, text, words
):
    with pytest.raises(utils.UserError) as error:
        parse(tmp_path, text, "--ckpt", "x")
    assert all(w in str(error.value) for w in [str(tmp_path / "c.yaml"), *words]), error.value


def test_a_required_flag_stands_in_the_file_or_on_the_command_line(tmp_path):
    with pytest.raises(utils.UserError, match="required: --ckpt"):
        parse(tmp_path, "epochs: 2")


@pytest.mark.parametrize(
    ("text", "classes"), [("0-4", (0, 1, 2, 3, 4)), ("0,3,7", (0, 3, 7)), ("8,0-2", (0, 1, 2, 8))]
)
def test_class_lists(text, classes):
    assert utils.class_list(text) == classes


@pytest.mark.parametrize("text", ["", "a", "3-", "5-2", "1,1", "0-3,2", "-1", "100000",
                                  "0-9999999999999999"])
def test_class_lists_that_mean_nothing_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        utils.class_list(text)


def test_generators_are_functions_of_their_key():
    def draw(*key):
        return torch.rand(3, generator=utils.generator(*key)).tolist()

    keys = [(0, "order", 1), (0, "order", 2), (1, "order", 1), (0, "weights", 1), (0, 1, "order")]
    assert draw(0, "order", 1) == draw(0, "order", 1)
    assert len({tuple(draw(*k)) for k in keys}) == len(keys)


def test_a_file_that_fails_halfway_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), storage.atomic_write(path, "w", encoding="ascii") as f:
        f.write("half of the new o" * 1000 + "\N{SNOWMAN}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with storage.atomic_write(path, "w") as file:
        file.write("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# --- checkpoints ----------------------------------------------------------------------------------


@functools.cache
def build(head):
    return models.build_model("resnet18", head, 10, torch.Generator().manual_seed(0))


def prefixed(state, form):
    if form == "DataParallel":  # SupContrast wraps the encoder alone
        return {k.replace("encoder.", "encoder.module."): v for k, v in state.items()}
    if form == "DDP":
        return {f"module.{k}": v for k, v in state.items()}
    return state


def in_dialect(state, dialect):
    if dialect == "original":
        return {"epoch": 3, "arch": "resnet18", "state_dict": state, "best_prec1": np.float64(9.5),
                "optimizer": {"state": {}, "param_groups": []}}
    if dialect == "SupContrast":
        opt = argparse.Namespace(batch_size=900, temp=0.5, cosine=True, model="resnet18")
        return {"opt": opt, "model": state, "optimizer": {}, "epoch": 500}
    return state


@pytest.mark.parametrize("head", ["projection", "classifier"])
@pytest.mark.parametrize("form", ["plain", "DataParallel", "DDP"])
@pytest.mark.parametrize("dialect", ["original", "SupContrast", "bare"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_dialect_and_form_of_keys_gives_the_same_weights(
    tmp_path, head, form, dialect, legacy
):
    whole = build(head).state_dict()
    state = {k: v for k, v in whole.items() if "layer4" not in k}  # the most bytes, no other keys
    path = tmp_path / "x.pth"
    torch.save(in_dialect(prefixed(state, form), dialect), path,
               _use_new_zipfile_serialization=not legacy)
    loaded, rest = checkpoints.load_checkpoint(path)
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    assert ("epoch" in rest) == (dialect != "bare")
    if dialect == "original":
        assert rest["best_prec1"] == 9.5
    models.restore(build(head), {**whole, **loaded})


def test_the_name_that_older_numpy_gave_its_scalars_is_read_too(tmp_path):
    path = tmp_path / "x.pth"
    content = {"state_dict": {"a": torch.zeros(1)}, "best_prec1": np.float64(9.5)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"numpy._core.multiarray") == 1
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert checkpoints.load_checkpoint(path)[1]["best_prec1"] == 9.5


def test_numpy_objects_other_than_a_float_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": np.zeros(3)}, path)
    with pytest.raises(utils.UserError, match="more than tensors and plain types"):
        checkpoints.load_checkpoint(path)


def test_what_is_saved_loads_without_running_code(tmp_path):
    path = tmp_path / "x.pth.tar"
    config = utils.to_json_types({"in_classes": (0, 1), "lr": 0.5, "size": 8, "ckpt": None})
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 1, "config": config}, path)
    content = torch.load(path, weights_only=True)
    assert content["config"] == {"in_classes": [0, 1], "lr": 0.5, "size": 8, "ckpt": None}
    json.dumps(content["config"])


def test_whole_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with storage.atomic_write(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
