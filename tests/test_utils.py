"""Configuration, run folders, whole files, checkpoints of all dialects, generators."""

import argparse
import json
import os

import numpy as np
import pytest
import torch

import models
import utils


def small_parser():
    p = utils.Parser("a program")
    p.add_argument("--epochs", type=utils.number(int, 1), default=500)
    p.add_argument("--lr", type=utils.number(float, above=0), default=0.5)
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--clusters", type=utils.number(int, 1), nargs="+", default=[1])
    p.add_argument("--exp-name", default="temp")
    p.add_argument("--mean", type=utils.number(float, 0, 1), nargs=3, metavar=("R", "G", "B"))
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
    }


def test_keys_may_be_written_with_either_dash(tmp_path):
    assert parse(tmp_path, "exp_name: b\nckpt: x").exp_name == "b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["unknown key 'epoch'", "clusters, epochs, exp-name, lr, mean, normalize"]),
        ("epochs: 3\nepochs: 4", ["key 'epochs' stands 2 times"]),
        ("epochs: 1.5", ["epochs", "whole number"]),
        ("epochs: yes", ["epochs", "True"]),
        ("epochs: 0", ["epochs", "at least 1"]),
        ("epochs: [1, 2]", ["epochs", "not a list"]),
        ("epochs:", ["epochs", "None"]),
        ("normalize: 1", ["normalize", "true or false"]),
        ("clusters: []", ["clusters", "at least one"]),
        ("clusters: [1, x]", ["clusters", "'x'"]),
        ("mean: 0.5", ["mean", "a list of 3"]),
        ("mean: [0.5, 0.5]", ["mean", "a list of 3"]),
        ("mean: [0.5, 0.5, 123.7]", ["mean", "at most 1"]),
        ("mean: [0.5, 0.5, null]", ["mean", "R G B is needed"]),
        ("exp-name: 3", ["exp-name", "text"]),
        ("- epochs", ["'flag: value' lines"]),
        ("a: b: c", ["not YAML"]),
    ],
)
def test_a_file_that_can_not_be_used_ends_with_one_line(tmp_path, capsys, text, words):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, text, "--ckpt", "x")
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(w in line for w in words), line


@pytest.mark.parametrize(
    ("text", "classes"), [("0-4", (0, 1, 2, 3, 4)), ("0,3,7", (0, 3, 7)), ("8,0-2", (0, 1, 2, 8))]
)
def test_class_lists(text, classes):
    assert utils.class_list(text) == classes


@pytest.mark.parametrize("text", ["", "a", "3-", "5-2", "1,1", "0-3,2", "-1"])
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
    with pytest.raises(UnicodeEncodeError), utils.whole_file(path, "w", encoding="ascii") as file:
        file.write("half of the new o" * 1000 + "\N{SNOWMAN}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with utils.whole_file(path, "w") as file:
        file.write("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# --- checkpoints ----------------------------------------------------------------------------------


def network_state(mode="SimCLR"):
    network = models.build_model("resnet18", mode, 10, torch.Generator().manual_seed(0))
    return network.state_dict()


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


@pytest.mark.parametrize("mode", ["SimCLR", "SupCE"])
@pytest.mark.parametrize("form", ["plain", "DataParallel", "DDP"])
@pytest.mark.parametrize("dialect", ["original", "SupContrast", "bare"])
@pytest.mark.parametrize("legacy", [False, True])
def test_every_dialect_and_form_of_keys_gives_the_same_weights(
    tmp_path, mode, form, dialect, legacy
):
    state = network_state(mode)
    path = tmp_path / "x.pth"
    torch.save(in_dialect(prefixed(state, form), dialect), path,
               _use_new_zipfile_serialization=not legacy)
    loaded, rest = utils.load_checkpoint(path)
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    assert ("epoch" in rest) == (dialect != "bare")
    if dialect == "original":
        assert rest["best_prec1"] == 9.5
    models.restore(models.build_model("resnet18", mode, 10), loaded)


def test_the_name_that_older_numpy_gave_its_scalars_is_read_too(tmp_path):
    path = tmp_path / "x.pth"
    content = {"state_dict": {"a": torch.zeros(1)}, "best_prec1": np.float64(9.5)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"numpy._core.multiarray") == 1
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert utils.load_checkpoint(path)[1]["best_prec1"] == 9.5


def test_numpy_objects_other_than_a_float_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": np.zeros(3)}, path)
    with pytest.raises(utils.UserError, match="more than tensors and plain types"):
        utils.load_checkpoint(path)


def test_what_is_saved_loads_without_running_code(tmp_path):
    path = tmp_path / "x.pth.tar"
    config = utils.plain({"in_classes": (0, 1), "lr": 0.5, "size": 8, "ckpt": None})
    torch.save({"state_dict": network_state(), "epoch": 1, "config": config}, path)
    content = torch.load(path, weights_only=True)
    assert content["config"] == {"in_classes": [0, 1], "lr": 0.5, "size": 8, "ckpt": None}
    json.dumps(content["config"])


def test_whole_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with utils.whole_file(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("files", "left"), [
    ({}, 3 * 1024),
    ({"memory.max": "2000", "memory.stat": "anon 500\nfile 1400\n"}, 1500),
    ({"memory.max": "max", "memory.stat": "anon 500\n"}, 3 * 1024),
    ({"../memory.max": "1000", "../memory.stat": "file 7\nanon 300\n"}, 700),
], ids=["no group", "a group", "a group without a limit", "a group in a group"])
def test_the_memory_that_is_left_is_that_of_the_machine_or_of_a_control_group(
    tmp_path, monkeypatch, files, left
):
    group = tmp_path / "sys/fs/cgroup/job/task"
    group.mkdir(parents=True)
    for name, text in files.items():
        (group / name).write_text(text)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/other\n0::/job/task\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  3 kB\n")
    path = utils.Path
    monkeypatch.setattr(utils, "Path", lambda first, *more: path(f"{tmp_path}{first}", *more))
    assert utils.available_memory() == left
