"""Bad input of every kind ends the programs with one line: where, what was found, what is allowed.

    pytest tests/test_bad_input.py        # half a minute on 1 core

Every case is a command as a user types it, run by `call` in this process; `command` starts a few of
them as processes. `refused` is the contract: one line on stderr, the right exit status, no
traceback, nothing half-written. Broken checkpoints of full size lie in `weights`, which goes at the
end.
"""

import hashlib
import itertools
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import environment
from PIL import Image

import models
from infra import checkpoints
from utils import UserError

# What torchvision.datasets has; written out, since importing it takes seconds.
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"  # of cifar-10-python.tar.gz
CIFAR10_BATCH_MD5 = "c99cafc152244af753f735de768cd75f"  # of data_batch_1
SVHN_MD5 = "e26dedcc434d2e4c54c9b2d4a06d8373"  # of train_32x32.mat
DTD_MD5 = "fff73e5086ae6bdbea199a49dfb8a4c1"  # of dtd-r1.0.1.tar.gz
GARBAGE = b"no image set has these bytes"
DARK = "http://127.0.0.1:9"  # a proxy that refuses at once: nothing listens on the discard port


# --- the commands and the contract ----------------------------------------------------------------


@pytest.fixture
def run(call, tmp_path):
    """Function (script, *arguments) -> what a program did in tmp_path without a download.

    start: `call`, or `command` for a new process. env: of that, beside this environment.
    """

    def run_here(script, *arguments, start=call, download=False, env=None):
        before = files_below(tmp_path)
        done = start(script, *arguments, *([] if download else ["--no-download"]), cwd=tmp_path,
                     env=environment(**(env or {})))
        done.cwd, done.before = tmp_path, before
        return done

    return run_here


@pytest.fixture
def train(run, tiny_npz):
    """Function (*arguments) -> train.py on tiny_npz; arguments override what stands here."""

    def run_train(*arguments, **kwargs):
        return run(
            "train.py", "--training-mode", "SimCLR", "--dataset", f"npz:{tiny_npz}", "--arch",
            "resnet18", "--size", 8, "--epochs", 1, "--batch-size", 16, *arguments, **kwargs,
        )

    return run_train


@pytest.fixture
def evaluate(run, other_npz):
    """Function (checkpoint, *arguments, script=...) -> an evaluation with other_npz as outliers."""

    def run_evaluation(checkpoint, *arguments, script="eval_ssd.py", **kwargs):
        return run(script, "--ckpt", checkpoint, "--ood", f"npz:{other_npz}", *arguments, **kwargs)

    return run_evaluation


@pytest.fixture
def foreign(bare, tiny_npz):
    """The arguments of `evaluate` for a foreign SimCLR ResNet-18, which says nothing of itself."""
    return (bare["SimCLR"], "--training-mode", "SimCLR", "--arch", "resnet18", "--size", 8,
            "--dataset", f"npz:{tiny_npz}")


def files_below(folder):
    """What lies in a folder: {path: (bytes, time of change)} of its files."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*")) if path.is_file()
    }


def error_line(done):
    """The line of a refusal, the only one on stderr that is no note; no traceback among them."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if ": note: " not in line]
    assert len(lines) == 1, done.stderr or f"nothing on stderr; stdout: {done.stdout}"
    return lines[0]


def refused(done, *words, status=2):
    """Assert that a program ended as bad input must end it; each word stands in its line.

    Bad input (status 2) leaves no file, no run folder and nothing on stdout. A failure while
    running (1) may have written; what, its test looks at.
    """
    line = error_line(done)
    script = os.path.basename(done.args[1])
    assert line.startswith(f"{script}: error: "), line
    for word in map(str, words):
        assert word in line, f"{word!r} is not in: {line}"
    assert done.returncode == status, f"status {done.returncode} of: {line}"
    if status == 2:
        assert done.stdout == ""
        assert files_below(done.cwd) == done.before
        assert not (done.cwd / "results").exists()


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [("train.py", "--in-classes 2-9", ["--in-classes", "0-3"]),
     ("eval_ssd.py", "--ckpt none.pth", ["none.pth", "no such file"]),
     ("eval_ssdk.py", "--ckpt none.pth --k 0", ["--k", "at least 1"])],
)
def test_a_process_ends_as_the_call_of_its_main_does(
    script, flags, words, run, train, command
):
    start = train if script == "train.py" else lambda *more, **kw: run(script, *more, **kw)
    process, called = start(*flags.split(), start=command), start(*flags.split())
    refused(process, *words)
    assert (process.returncode, process.stderr) == (called.returncode, called.stderr)


