"""Configuration, run folders, whole files, checkpoints of all dialects, generators."""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

import models
import utils
from infra import checkpoints, program, storage


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
        ("epochs: 2024-02-30", ["not YAML", "'2024-02-30'", "line 1"]),
        ("lr: 1\nepochs: !!int x", ["not YAML", "'x'", "line 2"]),
        ("epochs: 0x_", ["not YAML", "'0x_'"]),
        ("epochs: !!timestamp x", ["not YAML", "'x'"]),
        ("epochs: " + "1" * 5000, ["not YAML", "4300 digits"]),
        ("epochs: 0x" + "f" * 5000, ["not YAML", "4300 digits"]),
        ('ckpt: "\\ud800"', ["not YAML", "surrogates"]),
        ('"\\ud800": 1', ["not YAML", "surrogates"]),
        ("epochs: !!map x", ["not YAML"]),
        ("epochs: " + "[" * 3000, ["not YAML", "recursion"]),
        ("\n".join(f"k{i}: 1" for i in range(3000)), ["unknown key 'k0'"]),
        ("a: &a [x]\n" + "".join(f"{c}: &{c} [{f'*{b},' * 9}]\n" for b, c in
                                 itertools.pairwise("abcdefghijklmn")) + "lr: *n",
         ["unknown key 'a'"]),
        ("lr: &lr 1\nepochs: {<<: *lr}", ["not YAML", "for merging"]),
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


def test_a_value_made_of_aliases_of_aliases_is_not_printed_in_full(tmp_path):
    values = "[x]"
    for _ in range(40):
        values = f"[&a{_} {values}, *a{_}]"
    with pytest.raises(utils.UserError, match=r"epochs: expected one value, not \["):
        parse(tmp_path, f"epochs: [{values}]", "--ckpt", "x")


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


@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_numbers_of_every_type_are_read(tmp_path, legacy):
    path, types = tmp_path / "x.pth", np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"
    numbers = {code: np.dtype(code).type(1) for code in types} | {"swapped": np.array(1, ">f4")[()]}
    torch.save({"state_dict": {"a": torch.zeros(1)}, **numbers}, path,
               _use_new_zipfile_serialization=not legacy)
    assert checkpoints.load_checkpoint(path)[1] == dict.fromkeys(numbers, 1)


@pytest.mark.parametrize(
    ("thing", "name"),
    [(np.zeros(3), r"numpy\._core\.multiarray\._reconstruct"), (np.str_("x"), r"numpy\.str_"),
     (np.datetime64("2024-01-01"), r"numpy\.datetime64"), (pathlib.Path("x"), r"pathlib\..*Path"),
     (range(3), "range"), (np.void(b"x"), r"numpy\.void"), (torch.nn.ReLU(), r"\.ReLU")],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_neither_tensor_nor_plain_is_refused_by_its_type(tmp_path, thing, name):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": thing}, path)
    with pytest.raises(utils.UserError, match=rf"more than tensors and plain types \(.*{name}"):
        checkpoints.load_checkpoint(path)


def test_the_weights_are_those_that_the_original_takes(tmp_path):
    path, one, other = tmp_path / "x.pth", {"a": torch.ones(1)}, {"a": torch.zeros(1)}
    for content in ({"model": {"state_dict": one, "arch": "r"}, "epoch": 3},
                    {"model": one, "state_dict": other, "epoch": 3},
                    {"model": {"state_dict": one}, "state_dict": other, "epoch": 3},
                    {"model": "resnet18", "state_dict": one, "epoch": 3}):
        torch.save(content, path)
        state, rest = checkpoints.load_checkpoint(path)
        assert (list(state), state["a"].item(), rest["epoch"]) == (["a"], 1, 3)


def test_a_tilde_in_a_file_of_settings_or_behind_a_flag_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data-dir: ~/sets\ncache-dir: ~/cache\nexp-name: a~\n")
    p = utils.Parser("")
    for flag in ("--data-dir", "--cache-dir", "--exp-name", "--ckpt"):
        p.add_argument(flag)
    args = utils.parse_args(p, ["--config=~/run.yaml", "--ckpt=~/x.pth", "--cache-dir", "~no/x"])
    assert vars(args) | {"config": ""} == {
        "config": "", "data_dir": f"{tmp_path}/sets", "cache_dir": "~no/x", "exp_name": "a~",
        "ckpt": f"{tmp_path}/x.pth"}


def test_what_is_saved_loads_without_running_code(tmp_path):
    path = tmp_path / "x.pth.tar"
    config = utils.to_json_types({"in_classes": (0, 1), "lr": 0.5, "size": 8, "ckpt": None})
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 1, "config": config}, path)
    content = torch.load(path, weights_only=True)
    assert content["config"] == {"in_classes": [0, 1], "lr": 0.5, "size": 8, "ckpt": None}
    json.dumps(content["config"])


