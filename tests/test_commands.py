"""The programs as a user types them: what they print, write, and how the numbers come about."""

import argparse
import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image

import data
import detection
import features
import models
import train
import trainers
import utils
from infra import checkpoints, storage

LINE = re.compile(
    r"In-data = (\S+), OOD = (\S+), Clusters = (\d+), "
    r"FPR95 = ([\d.e-]+), AUROC = ([\d.e-]+), AUPR = ([\d.e-]+)"
)
SMALL = ("--training-mode", "SimCLR", "--arch", "resnet18", "--size", 8, "--epochs", 2,
         "--batch-size", 16, "--lr", 0.05)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_of(folder):
    return (folder / "results/temp/latest_exp").resolve()


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(command, call, tmp_path_factory, tiny_npz):
    """Function (mode) -> (folder, stdout) of a training of two epochs, SimCLR's in a process."""

    @functools.cache
    def run(mode):
        home, start = tmp_path_factory.mktemp(mode), command if mode == "SimCLR" else call
        done = start("train.py", "--dataset", "npz", "--data-dir", tiny_npz, *SMALL,
                     "--training-mode", mode, "--normalize", "--save-freq", 1, "--print-freq", 2,
                     cwd=home, env=environment())
        assert done.returncode == 0, done.stderr
        return home, done.stdout

    return run


@pytest.mark.parametrize("mode", ["SimCLR", "SupCE"])
def test_training_writes_the_folders_logs_and_checkpoints_of_the_original(training, mode):
    home, stdout = training(mode)
    run = run_of(home)
    assert run.name == "1--dataset-npz-arch-resnet18-lr-0.05_epochs-2"
    # What collects the original's epochs by checkpoint_*.pth.tar finds them alone.
    names = ["checkpoint", "checkpoint_1", "checkpoint_2", "model_best", "previous"]
    files = sorted(f.name for f in (run / "checkpoint").iterdir())
    assert files == [f"{n}.pth.tar" for n in names]

    saved = torch.load(run / "checkpoint/checkpoint.pth.tar", weights_only=True)
    originals = {"epoch", "arch", "state_dict", "best_prec1", "optimizer"}
    assert originals | {"config", "progress"} == set(saved)
    assert (saved["epoch"], saved["arch"]) == (2, "resnet18")
    assert saved["config"]["training_mode"] == mode
    assert all(k.startswith(("encoder.", "head.")) for k in saved["state_dict"])

    log = records(run / "log.jsonl")
    assert log[0]["event"] == "start"
    assert log[0]["config"] == saved["config"]
    steps = [r for r in log if r["event"] == "step"]
    assert [(r["epoch"], r["step"]) for r in steps] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    epochs = [r for r in log if r["event"] == "epoch"]
    assert [r["epoch"] for r in epochs] == [0, 1]
    assert all(0 <= r["monitor"] <= 1 for r in epochs)
    assert epochs[-1]["best"] == max(r["monitor"] for r in epochs)
    assert saved["best_prec1"] == 100 * epochs[-1]["best"]  # per cent, as in the original
    kind = "top-1" if mode == "SupCE" else "20-NN"
    assert epochs[0]["monitor_name"] == f"{kind} accuracy on the test images"
    best = torch.load(run / "checkpoint/model_best.pth.tar", weights_only=True)
    assert epochs[best["epoch"] - 1]["monitor"] == max(r["monitor"] for r in epochs)

    text = (run / "setup.log").read_text()
    assert text.startswith("Namespace(")
    score, best = (100 * epochs[1][key] for key in ("monitor", "best"))
    lines = text.splitlines()  # the original's, to its end, and ours below it
    at = lines.index(f"Epoch 1, validation accuracy {score}, best_prec {best}")
    assert lines[at + 1].startswith(f"Epoch 1: loss {epochs[1]['loss']:.4f}, lr ")
    assert text in stdout