# --- checkpoints, sound and broken ----------------------------------------------------------------


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder for files of 45 MB, emptied at the end."""
    folder = tmp_path_factory.mktemp("weights")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def trained(trained, weights):
    """That of conftest.py less the state of its optimiser: half the bytes to read."""
    content = torch.load(trained, weights_only=True)
    del content["optimizer"]
    path = weights / "trained.pth.tar"
    torch.save(content, path)
    return path


@pytest.fixture(scope="session")
def states():
    """Weights of a ResNet-18: {training mode: state dict}; the SupCE one has 3 classes."""
    rng = torch.Generator().manual_seed(0)
    heads = {"SimCLR": "projection", "SupCE": "classifier"}
    return {mode: models.build_model("resnet18", head, 3, rng).state_dict()
            for mode, head in heads.items()}


@pytest.fixture(scope="session")
def bare(weights, states):
    """Foreign checkpoints: {training mode: path of a bare state dict}."""
    paths = {mode: weights / f"bare-{mode}.pth" for mode in states}
    for mode, path in paths.items():
        torch.save(states[mode], path)
    return paths


@pytest.fixture(scope="session")
def config(tiny_npz):
    """What train.py writes into a checkpoint: SupCE on the classes 0, 1, 2, not normalised."""
    return {
        "training_mode": "SupCE", "arch": "resnet18", "num_classes": 3, "size": 8,
        "dataset": f"npz:{tiny_npz}", "data_dir": "./datasets", "in_classes": [0, 1, 2],
        "normalize": False, "mean": None, "std": None,
    }


@pytest.fixture(scope="session")
def ours(weights, states, config):
    """A checkpoint as train.py writes it."""
    path = weights / "ours.pth.tar"
    state = {"epoch": 1, "arch": "resnet18", "state_dict": states["SupCE"], "config": config}
    torch.save(state, path)
    return path


class Bomb:
    """Unpickled by Python, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zip_file(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no checkpoint")


DAMAGED = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("weights\n" * 100), "not a torch checkpoint"),
    "a PNG": (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), "not a torch checkpoint"),
    "a zip of something else": (zip_file, "not a torch checkpoint"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "found list"),
    "a dict without weights": (lambda path: torch.save({"epoch": 3}, path), "holds no weights"),
    "tensors without names": (lambda path: torch.save({0: torch.ones(2)}, path), "no weights"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(kind, evaluate, tmp_path):
    path = tmp_path / "network.pth.tar"
    write, reason = DAMAGED[kind]
    write(path)
    refused(evaluate(path, "--training-mode", "SimCLR"), f"--ckpt {path}", reason)


def test_a_missing_checkpoint_is_refused_by_name(evaluate, tmp_path):
    refused(evaluate(tmp_path / "none.pth"), f"--ckpt {tmp_path / 'none.pth'}", "no such file")


def test_a_checkpoint_cut_in_half_is_refused(evaluate, trained, weights):
    path = weights / "half.pth.tar"
    with trained.open("rb") as file:
        path.write_bytes(file.read(trained.stat().st_size // 2))
    refused(evaluate(path), f"--ckpt {path}", "damaged")


@pytest.mark.parametrize(
    ("kind", "script"),
    [("a pickle", "eval_ssd.py"), ("torch.save", "eval_ssd.py"), ("torch.save", "train.py"),
     ("torch.save before 1.6", "eval_ssd.py")],
)
def test_code_in_a_checkpoint_never_runs(kind, script, train, evaluate, tmp_path):
    path, trace = tmp_path / "network.pth.tar", tmp_path / "the code ran"
    content = {"state_dict": {"encoder.conv1.weight": torch.ones(2)}, "epoch": Bomb(trace)}
    if kind == "a pickle":
        path.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch.save")
    if script == "train.py":
        done = train("--ckpt", path)
    else:
        done = evaluate(path, "--training-mode", "SimCLR")
    refused(done, f"--ckpt {path}", "mkdir", "could run code")
    assert not trace.exists()
    # The bomb is live: the loader that people use blows it up.
    if kind == "a pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_weights_that_are_not_finite_are_refused_by_name(evaluate, states, weights, foreign):
    state = {k: v.clone() for k, v in states["SimCLR"].items()}
    state["encoder.layer2.0.bn1.running_var"][5] = torch.nan
    path = weights / "not-finite.pth"
    torch.save(state, path)
    done = evaluate(path, *foreign[1:])
    refused(done, f"--ckpt {path}", "encoder.layer2.0.bn1.running_var", "not finite")


def test_features_that_overflow_are_refused_though_the_weights_are_finite(
    evaluate, states, weights, foreign
):
    state = {k: v.clone() for k, v in states["SimCLR"].items()}
    for key in ("encoder.conv1.weight", "encoder.bn1.weight"):
        state[key] *= 1e30
    path = weights / "overflow.pth"
    torch.save(state, path)
    refused(evaluate(path, *foreign[1:]), f"--ckpt {path}", "features", "not finite in 48 of 48")


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [({"arch": "resnet19"}, "arch = 'resnet19'"), ({"training_mode": ["BYOL"]}, "training_mode"),
     ({"num_classes": None}, "num_classes"), ({"size": -1}, "size = -1"),
     ({"size": 2**70}, "size"), ({"size": 10**9}, "size"),
     ({"in_classes": ["0-2"]}, "in_classes"), ({"in_classes": [2**80]}, "in_classes"),
     ({"normalize": None}, "normalize"),
     ({"normalize": True, "mean": ["0.5"] * 3, "std": [0.2] * 3}, "mean"),
     ({"normalize": True, "mean": [10**400] * 3, "std": [0.2] * 3}, "mean"),
     ({"normalize": True, "mean": [0.5] * 3, "std": [0.0] * 3}, "std"),
     ({"dataset": "npz:a\0b"}, "dataset"), ({"data_dir": "\ud800"}, "data_dir")],
    ids=str,
)
def test_a_config_that_train_cannot_have_written_is_refused(
    changes, wrong, evaluate, states, config, weights
):
    path = weights / "impossible.pth.tar"
    state = {"head.weight": states["SupCE"]["head.weight"]}
    torch.save({"state_dict": state, "config": config | changes}, path)
    refused(evaluate(path), f"--ckpt {path}: its config has {wrong}", "train.py never writes")


@pytest.mark.filterwarnings("ignore")  # torch's: quantised tensors are going
@pytest.mark.parametrize(
    "tensor",
    [lambda: torch.zeros(1).expand(60_000, 60_000), lambda: torch.zeros(1).expand(10**9, 512),
     lambda: torch.quantize_per_tensor(torch.zeros(3, 512), 0.1, 0, torch.quint8),
     lambda: torch.zeros(3, 512).to(torch.float8_e4m3fn)],
    ids=["expanded", "expanded head", "quantised", "float8"],
)
def test_a_tensor_that_is_larger_than_its_file_or_of_another_kind_is_refused_before_its_values(
    tensor, config, tmp_path
):
    path = tmp_path / "network.pth"
    torch.save({"state_dict": {"head.weight": tensor()}, "config": config}, path)
    with pytest.raises(UserError, match=r"head.weight is not a plain tensor"):
        checkpoints.load_checkpoint(path)


@pytest.mark.parametrize("theirs", ["resnet18.yaml", {"arch": {"depth": 18}}], ids=["text", "dict"])
def test_a_foreign_checkpoint_with_a_config_of_its_own_needs_its_training_mode(
    theirs, evaluate, states, weights
):
    path = weights / "theirs.pth"
    torch.save({"state_dict": states["SimCLR"], "config": theirs}, path)
    refused(evaluate(path), "--training-mode", path)


@pytest.mark.parametrize(
    ("flags", "found"),
    [(["--arch", "resnet34"], "--arch resnet18"),
     (["--training-mode", "SupCE"], "--training-mode SimCLR"),
     (["--size", "16"], "--size 8"),
     (["--no-normalize"], "--normalize on"),
     (["--dataset", "digits"], "--dataset npz:"),
     (["--in-classes", "0,1"], "--in-classes")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_that_contradicts_our_checkpoint_is_refused_with_both_values(
    flags, found, evaluate, trained
):
    said = {"--no-normalize": "--normalize off"}.get(flags[0], " ".join(flags))
    refused(evaluate(trained, *flags), said, f"contradicts the checkpoint {trained}", found)


@pytest.mark.parametrize(
    ("flags", "found"),
    [(["--classes", "7"], "classes 3"),
     (["--in-classes", "0,1"], "--in-classes 0,1,2"),
     (["--normalize"], "--normalize off")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_that_contradicts_our_classifier_is_refused_with_both_values(
    flags, found, evaluate, ours
):
    said = {"--normalize": "--normalize on"}.get(flags[0], " ".join(flags))
    refused(evaluate(ours, *flags, script="eval_ssdk.py"), said, "contradicts", ours, found)


def test_the_arch_of_an_original_checkpoint_is_believed(evaluate, states, weights):
    path = weights / "original.pth.tar"
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": states["SimCLR"]}, path)
    done = evaluate(path, "--training-mode", "SimCLR", "--arch", "resnet50")
    refused(done, "--arch resnet50", "contradicts", path, "--arch resnet18")


@pytest.mark.parametrize(
    ("holds", "flags", "keys"),
    [("SimCLR", "--training-mode SimCLR --arch resnet34",
      ["missing: encoder.layer1.2.conv1.weight"]),
     ("SimCLR", "--training-mode SimCLR",
      ["--arch resnet50", "missing: encoder.layer1.0.conv3.weight"]),
     ("SimCLR", "--training-mode SupCE --arch resnet18",
      ["missing: head.weight", "unknown: head.0.weight"]),
     ("SupCE", "--training-mode SimCLR --arch resnet18",
      ["missing: head.0.weight", "unknown: head.weight"]),
     ("SupCE", "--training-mode SupCE --arch resnet18 --classes 7",
      ["--classes 7", "head.weight is [3, 512], not [7, 512]"])],
    ids=["arch", "arch not given", "SimCLR as SupCE", "SupCE as SimCLR", "classes"],
)
def test_a_foreign_checkpoint_that_does_not_fit_is_refused_with_the_first_keys_that_differ(
    holds, flags, keys, evaluate, bare
):
    refused(evaluate(bare[holds], *flags.split()), f"--ckpt {bare[holds]}", *keys)


def test_a_foreign_checkpoint_needs_its_training_mode(evaluate, bare):
    done = evaluate(bare["SimCLR"], "--arch", "resnet18")
    refused(done, "--training-mode", bare["SimCLR"], "SimCLR, SupCon, SupCE")


def test_training_from_a_checkpoint_of_another_arch_is_refused(train, bare):
    done = train("--ckpt", bare["SimCLR"], "--arch", "resnet34")
    refused(done, f"--ckpt {bare['SimCLR']}", "--arch resnet34", "encoder.layer1.2.conv1.weight")


# --- image sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "eval_ssd.py"])
def test_missing_cifar10_is_refused_with_what_to_put_where(script, train, evaluate, trained):
    if script == "train.py":
        done = train("--dataset", "cifar10", "--data-dir", "sets")
    else:
        done = evaluate(trained, "--data-dir", "sets", "--ood", "cifar10")
    refused(done, "cifar-10-python.tar.gz", CIFAR10_MD5, "in sets/cifar10")


def test_missing_texture_is_refused_with_what_to_put_where(evaluate, trained):
    done = evaluate(trained, "--data-dir", "sets", "--ood", "texture")
    refused(done, "texture", "dtd-r1.0.1.tar.gz", DTD_MD5, "sets/dtd/images")


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [("cifar10", [f"cifar10/cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)],
      CIFAR10_BATCH_MD5),
     ("svhn", ["svhn/train_32x32.mat"], SVHN_MD5)],
    ids=["cifar10", "svhn"],
)
def test_a_corrupt_set_is_refused_with_the_file_and_both_checksums(
    name, files, expected, train, tmp_path
):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(GARBAGE)
    found = hashlib.md5(GARBAGE, usedforsecurity=False).hexdigest()
    done = train("--dataset", name, "--data-dir", tmp_path)
    refused(done, tmp_path / files[0], "corrupt", found, expected)


@pytest.mark.parametrize("name", ["cifar10", "texture"])
def test_a_download_that_fails_is_refused_with_the_reason(
    name, train, evaluate, trained, command
):
    # In processes of their own: urllib keeps the proxy that it was first used with.
    env = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), DARK)
    env |= {"no_proxy": "", "NO_PROXY": ""}
    if name == "cifar10":
        done = train("--dataset", name, "--data-dir", "sets", download=True, env=env,
                     start=command)
    else:
        done = evaluate(trained, "--ood", name, "--data-dir", "sets", download=True, env=env,
                        start=command)
    md5 = {"cifar10": CIFAR10_MD5, "texture": DTD_MD5}[name]
    refused(done, name, "download failed", "refused", md5)
    assert not (done.cwd / "sets").exists()


@pytest.fixture
def folder(tmp_path):
    """A set of six sound images in two classes, train/ and test/."""
    root = tmp_path / "photos"
    for split, kind, i in itertools.product(("train", "test"), ("cat", "dog"), range(3)):
        path = root / split / kind / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (20 * i, 50, 90)).save(path)
    return root


def test_a_folder_without_images_is_refused(train, tmp_path):
    (tmp_path / "photos/train/cat").mkdir(parents=True)
    (tmp_path / "photos/train/cat/notes.txt").write_text("no image")
    done = train("--dataset", f"folder:{tmp_path / 'photos'}")
    refused(done, tmp_path / "photos/train", "no images", ".png")


def test_a_folder_without_train_is_refused_as_training_images(train, folder):
    shutil.rmtree(folder / "train")
    refused(train("--dataset", f"folder:{folder}"), folder, "train/")


def test_an_image_that_cannot_be_decoded_is_named(train, folder):
    bad = folder / "train/dog/1.png"
    bad.write_bytes(GARBAGE)
    refused(train("--dataset", f"folder:{folder}"), bad, "cannot decode")


def test_an_image_cut_short_is_named(evaluate, trained, folder):
    bad = folder / "test/dog/1.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    refused(evaluate(trained, "--ood", f"folder:{folder}"), bad, "cannot decode")


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "GIF"])
def test_an_image_of_a_format_that_no_suffix_of_ours_has_is_not_opened(
    content, train, folder, monkeypatch
):
    """PIL chooses by content, and would have Ghostscript run that of a PostScript file."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it was run"))
    bad = folder / "train/dog/1.png"
    if content == "GIF":
        Image.new("RGB", (9, 8)).save(bad, "GIF")
    else:
        bad.write_bytes(content)
    refused(train("--dataset", f"folder:{folder}"), bad, "cannot identify")


def test_a_grey_image_of_16_bits_is_named(train, folder):
    bad = folder / "train/dog/1.png"
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(bad)
    refused(train("--dataset", f"folder:{folder}"), bad, "8 bits a channel")


IMAGES, LABELS = np.zeros((6, 8, 8), np.uint8), np.arange(6) % 2
ARRAYS = {
    "no keys": ({"images": IMAGES}, ["no array 'train_images'", "images"]),
    "dtype": ({"train_images": IMAGES.astype(np.float32)}, ["train_images", "float32", "uint8"]),
    "four channels": ({"train_images": np.zeros((6, 8, 8, 4), np.uint8)},
                      ["train_images", "[6, 8, 8, 4]", "[N, height, width, 3]"]),
    "no images": ({"train_images": IMAGES[:0]}, ["no images", "train"]),
    "too few labels": ({"train_images": IMAGES, "train_labels": LABELS[:5]},
                       ["train_labels", "[5]", "each of the 6 images"]),
    "negative labels": ({"train_images": IMAGES, "train_labels": LABELS - 1},
                        ["train_labels", "-1", "from 0"]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_are_no_images_or_labels_are_refused_by_name(kind, train, tmp_path):
    path = tmp_path / "set.npz"
    arrays, words = ARRAYS[kind]
    np.savez(path, **arrays)
    refused(train("--dataset", f"npz:{path}"), path, *words)


def test_labels_that_are_no_classes_are_refused_where_they_are_needed(train, tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, train_images=IMAGES, train_labels=np.zeros((6, 14), int))
    done = train("--dataset", f"npz:{path}", "--training-mode", "SupCon")
    refused(done, "--training-mode SupCon", path, "SimCLR needs none")
    assert f"train_labels of {path} is int64 [6, 14]" in done.stderr


def test_the_training_mode_has_no_default(run):
    refused(run("train.py", "--dataset", "digits"), "required: --training-mode")


def test_a_folder_without_test_images_is_refused_whatever_lies_beside_train(
    evaluate, folder, foreign
):
    (folder / "test").rename(folder / "inbox")
    done = evaluate(*foreign[:-1], f"folder:{folder}")
    refused(done, f"--dataset folder:{folder}", "no folder test/")


def test_test_images_are_checked_as_training_images_are(train, tiny_npz, tmp_path):
    path = tmp_path / "set.npz"
    with np.load(tiny_npz) as file:
        np.savez(path, **{**file, "test_images": file["test_images"].astype(np.int16)})
    refused(train("--dataset", f"npz:{path}"), path, "test_images", "int16", "uint8")


@pytest.mark.parametrize("kind", ["text", "a single array", "cut short", "missing"])
def test_a_file_that_is_no_npz_is_refused_by_name(kind, train, tiny_npz, tmp_path):
    path = tmp_path / "set.npz"
    if kind == "text":
        path.write_text("images\n" * 20)
    elif kind == "a single array":
        with path.open("wb") as file:
            np.save(file, IMAGES)
    elif kind == "cut short":
        path.write_bytes(tiny_npz.read_bytes()[:-100])
    refused(train("--dataset", f"npz:{path}"), "npz", path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--dataset cifar11", ["cifar11", "cifar10, cifar100, svhn"]),
     ("--dataset digits:/data", ["digits:/data", "only folder and npz take a path"]),
     ("--dataset blobs", ["blobs has no training images"]),
     ("--in-classes 2-9", ["--in-classes", "0-3", "9"]),
     ("--in-classes 5-", ["--in-classes", "'5-'", "0-5 or 0,3,7"]),
     ("--in-classes a", ["--in-classes", "'a'", "0-5 or 0,3,7"]),
     ("--in-classes 0-9999999999999999", ["--in-classes", "0-9999999999999999"]),
     ("--in-classes 3,3", ["--in-classes", "'3,3'", "twice"]),
     ("--arch resnet19", ["--arch", "resnet19", "resnet101"]),
     ("--training-mode BYOL", ["--training-mode", "BYOL", "SupCon"]),
     ("--training-mode SupCon --in-classes 2", ["--training-mode SupCon", "2 classes", "has 1"]),
     ("--training-mode SupCE --num-classes 3", ["--num-classes 3", "4"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_set_a_class_or_a_network_that_is_not_there_is_refused(flags, words, train):
    refused(train(*flags.split()), *words)


def test_images_without_classes_are_refused_where_the_loss_needs_them(train, tmp_path):
    np.savez(tmp_path / "set.npz", train_images=IMAGES)
    done = train("--dataset", f"npz:{tmp_path / 'set.npz'}", "--training-mode", "SupCon")
    refused(done, "--training-mode SupCon", "2 classes", "SimCLR")


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--ood cifar11", ["cifar11", "blobs, gaussian, uniform"]),
     ("--ood blobs uniform blobs", ["--ood", "blobs", "twice"]),
     ("--ood rest", ["--ood rest", "--in-classes"]),
     ("--clusters 0", ["--clusters", "0", "at least 1"]),
     ("--clusters 1 49", ["--clusters 49", "48 training images"]),
     ("--cluster 2", ["--cluster 2"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_evaluation_that_makes_no_sense_is_refused(flags, words, evaluate, trained):
    refused(evaluate(trained, *flags.split()), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--k 0", ["--k", "0", "at least 1"]),
     ("--copies 0", ["--copies", "0", "at least 1"]),
     ("--clusters 2", ["--clusters", "invalid choice: 2"]),
     ("--k 12", ["--k 12", "whole class", "class 0 has 12 images"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_known_outliers_that_make_no_sense_are_refused(flags, words, evaluate, trained):
    refused(evaluate(trained, *flags.split(), script="eval_ssdk.py"), *words)


@pytest.mark.parametrize("spelling", ["{0}", "{0.parent}/../{0.parent.name}/{0.name}"])
def test_a_file_cannot_be_its_own_outlier_however_it_is_spelled(
    spelling, evaluate, trained, tiny_npz
):
    ood = f"npz:{spelling.format(tiny_npz)}"
    refused(evaluate(trained, "--ood", ood), f"--ood {ood}", "in-distribution set itself", "rest")


def test_a_set_cannot_be_its_own_outlier(evaluate, foreign):
    done = evaluate(*foreign, "--dataset", "digits", "--ood", "blobs", "digits")
    refused(done, "--ood digits", "in-distribution set itself")


def test_there_is_no_rest_of_all_classes(evaluate, foreign):
    done = evaluate(*foreign, "--in-classes", "0-3", "--ood", "rest")
    refused(done, "--ood rest", "--in-classes")


# --- ranges of train.py's flags -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--batch-size 0", ["--batch-size", "0", "at least 1"]),
     ("--batch-size 1", ["--batch-size 1", "at least 2"]),
     ("--batch-size 47 --training-mode SupCE", ["--batch-size 47", "1 image of 48"]),
     ("--size 4", ["--size", "4", "at least 8"]),
     ("--epochs 0", ["--epochs", "0", "at least 1"]),
     ("--temperature 0", ["--temperature", "0", "above 0"]),
     ("--temperature nan", ["--temperature", "nan", "above 0"]),
     ("--lr -1", ["--lr", "-1", "above 0"]),
     ("--lr 1e300", ["--lr", "1e300"]),
     ("--momentum 1", ["--momentum", "1", "below 1"]),
     ("--weight-decay 1e300", ["--weight-decay", "1e300"]),
     ("--exp-name ../x", ["--exp-name", "'../x' is not a name below"]),
     ("--exp-name=", ["--exp-name", "'' is not a name below"]),
     *((f"--{flag}=--", [f"--{flag}: expected a value"]) for flag in (
         "epochs", "lr", "mean", "arch", "dataset", "config", "gpu", "in-classes")),
     ("--epoch 3", ["--epoch 3"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_flag_out_of_its_range_is_refused_with_the_range(flags, words, train):
    refused(train(*flags.split()), *words)


# --- places that can't be written to --------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "eval_ssd.py"])
def test_a_results_folder_where_a_file_stands_is_refused(
    script, train, evaluate, trained, tmp_path
):
    place = tmp_path / "taken"
    place.write_text("a file")
    flags = ("--results-dir", place)
    done = train(*flags) if script == "train.py" else evaluate(trained, *flags)
    refused(done, f"--results-dir {place}")


def test_scores_below_a_file_are_refused_before_anything_is_computed(evaluate, trained, tmp_path):
    place = tmp_path / "taken"
    place.write_text("a file")
    refused(evaluate(trained, "--scores", place / "scores.csv"), "--scores", place)


@pytest.mark.parametrize(
    ("flag", "target", "other"),
    [("--scores", "ckpt", "--ckpt"), ("--export", "tiny", "--dataset"),
     ("--export", "other", "--ood"), ("--scores", "picture", "is a file of --ood")],
)
def test_an_output_that_would_replace_an_input_is_refused(
    flag, target, other, evaluate, ours, tiny_npz, other_npz, folder
):
    picture = folder / "test/dog/1.png"
    path = {"ckpt": ours, "tiny": tiny_npz, "other": other_npz, "picture": picture}[target]
    before = path.read_bytes()
    done = evaluate(ours, "--ood", f"npz:{other_npz}", f"folder:{folder}", flag,
                    os.path.relpath(path, folder.parent))
    refused(done, flag, other)
    assert path.read_bytes() == before


def test_results_may_lie_in_a_folder_of_images_and_be_replaced_there(
    evaluate, trained, folder
):
    for _ in range(2):
        done = evaluate(trained, "--ood", f"folder:{folder}", "--scores",
                        folder / "test/dog/scores.csv")
        assert done.returncode == 0, done.stderr


def test_scores_in_place_of_a_folder_are_refused_before_anything_is_computed(
    evaluate, trained, tmp_path
):
    place = tmp_path / "taken"
    place.mkdir()
    refused(evaluate(trained, "--scores", place), f"--scores {place}")


def test_scores_in_place_of_the_cache_are_refused_before_anything_is_computed(
    evaluate, trained, tmp_path
):
    cache = tmp_path / "cache"
    done = evaluate(trained, "--cache-dir", cache, "--scores", cache)
    refused(done, f"--scores {cache} is a folder")


# --- configuration files --------------------------------------------------------------------------

# test_utils.py has a longer table
CONFIGS = {
    "no YAML": ("epochs: [1, 2\n", ["not YAML"]),
    "unknown key": ("epoch: 3\n", ["'epoch'", "known are", "batch-size", "epochs"]),
    "repeated key": ("epochs: 3\nlr: 0.1\nepochs: 4\n", ["'epochs'", "2 times"]),
    "not one of the choices": ("arch: resnet19\n", ["arch", "'resnet19'", "resnet101"]),
    "out of range": ("epochs: 0\n", ["epochs", "0", "at least 1"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_config_is_refused_with_the_file_and_the_key(kind, train, tmp_path):
    path = tmp_path / "run.yaml"
    content, words = CONFIGS[kind]
    path.write_text(content)
    refused(train("--config", path), path, *words)


@pytest.mark.parametrize("kind", ["missing", "not text"])
def test_a_config_that_cannot_be_read_is_refused(kind, train, tmp_path):
    path = tmp_path / "run.yaml"
    if kind == "not text":
        path.write_bytes(b"\xff\xfe\x00")
    refused(train("--config", path), f"--config {path}")


def test_an_evaluation_checks_its_config_too(evaluate, trained, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("clusters: [1, 0]\n")
    refused(evaluate(trained, "--config", path), path, "clusters", "0", "at least 1")


# --- numbers that run away ------------------------------------------------------------------------


def checkpoints_below(folder):
    """The checkpoints of a run, each of them whole and finite; no temporary file among them."""
    assert not list(folder.rglob(".*.tar*")), "a temporary file was left"
    found = sorted(folder.rglob("*.pth.tar"))
    for path in found:
        assert checkpoints.load_checkpoint(path)[0]  # refuses what is not
    return found


def test_a_loss_that_is_not_finite_stops_the_run_and_earlier_checkpoints_are_sound(train, tmp_path):
    # One step an epoch: the first of the warm-up is sane, the next two are not.
    done = train("--lr", "1e30", "--warmup", "--batch-size", 48)
    refused(done, "loss is nan", "epoch -8, step 0", status=1)
    names = [p.name for p in checkpoints_below(tmp_path)]
    assert names == ["checkpoint.pth.tar", "previous.pth.tar"]


def test_a_last_step_that_ruins_the_weights_is_not_saved(train, tmp_path):
    # The loss of the only step is finite, the step itself is not.
    done = train("--lr", "1e30", "--weight-decay", "1e10", "--batch-size", 48)
    refused(done, "after 1 epochs", "not finite", status=1)
    assert not checkpoints_below(tmp_path)