def partial_files(folder):
    return {path for path in folder.iterdir() if path.name.startswith(storage.PARTIAL)}


def test_what_killed_writers_left_is_swept_and_what_live_ones_write_stays(tmp_path):
    if os.fork() == 0:
        with storage.atomic_write(tmp_path / "x"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    (left,) = partial_files(tmp_path)
    with storage.atomic_write(tmp_path / "live") as file:
        live = partial_files(tmp_path)
        assert left not in live
        with storage.atomic_write(tmp_path / "y"):
            assert partial_files(tmp_path) > live
        file.write(b"z")
    assert {path.name for path in tmp_path.iterdir()} == {"live", "y"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
@pytest.mark.usefixtures("terminal")
def test_a_signal_ends_a_program_and_leaves_nothing_half_written(name, tmp_path, capsys):
    number = signal.Signals[name]
    before = signal.getsignal(number)

    def main():
        with storage.atomic_write(tmp_path / "x") as file:
            file.write(b"half")
            os.kill(os.getpid(), number)
            time.sleep(5)

    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(
            io.TextIOWrapper(io.BytesIO())) as said, pytest.raises(SystemExit) as end:
        program.run(main)
    assert end.value.code == 128 + number
    assert said.buffer.getvalue().count(b"\n") == 1
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("terminal")
def test_a_program_does_not_end_before_a_thread_that_it_was_starting_has_begun(capsys):
    ended = threading.Event()

    class Interrupting(threading.Thread):
        def _bootstrap(self):  # the first that the new thread does
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            super()._bootstrap()

    thread = Interrupting(target=ended.wait)
    with pytest.raises(SystemExit) as end:
        program.run(thread.start)
    assert end.value.code == 128 + signal.SIGTERM
    assert thread.is_alive()
    ended.set()
    thread.join()


def a_pipe_without_a_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("err", ["a file", "closed", "full", "a pipe without a reader"])
@pytest.mark.parametrize("out", ["a file", "closed", "full", "a pipe without a reader"])
def test_results_are_recorded_whatever_stdout_and_stderr_are(out, err, tmp_path):
    def main():
        for line in (b"1", b"2"):
            storage.append_lines(tmp_path / "results", line + b"\n")
            utils.say("\xe9\udcff")
        print("the end")

    if os.fork() == 0:  # as a shell starts a program, but without the seconds of an import
        try:
            for number, name, kind in ((1, "stdout", out), (2, "stderr", err)):
                if kind == "closed":
                    os.close(number)
                    setattr(sys, name, None)
                    continue
                os.dup2(a_pipe_without_a_reader() if "pipe" in kind else os.open(
                    "/dev/full" if kind == "full" else tmp_path / name,
                    os.O_WRONLY | os.O_CREAT), number)
                setattr(sys, name, open(number, "w", encoding="ascii"))  # noqa: SIM115
            program.run(main)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # as the interpreter does at its exit
            os._exit(0)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    assert (tmp_path / "results").read_text() == "1\n2\n"
    if err == "a file":
        notes = (tmp_path / "stderr").read_text().splitlines()
        assert all(note.endswith("stdout cannot be written to: No space left on device")
                   for note in notes)
        assert len(notes) == 2 * (out == "full")
    if out == "a file":
        assert (tmp_path / "stdout").read_bytes() == b"\\xe9\xff\n" * 2 + b"the end\n"


def test_whole_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with storage.atomic_write(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