def test_the_same_settings_train_to_the_same_weights_in_a_new_run_folder(call, tmp_path, tiny_npz):
    (tmp_path / "run.yaml").write_text(
        f"dataset: npz:{tiny_npz}\narch: resnet18\nsize: 8\nepochs: 1\nbatch_size: 16\nlr: 0.1\n"
        "training-mode: SupCon\n")
    flags = ("--dataset", f"npz:{tiny_npz}", *SMALL, "--epochs", 1, "--training-mode", "SupCon")
    weights = []
    # The command line wins over a file of settings.
    for number, argv in enumerate([flags, ("--lr", 0.05, "--config", "run.yaml")], start=1):
        done = call("train.py", *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert run_of(tmp_path).name.startswith(f"{number}--")
        path = run_of(tmp_path) / "checkpoint/checkpoint.pth.tar"
        weights.append(torch.load(path, weights_only=True)["state_dict"])
    assert os.path.islink(tmp_path / "results/temp/latest_exp")
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_the_warm_up_comes_on_top_and_is_not_watched(call, tmp_path, tiny_npz, monkeypatch):
    assert trainers.WARMUP_EPOCHS == 10
    monkeypatch.setattr(trainers, "WARMUP_EPOCHS", 2)
    done = call(
        "train.py", "--dataset", f"npz:{tiny_npz}", *SMALL, "--epochs", 1, "--batch-size", 48,
        "--warmup", "--save-freq", 1, cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    epochs = [r for r in records(run_of(tmp_path) / "log.jsonl") if r["event"] == "epoch"]
    assert [r["epoch"] for r in epochs] == list(range(-2, 1))
    assert [r["monitor"] is None for r in epochs] == [True] * 2 + [False]
    assert [round(r["momentum"], 6) for r in epochs[:2]] == [0.9, 0.85]
    assert (epochs[0]["lr"], epochs[2]["lr"], epochs[2]["momentum"]) == (
        0.01, 0.05, pytest.approx(0.8)
    )
    folder = run_of(tmp_path) / "checkpoint"
    assert torch.load(folder / "model_best.pth.tar", weights_only=True)["epoch"] == 1
    names = {f.name for f in folder.iterdir()} - {"previous.pth.tar"}
    assert names == {f"{n}.pth.tar" for n in ("checkpoint", "checkpoint_1", "model_best")}


def test_images_without_classes_train_and_the_loss_chooses_the_best(call, tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 6)):
        (tmp_path / "good" / split).mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 256, (12, 15, 3)).astype(np.uint8))
            image.save(tmp_path / "good" / split / f"{i}.png")
    done = call("train.py", "--dataset", "folder", "--data-dir", "good", *SMALL, "--epochs", 1,
                "--normalize", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    epochs = [r for r in records(run_of(tmp_path) / "log.jsonl") if r["event"] == "epoch"]
    assert [r["monitor"] for r in epochs] == [-r["loss"] for r in epochs]
    assert "training loss" in epochs[0]["monitor_name"]
    assert "accuracy" not in done.stdout.split("done:")[0].split("Epoch 0")[1]

    best = run_of(tmp_path) / "checkpoint/model_best.pth.tar"
    (tmp_path / "odd").mkdir()
    image.save(tmp_path / "odd/x.png")
    done = call(
        "eval_ssd.py", "--ckpt", best, "--ood", "folder:odd", "--scores", "s.csv", cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [r["image"] for r in rows[:6]] == [f"{tmp_path}/good/test/{i}.png" for i in range(6)]
    assert [(r["set"], r["image"]) for r in rows[6:]] == [("folder:odd", "odd/x.png")]


def test_a_checkpoint_starts_a_training_from_its_weights(call, tmp_path, tiny_npz, trained):
    done = call(
        "train.py", "--dataset", f"npz:{tiny_npz}", *SMALL, "--epochs", 1, "--lr", 1e-4,
        "--ckpt", trained, "--normalize", cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ours = torch.load(run_of(tmp_path) / "checkpoint/checkpoint.pth.tar", weights_only=True)
    before, _ = checkpoints.load_checkpoint(trained)
    name = "encoder.layer1.0.conv1.weight"
    change = (ours["state_dict"][name] - before[name]).abs().max()
    assert 0 < change < 1e-3  # fresh weights would differ by 0.1


@pytest.mark.parametrize(
    ("script", "flags"),
    [("train.py", ["--method", "x", "--gpu", "1"]), ("eval_ssd.py", ["--gpu", "0"]),
     ("eval_ssdk.py", ["--gpu", "0"])],
)
def test_dead_flags_are_accepted_and_say_that_they_do_nothing(call, tmp_path, script, flags):
    more = [*SMALL, "--dataset", "npz:none.npz"] if script == "train.py" else ["--ckpt", "none"]
    done = call(script, *more, *flags, cwd=tmp_path)
    for flag in flags[::2]:
        assert f"{script}: note: {flag} does nothing" in done.stderr


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(call, trained, other_npz, tmp_path_factory):
    """An evaluation with one and three clusters, scores and plots; (folder, stdout)."""
    home = tmp_path_factory.mktemp("evaluated")
    done = call(
        "eval_ssd.py", "--ckpt", trained, "--ood", f"npz:{other_npz}", "digits",
        "--clusters", 1, 3, "--scores", "out/s.csv", "--plot", "--exp-name", "e", cwd=home,
    )
    assert done.returncode == 0, done.stderr
    return home, done.stdout


def test_a_line_for_each_set_and_number_of_clusters_has_the_form_of_the_original(
    evaluated, other_npz, tiny_npz
):
    home, stdout = evaluated
    lines = (home / "eval_results/e_ssd.txt").read_text().splitlines()
    assert "\n".join(lines) in stdout
    parsed = [LINE.fullmatch(line) for line in lines]
    assert all(parsed), lines
    other = f"npz:{other_npz}"
    assert [(m[2], m[3]) for m in parsed] == [
        (other, "1"), (other, "3"), ("digits", "1"), ("digits", "3")
    ]
    assert {m[1] for m in parsed} == {f"npz:{tiny_npz}"}
    for match, record in zip(parsed, records(home / "eval_results/e_ssd.jsonl"), strict=True):
        shown = tuple(float(v) for v in match.groups()[3:])
        assert shown == (record["fpr95"], record["auroc"], record["aupr"])


def test_records_say_what_was_measured_on_what(evaluated, trained):
    home, _ = evaluated
    first = records(home / "eval_results/e_ssd.jsonl")[0]
    assert (first["n_train"], first["n_in"], first["n_ood"]) == (48, 32, 24)
    assert first["sha256"] == storage.file_hash(trained)
    assert (first["seed"], first["size"], first["normalize"]) == (12345, 8, True)
    assert {"fpr95_ood_positive", "aupr_in", "versions", "arch", "training_mode"} <= set(first)
    assert first["versions"]["torch"] == torch.__version__


def test_scores_are_those_of_the_detector_on_the_features_of_the_encoder(
    evaluated, trained, tiny_npz, other_npz
):
    home, _ = evaluated
    rows = list(csv.DictReader((home / "out/s.csv").open()))
    digits = [r for r in rows if r["set"] == "digits" and r["clusters"] == "1"]
    assert len(digits) == len(data.load("digits", "test", data_dir=".", size=8))
    assert [int(r["image"]) for r in digits] == list(range(len(digits)))

    state, rest = checkpoints.load_checkpoint(trained)
    network = models.build_model("resnet18", "projection").eval()
    models.restore(network, state)
    mean, std = (torch.tensor(rest["config"][k]).view(1, 3, 1, 1) for k in ("mean", "std"))

    def encode(pixels):
        with torch.no_grad():
            return network.encoder((pixels.float() / 255 - mean) / std)

    tiny = {s: data.load(f"npz:{tiny_npz}", s, data_dir=".", size=8) for s in ("train", "test")}
    detector = detection.SSD.fit(encode(tiny["train"].pixels))
    expected = detector.score(encode(tiny["test"].pixels))
    scored = [r for r in rows if r["set"] == f"npz:{tiny_npz}" and r["clusters"] == "1"]
    assert [r["label"] for r in scored] == [str(y) for y in tiny["test"].labels.tolist()]
    np.testing.assert_allclose([float(r["score"]) for r in scored], expected, rtol=2e-2)


def test_plots_are_pictures(evaluated):
    home, _ = evaluated
    for name in ("e_ssd_histograms.png", "e_ssd_roc.png"):
        with Image.open(home / "eval_results" / name) as image:
            image.load()
            assert min(image.size) > 200


def test_an_evaluation_is_repeatable_and_its_results_are_appended(
    command, call, tmp_path, trained, other_npz
):
    # Lists and required flags may stand in a file too; the command line wins over it.
    (tmp_path / "run.yaml").write_text(
        f"ckpt: {trained}\nood: ['npz:{other_npz}']\nclusters: [3]\ndata_mode: ssl\nseed: 7\n"
        "exp-name: by-file\n")
    flags = ("--ckpt", trained, "--ood", f"npz:{other_npz}", "--clusters", 3,
             "--data-mode", "ssl", "--seed", 7)
    # What this process has computed before leaves nothing behind.
    for start, argv in ((command, flags), (call, ("--config", "run.yaml"))):
        done = start("eval_ssd.py", *argv, "--exp-name", "x", "--scores", "s.csv", cwd=tmp_path,
                     env=environment())
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "eval_results/x_ssd.txt").read_text().splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert [r["seed"] for r in records(tmp_path / "eval_results/x_ssd.jsonl")] == [7, 7]


def test_features_do_not_depend_on_the_batch_size(trained, tiny_npz):
    state, _ = checkpoints.load_checkpoint(trained)
    network = models.build_model("resnet18", "projection")
    models.restore(network, state)
    images = data.load(f"npz:{tiny_npz}", "test", data_dir=".", size=8)
    for mode in ("base", "org", "ssl"):
        first, second = (
            features.extract(network.encoder, images, features.FeatureSettings(
                size=8, batch_size=b, mode=mode, seed=3))
            for b in (32, 7)
        )
        assert first.dtype == torch.float32
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert network.encoder.training


def test_one_class_against_the_rest(call, tmp_path, tiny_npz):
    done = call("train.py", "--dataset", f"npz:{tiny_npz}", "--in-classes", "0,3", *SMALL,
                "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = run_of(tmp_path) / "checkpoint/checkpoint.pth.tar"
    done = call("eval_ssd.py", "--ckpt", last, "--ood", "rest", "--scores", "s.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert {r["label"] for r in rows if r["set"] == f"npz:{tiny_npz}"} == {"0", "3"}
    assert {r["label"] for r in rows if r["set"] == "rest"} == {"1", "2"}
    assert len(rows) == 32


def test_the_clusters_of_a_classifier_are_its_classes(call, training, tmp_path, other_npz):
    last = run_of(training("SupCE")[0]) / "checkpoint/checkpoint.pth.tar"
    done = call("eval_ssd.py", "--ckpt", last, "--ood", f"npz:{other_npz}",
                   "--clusters", 2, 4, 9, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two, four, nine = records(tmp_path / "eval_results/temp_eval_ssd_ssd.jsonl")
    assert [r["clusters"] for r in (two, four, nine)] == [2, 4, 9]
    assert two["auroc"] == four["auroc"] == nine["auroc"]


def test_known_outliers_are_not_tested_on(command, tmp_path, trained, other_npz):
    done = command(
        "eval_ssdk.py", "--ckpt", trained, "--ood", f"npz:{other_npz}", "--k", 5, "--copies", 2,
        "--scores", "s.csv", "--plot", cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (record,) = records(tmp_path / "eval_results/temp_eval_ssd_ssdk.jsonl")
    assert (record["k"], record["copies"], record["n_known"], record["n_ood"]) == (5, 2, 10, 14)
    assert LINE.fullmatch((tmp_path / "eval_results/temp_eval_ssd_ssdk.txt").read_text().strip())
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    tested = [r for r in rows if r["set"] == f"npz:{other_npz}"]
    assert len(tested) == 14
    assert {r["against"] for r in rows} == {f"npz:{other_npz}"}


def test_foreign_checkpoints_evaluate_to_the_numbers_of_ours(
    call, tmp_path, trained, tiny_npz, other_npz
):
    state, _ = checkpoints.load_checkpoint(trained)
    forms = {
        "original": {"epoch": 1, "arch": "resnet18", "state_dict": state,
                     "best_prec1": np.float64(91.25),  # of SimCLR and SupCon
                     "optimizer": {}},
        "SupContrast": {
            "opt": argparse.Namespace(temp=0.5), "optimizer": {}, "epoch": 1,
            "model": {k.replace("encoder.", "encoder.module."): v for k, v in state.items()},
        },
        "bare": state,
        "DDP": {f"module.{k}": v for k, v in state.items()},
        "encoder": {k: v for k, v in state.items() if k.startswith("encoder.")},
        "uncounted": {"model": {"state_dict": {
            k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}}},
    }
    common = ("--ood", f"npz:{other_npz}")
    done = call("eval_ssd.py", "--ckpt", trained, *common, "--exp-name", "ours", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for form, content in forms.items():
        torch.save(content, tmp_path / "foreign.pth")
        done = call(
            "eval_ssd.py", "--ckpt", "foreign.pth", "--training-mode", "SimCLR", "--arch",
            "resnet18", "--dataset", f"npz:{tiny_npz}", "--size", 8, "--normalize", *common,
            "--exp-name", form, cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        ours, theirs = ((tmp_path / f"eval_results/{n}_ssd.txt").read_text()
                        for n in ("ours", form))
        assert ours == theirs


def test_help_is_grouped_and_shows_defaults(call, tmp_path):
    text = call("train.py", "--help", cwd=tmp_path).stdout
    for group in ("run:", "network:", "images:", "optimisation:"):
        assert f"\n{group}\n" in text
    assert "(default: 512)" in text
    assert "(default: resnet50)" in text


def test_importing_a_room_needs_neither_faiss_nor_matplotlib_nor_arguments(tmp_path):
    rooms = [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".")
             for folder in (ROOT, ROOT / "infra", ROOT / "report")
             for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
            f"import {', '.join(rooms)}\n"
            "heavy = {'faiss', 'matplotlib', 'torchvision', 'PIL', 'yaml'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- images in files ------------------------------------------------------------------------------

IMAGENET = (*SMALL, "--dataset", "imagenet", "--epochs", 1, "--batch-size", 10, "--lr", 0.01)
CONSTANTS = ("--normalize", "--mean", 0.5, 0.4, 0.3, "--std", 0.25, 0.25, 0.2)


def test_a_set_in_files_trains_and_is_evaluated_as_from_memory(call, tmp_path, tiny_imagenet):
    where = ("--data-dir", tiny_imagenet)
    done = call("train.py", *IMAGENET, *where, *CONSTANTS, "--workers", 2, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "24 training images, 12 test images of imagenet" in done.stdout
    assert "validation accuracy" in done.stdout
    weights = run_of(tmp_path) / "checkpoint/checkpoint.pth.tar"
    config = torch.load(weights, weights_only=True)["config"]
    assert [config["mean"], config["std"]] == [[0.5, 0.4, 0.3], [0.25, 0.25, 0.2]]
    assert config["constants"] == [config["mean"], config["std"]]
    assert config["in_files"]
    found = {}
    for workers in ((), ("--workers", 0)):
        done = call(
            "eval_ssd.py", "--ckpt", weights, "--ood", f"folder:{tiny_imagenet / 'odd'}",
            "--exp-name", f"w{len(workers)}", *workers, cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        record, = records(tmp_path / f"eval_results/w{len(workers)}_ssd.jsonl")
        assert (record["in"], record["n_train"], record["n_in"]) == ("imagenet", 24, 12)
        found[workers] = {key: record[key] for key in ("fpr95", "auroc", "aupr", "ood", "n_ood")}
    assert found[()] == found["--workers", 0]


def test_a_picture_that_cannot_be_decoded_ends_training_with_its_name(
    call, tmp_path, tiny_imagenet
):
    shutil.copytree(tiny_imagenet / "imagenet", tmp_path / "imagenet")
    broken = tmp_path / "imagenet/train/n01/3.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    done = call("train.py", *IMAGENET, "--data-dir", ".", "--workers", 2, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: cannot decode the image imagenet/train/n01/3")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("flags", "words"), [
    (("--mean", 0.5, 0.5, 0.5), "--mean and --std go together"),
    (("--mean", 0.5, 0.5, 0.5, "--std", 1, 1, 1), "constants of --normalize, and that is off"),
    (("--std", 0, 1, 1), "argument --std: expected a number at most 1 and above 0, not '0'"),
    (("--mean", 0.5, 0.5), "argument --mean: expected 3 arguments"),
    (("--workers", -1), "argument --workers: expected an integer at least 0"),
])
def test_flags_of_images_in_files_that_cannot_be_meant_are_refused(flags, words):
    with pytest.raises(utils.UserError, match=words):
        train.main(list(map(str, (*SMALL, *flags))))


def test_workers_without_files_are_noted(call, tmp_path, tiny_npz):
    done = call("train.py", "--dataset", f"npz:{tiny_npz}", *SMALL, "--batch-size", 1,
                "--workers", 2, cwd=tmp_path)
    assert "--workers does nothing: npz:" in done.stderr
    assert done.returncode == 2  # of the batch size; nothing has to be trained for this


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_recipe_is_one_that_train_takes(name):
    args = utils.parse_args(train.parser(), ["--config", str(ROOT / "configs" / name)])
    assert args.exp_name == name.removesuffix(".yaml")
    assert f"#   python train.py --config configs/{name}" in (ROOT / "configs" / name).read_text()
