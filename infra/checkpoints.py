"""Checkpoints: read without running code, written whole, the previous one kept.

    state, rest = load_checkpoint("network.pth.tar")     # of any dialect
    store = Checkpoints("results/temp/1--x/checkpoint")  # of a run
    store.save(state, names=["model_best.pth.tar"])
    saved = store.newest()                               # None where nothing was saved
"""

import argparse
import contextlib
import errno
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

import utils
from infra import storage
from utils import UserError


def _numpy_scalar(module):
    """numpy's function that makes a scalar of its bytes, under the name that a pickle uses."""
    def scalar(dtype, data):
        if dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"GLOBAL numpy.{dtype.type.__name__}")
        return np.frombuffer(data, dtype)[0].item()

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


# What a checkpoint may hold besides tensors and plain types; none of it runs code. SupContrast
# keeps its arguments in `opt`; the original's `best_prec1` of SimCLR and SupCon is a numpy float64.
SAFE_GLOBALS = [argparse.Namespace, np.dtype, *{type(np.dtype(c)) for c in np.typecodes["All"]},
                *map(_numpy_scalar, ("numpy.core.multiarray", "numpy._core.multiarray"))]

PLAIN = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8,
         torch.int16, torch.int32, torch.int64, torch.bool}


def read_checkpoint(path, flag=""):
    """Read what torch.save wrote, on the CPU, without running code; check that it is whole.

    Raises: UserError: names `flag` and a file that is missing, empty, damaged or holds code.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        raise UserError(f"{flag}{path}: {'file is empty' if path.is_file() else 'no such file'}")
    try:
        if zipfile.is_zipfile(path):  # torch itself does not check the checksums in it
            with zipfile.ZipFile(path) as file:
                if (record := file.testzip()) is not None:
                    raise UserError(f"{flag}{path} is damaged: {record} has changed")
        torch.serialization.add_safe_globals(SAFE_GLOBALS)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives, foreign bytes: torch raises many types for it
        # A fault of the disk or of memory is not the file's; but a wild offset in it is EINVAL.
        disk = getattr(error, "errno", None) not in (None, errno.EINVAL)
        memory = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
        if disk or memory or isinstance(error, UserError):
            raise
        # torch's message is a page long; the one thing to know in it is the refused name.
        name = re.search(r"(?:\bGLOBAL[\s`]+|got <class ')([^\s`']+)", str(error))
        if name and isinstance(error, pickle.UnpicklingError):
            raise UserError(f"{flag}{path} holds more than tensors and plain types ({name[1]}) "
                            "and was not loaded: it could run code") from None
        raise UserError(f"{flag}{path} is not a torch checkpoint, or damaged") from None


def load_checkpoint(path):
    """Read a checkpoint of any dialect without running code from it.

    Dialects are the original's ("state_dict"), SupContrast's ("model", which wins where both are,
    as in the original, and may hold a "state_dict"), and a bare state dict.

    Returns: (state, rest): {name: tensor} on the CPU with the prefixes gone, and the other entries
        of the file ({} for a bare state dict); only our own checkpoints have rest["config"].
    Raises: UserError: missing, empty, truncated or foreign file, code in it, weights not finite.
    """
    content = read_checkpoint(path, "--ckpt ")
    state, rest = content if isinstance(content, dict) else {}, {}
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), dict):
            state, rest = state[key], {**state, **rest}
            del rest[key]
    if not state or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(f"--ckpt {path} holds no weights: found {type(content).__name__}, which is "
                        "no state dict and has no 'state_dict' or 'model'")
    wrappers = ("module", "_orig_mod")  # DataParallel and DDP; torch.compile
    state = {".".join(p for p in k.split(".") if p not in wrappers): v for k, v in state.items()}
    for name, value in state.items():
        # A tensor may be larger than the file: every element of an expanded one is the same.
        if (value.layout != torch.strided or value.dtype not in PLAIN or value.is_nested
                or value.device.type != "cpu" or value.nbytes > value.untyped_storage().nbytes()):
            raise UserError(f"--ckpt {path}: {name} is not a plain tensor of real numbers")
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"--ckpt {path}: {name} is not finite")
    return state, rest


class Checkpoints:
    """The checkpoints in a folder: written whole, the previous one kept until the new one is."""

    NEWEST, PREVIOUS = "checkpoint.pth.tar", "previous.pth.tar"

    def __init__(self, folder):
        self._folder = Path(folder)
        self.unwritten = {}  # {name: bytes} of the checkpoints whose last write failed

    def save(self, state, names=()):
        """Write copies under other names, then the newest checkpoint, from which a run resumes.

        In this order a kill between two files loses none of them. A failed write is reported, what
        was there stays, training goes on, and the next save tries again.
        """
        buffer = io.BytesIO()  # torch's own writer does not say why a write to a file fails
        torch.save(state, buffer)
        self.unwritten.pop(self.NEWEST, None)
        self.unwritten |= dict.fromkeys([*names, self.NEWEST], buffer.getbuffer())
        for name in list(self.unwritten):
            keep = self._keep_previous if name == self.NEWEST else None
            try:
                with storage.atomic_write(self._folder / name, before_rename=keep) as file:
                    file.write(self.unwritten[name])
            except OSError as error:
                utils.note(f"{self._folder / name} was not written ({error.strerror}); training "
                           "goes on, and the next save tries again")
                return
            del self.unwritten[name]

    def _keep_previous(self):
        """Give the newest checkpoint a second name, before the next one, now whole, has its own."""
        newest, previous = self._folder / self.NEWEST, self._folder / self.PREVIOUS
        if newest.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(newest, previous)
            except OSError:  # a file system without links: the name moves
                os.replace(newest, previous)

    def newest(self, fits=lambda state: True):
        """Return the newest checkpoint that is whole, on the CPU; None where nothing was saved.

        A damaged file, or one that `fits` refuses or fails of, is reported and set aside, and the
        one before it is read; UserError where there are checkpoints and none is whole.
        """
        numbered = sorted(self._folder.glob("checkpoint_[0-9]*.pth.tar"),
                          key=lambda f: -int(re.sub(r"\D", "", f.name)))
        paths = [self._folder / self.NEWEST, self._folder / self.PREVIOUS, *numbered]
        damaged = {}
        for path in filter(Path.exists, paths):
            try:
                content = read_checkpoint(path)
                fine = False
                with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
                    fine = "progress" in content and fits(content)
                if not fine:
                    raise UserError(f"{path} is whole, but no checkpoint of this run")
            except UserError as error:
                damaged[path] = str(error)
                continue
            for bad, error in damaged.items():  # or the next save would keep it as the previous one
                os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
                utils.note(f"{error}; set aside as {bad.name}.damaged")
            if damaged:
                utils.note(f"continuing from {path}, the newest whole checkpoint")
            return content
        if damaged:
            raise UserError(f"no whole checkpoint in {self._folder} "
                            f"({next(iter(damaged.values()))}); --no-resume starts a new run")
