"""Fixtures that the tests of several rooms share: tiny image sets, a checkpoint, the commands."""

import contextlib
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TinyEncoder

import models
from infra import program

# Of several GPUs the programs would use all; where a test does not say so, they are one process
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="session")
def golden():
    """Function (name) -> what the original printed: a dict of arrays, or the content of JSON."""

    def read(name):
        path = GOLDEN / name
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with np.load(path) as file:
            return dict(file)

    return read


def environment(**changes):
    """This environment, a thread for each process, and no process group that a test may be in."""
    clean = {k: v for k, v in os.environ.items()
             if not k.startswith("PET_")
             and k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return clean | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in changes.items()}


@pytest.fixture
def terminal():
    """Signals of a terminal reach what a test starts, though nohup or "&" may have begun it all."""
    meant = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in meant.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def command():
    """Function (script, *arguments, cwd=...) -> the finished process of one of the programs."""

    def run(script, *arguments, cwd, env=None, timeout=300):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, check=False,
        )

    return run


@contextlib.contextmanager
def _started_in(folder, argv, env):
    """Be a program that was started in a folder; yields its stdout and stderr, byte streams."""
    before = Path.cwd(), sys.argv, dict(os.environ)
    torch_before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    os.chdir(folder)
    os.environ.update(env or {})
    sys.argv = argv
    try:
        with (contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]),
              warnings.catch_warnings()):
            yield streams
    finally:
        torch.use_deterministic_algorithms(torch_before[0])
        torch.backends.cudnn.benchmark = torch_before[1]
        os.chdir(before[0])
        sys.argv = before[1]
        os.environ.clear()
        os.environ.update(before[2])


def call_program(script, *arguments, cwd, env=None):
    """Run one of the programs in this process, which costs no new interpreter.

    Returns:
        subprocess.CompletedProcess, as of the command.
    """
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    argv, status = [script, *map(str, arguments)], 0
    with _started_in(cwd, argv, env) as streams:
        try:
            program.run(functools.partial(main, argv[1:]))
        except SystemExit as end:
            status = end.code
    out, err = (s.flush() or s.buffer.getvalue().decode("utf-8", "surrogateescape")
                for s in streams)
    return subprocess.CompletedProcess([sys.executable, *argv], status, out, err)


@pytest.fixture(scope="session")
def call():
    """Function (script, *arguments, cwd=..., env=...) -> call_program of them."""
    return call_program


@pytest.fixture(scope="module")
def tiny_arch():
    """`--arch tiny`: the commands take the small encoder of tiny.py, and compute on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setitem(models.ARCHITECTURES, "tiny", TinyEncoder)
        yield "tiny"


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """A file of 48 training and 32 test images of 8 pixels, grey, in 4 classes that differ."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 48), ("test", 32)):
        labels = np.arange(n) % 4
        images = rng.integers(0, 60, (n, 8, 8)) + 50 * labels[:, None, None]
        arrays[f"{split}_images"] = images.astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    path = tmp_path_factory.mktemp("npz") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def other_npz(tmp_path_factory):
    """A file of 24 test images of 12 pixels, in colour, in 2 classes: outliers."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("npz") / "other.npz"
    images = rng.integers(0, 256, (24, 12, 12, 3)).astype(np.uint8)
    np.savez(path, test_images=images, test_labels=np.arange(24) % 2)
    return path


@pytest.fixture(scope="session")
def tiny_imagenet(tmp_path_factory):
    """A folder with imagenet/ (24 + 12 pictures of 3 classes) and odd/ (12), of many sizes."""
    rng = np.random.default_rng(2)
    root = tmp_path_factory.mktemp("files")
    shapes = [(30, 44), (52, 24), (17, 17), (40, 40), (24, 31)]
    sets = {f"imagenet/{split}/n0{c}": (n, 80 * c) for split, n in (("train", 8), ("val", 4))
            for c in range(3)} | {"odd": (12, 40)}
    for folder, (n, level) in sets.items():
        (root / folder).mkdir(parents=True)
        for i in range(n):
            image = level + rng.integers(0, 90, (*shapes[i % 5], 3))
            Image.fromarray(image.astype(np.uint8)).save(root / folder / f"{i}.JPEG")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory, call, tiny_npz):
    """The best checkpoint of a SimCLR ResNet-18 that train.py trained on `tiny_npz`."""
    home = tmp_path_factory.mktemp("trained")
    done = call(
        "train.py", "--training-mode", "SimCLR", "--dataset", f"npz:{tiny_npz}", "--arch",
        "resnet18", "--size", 8,
        "--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--normalize", cwd=home,
    )
    assert done.returncode == 0, done.stderr
    return home / "results/temp/latest_exp/checkpoint/model_best.pth.tar"
