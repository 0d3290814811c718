"""Images -> features: one pass of a network over an image set, or a look into a cache.

    train = extract(network.encoder, images, size=32, batch_size=256, mean=MEAN, std=STD)
    train = take(network.encoder, images, cache=Cache("cache", network.encoder), size=32, ...)

The result is the only thing held besides two batches: a float32 array [N, D] on the CPU. With a
Store for a cache not even that: it is in a file and read a piece at a time.

Of several processes each computes every n-th batch, so that batches, and with them the last bits of
features, are those of one process; rank 0 gets them all.
"""

import hashlib
import itertools
import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from tqdm import tqdm

import augment
import data
import distributed
import utils

PRECISIONS = ("fp32", "bf16")
CACHE_FORMAT = 2  # of the cache's files; raised when the same settings come to give other features
PIECE = 1024  # rows read from a file at a time


def extract(forward, images, **settings):
    """Compute the features of every image of a set, or of augmented copies of each.

    Args:
        forward: a module, [B, 3, S, S] -> [B, D]; used in evaluation mode, left in the mode it was.
        images: data.ImageSet of N images.
        size: S in pixels.
        batch_size: images a pass; the features do not depend on it (but for rounding).
        mean, std: normalisation constants by channel; None (the default) for none.
        mode: "base" (resize, the default), "org" or "ssl": the augmentation of the images.
        seed, copy: of the augmentation; they and the set decide it, whatever the batch size.
        precision: "fp32", or "bf16" for torch's automatic mixed precision in the network.
        copies: how many "ssl" copies of each image, made of the "base" images at their size; None
            (the default) for the images themselves.
        spread: whether all processes call this, with the same arguments, and share the work.

    Returns:
        float32 tensor [N, D] on the CPU; [copies * N, D], copy after copy of the whole set. With
        `spread`, rank 0 has it and the others None.

    Source: copies are the same as the original's known outliers of SSDk.
    """
    return _gathered(_batches_of(forward, images, **settings), _count(images, **settings))


def _count(images, *, copies=None, **_):
    return len(images) * (copies or 1)


def _batches_of(forward, images, *, copies=None, spread=False, **settings):
    """Yield the features of `extract` in order, some rows at a time: float32 [n, D]."""
    one_pass = _joint_pass if spread else _one_pass
    if copies is None:
        yield from one_pass(forward, images, **settings)
        return
    size = settings["size"]
    if tuple(images.pixels.shape[2:]) != (size, size):
        every = torch.arange(len(images))
        base = augment.apply_base(data.pixels_at(images.pixels, every), size)
        images = replace(images, pixels=base)
    for copy in range(copies):
        yield from one_pass(forward, images, mode="ssl", copy=copy, **settings)


def _joint_pass(forward, images, *, batch_size, **settings):
    """Yield what _one_pass does, a round of batches at a time, on rank 0; nothing on the others."""
    n = distributed.world()
    own = _one_pass(forward, images, batch_size=batch_size,
                    part=slice(distributed.rank(), None, n), **settings)
    width = None
    starts = range(0, len(images), n * batch_size)
    for start, batch in itertools.zip_longest(starts, _one_ahead(own)):
        if width is None:  # which a process without a batch cannot know
            width = distributed.from_lead(None if batch is None else batch.shape[1])
        rows = torch.zeros(batch_size, width)
        if batch is not None:
            rows[: len(batch)] = batch
        every = distributed.to_lead(rows)
        if distributed.is_lead():
            yield torch.cat(every)[: len(images) - start]


def _one_ahead(batches):
    """The same batches, each when the next has been asked for: a GPU works on that meanwhile."""
    before = next(batches, None)
    while before is not None:
        after = next(batches, None)
        yield before
        before = after


def _one_pass(
    forward, images, *, size, batch_size, mean=None, std=None, mode="base", seed=0, copy=0,
    precision="fp32", part=slice(None),
):
    """Yield the features of a slice of the batches, float32 [B, D] on the network's device."""
    device = next(forward.parameters()).device
    draws = _draw(images, mode, utils.generator(seed, mode, _kind(images), copy))
    if mean is not None:  # once, not at every batch
        mean, std = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    was_training = forward.training
    forward.eval()
    for rows, pixels in _batches(images, batch_size, part, device):
        with torch.inference_mode():
            if mode == "base":
                x = augment.apply_base(pixels, size, mean, std)
            else:
                apply = augment.apply_ssl if mode == "ssl" else augment.apply_org
                x = apply(pixels, type(draws)(*(d[rows] for d in draws)), size, mean, std)
            with utils.autocast(device, precision):
                batch = forward(x).float()
        yield batch
    forward.train(was_training)


def _gathered(batches, n):
    """Rows [n, D] on the CPU of batches [B, D] from anywhere."""
    out, end = None, 0
    for batch in batches:
        out = torch.empty(n, batch.shape[1]) if out is None else out
        start, end = end, end + len(batch)
        out[start:end] = batch
    return out


def default_batch_size(device):
    """Return how many images a pass are fastest on a device.

    A GPU wants many. A CPU is fastest while the activations of a core stay in its cache: 32 images
    a thread are 1.4 times as fast as 256 (benchmarks/bench_extract.py).
    """
    return 256 if device.type == "cuda" else min(32 * torch.get_num_threads(), 256)


def _kind(images):
    """The name of a set without its path: the way a path is spelt decides nothing."""
    return images.name.partition(":")[0]


def _draw(images, mode, generator):
    """Draw the augmentation of a whole set; nothing for "base"."""
    if mode == "ssl":
        return augment.draw_ssl(len(images), *images.pixels.shape[2:], generator)
    return augment.draw_org(len(images), generator) if mode == "org" else None


def _batches(images, batch_size, part, device):
    """Yield (rows, pixels on the device) of a slice of the batches, the next made meanwhile."""
    def fetch(start):
        rows = slice(start, min(start + batch_size, len(images)))
        pixels = data.pixels_at(images.pixels, rows)
        if device.type == "cuda":
            with torch.cuda.device(device):  # a new thread's is the first
                pixels = pixels.pin_memory().to(device, non_blocking=True)
        return rows, pixels

    starts = range(0, len(images), batch_size)[part]
    quiet = None if distributed.is_lead() else True
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fetch, starts[0]) if starts else None
        for i in tqdm(range(len(starts)), desc=images.name, leave=False, disable=quiet):
            batch = coming.result()
            if i + 1 < len(starts):
                coming = pool.submit(fetch, starts[i + 1])
            yield batch


def take(forward, images, *, cache=None, crew=None, **settings):
    """Return the features of a set from a cache if they are there; compute and keep them else.

    Args:
        cache: Cache or Store of this network, or None.
        crew: Crew of this network and set, to compute them; None for this process alone.
        settings: of `extract`.

    Returns:
        float32 tensor on the CPU, bit for bit what `extract` returned; of a Store a Stored of it.
    """
    found = cache and cache.read(images, **settings)
    if found is not None:
        utils.note(f"features of {images.name}: from the cache")
        return found
    batches = crew.batches(images, **settings) if crew else _batches_of(forward, images, **settings)
    count = _count(images, **settings)
    return cache.keep(batches, count, images, **settings) if cache else _gathered(batches, count)


# --- many processes -------------------------------------------------------------------------------


class Crew:
    """The processes of an evaluation: rank 0 says whose features it wants, and all compute them.

        crew = Crew(forward, sets)          # on all
        if not distributed.is_lead():
            return crew.serve()
        take(forward, sets[0], crew=crew, ...)
        crew.dismiss()

    A single process is a crew too.

    Args:
        forward: the network, the same on all. sets: list of data.ImageSet, the same on all. Without
            any there is nothing to do, and nobody to dismiss.

    Raises:
        UserError: the processes have different weights or images.
    """

    def __init__(self, forward=None, sets=()):
        self._forward, self._sets = forward, sets
        if distributed.world() > 1 and sets:
            _compare([("the network", weights_hash(forward))] + [
                (s.name, data.fingerprint(s.pixels, s.labels)) for s in sets])

    def batches(self, images, **settings):
        """Yield the features of one of the sets in order, float32 [n, D], on rank 0."""
        index = next(i for i, s in enumerate(self._sets) if s is images)
        distributed.from_lead((index, settings))
        yield from _batches_of(self._forward, images, spread=True, **settings)

    def serve(self):
        """Help rank 0 until it dismisses the crew."""
        while (order := distributed.from_lead(None)) is not None:
            index, settings = order
            extract(self._forward, self._sets[index], spread=True, **settings)

    def dismiss(self):
        """End the `serve` of the others. After an error the launcher ends them."""
        if self._sets:
            distributed.from_lead(None)


def _compare(hashes):
    """Stop if a process has something else than rank 0: lists of (name, hash)."""
    for here, there in itertools.zip_longest(hashes, distributed.from_lead(hashes)):
        if here != there:
            name, _ = here or there
            raise utils.UserError(f"{name} is not the same in process {distributed.rank()}, on "
                                  f"{platform.node()}, as in process 0; all have to be started "
                                  "with the same command, checkpoint and images")


# --- the cache ------------------------------------------------------------------------------------


class Stored:
    """Features [N, D] in a file, of which no more is in memory than what is asked for.

    The file is numpy's .npy of a float32 array (np.load can map it), with a JSON text behind the
    array that says what it is of, and its sha256.

    Args:
        path: of the file.

    Attributes:
        shape: (N, D). device: of the rows that are read, the CPU. about: dict that stood behind
            the array.

    Raises:
        ValueError: the file is another one.
    """

    device = torch.device("cpu")

    def __init__(self, path):
        self.path = Path(path)
        with open(path, "rb") as file:
            npy.read_magic(file)
            self.shape, by_columns, dtype = npy.read_array_header_1_0(file)
            if dtype != np.float32 or by_columns or len(self.shape) != 2:
                raise ValueError(f"it holds {dtype} {list(self.shape)}")
            self._start, self._row = file.tell(), dtype.itemsize * self.shape[1]
            file.seek(self._start + len(self) * self._row)
            self.about = json.loads(file.read())

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Read rows at a slice or at an int64 index: float32 tensor [n, D]."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            runs = [(start, stop - start)]
        else:
            runs = [(row, 1) for row in rows.tolist()]
        x, end = np.empty((sum(n for _, n in runs), self.shape[1]), np.float32), 0
        with open(self.path, "rb", buffering=0) as file:
            for row, n in runs:
                start, end = end, end + n
                at = self._start + row * self._row
                if os.preadv(file.fileno(), [x[start:end]], at) < n * self._row:
                    raise OSError(f"{self.path} ends before its row {row + n}")
        return torch.from_numpy(x)

    def pieces(self):
        """Yield all rows in order, some at a time."""
        return (self[start : start + PIECE] for start in range(0, len(self), PIECE))

    def numpy(self):
        """Return the array, float32 [N, D], mapped from the file."""
        return np.load(self.path, mmap_mode="r")


class Cache:
    """Features of one network on disk: a file FOLDER/WEIGHTS/SET-KEY.npy for each image set.

    Nothing that goes wrong with it is an error: a file that is damaged or about something else is
    reported, computed again and replaced; a place that cannot be written to is reported once.

    Args:
        folder: of the cache; made when something is to be written.
        forward: the network, a module on its device.
    """

    def __init__(self, folder, forward):
        self.folder = Path(folder)
        self._weights = weights_hash(forward)
        self._device = next(forward.parameters()).device
        self._writes = True

    def about(self, images, *, size, batch_size, mean=None, std=None, mode="base", seed=0, copy=0,
              precision="fp32", copies=None):
        """Say what decides features to the last bit: a dict of plain types.

        Not in it: where checkpoint and images lie, the names of classes and paths; and the seed
        where nothing is augmented. Batch size, device and torch version decide only rounding, but
        a cache must not change a number either.
        """
        mode = mode if copies is None else f"ssl, {copies} copies"
        if self._device.type == "cuda":
            machine = torch.cuda.get_device_name(self._device)
        else:
            machine = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        return {
            "format": CACHE_FORMAT, "weights": self._weights,
            "images": data.fingerprint(images.pixels, images.labels), "size": size,
            "mean": mean and [float(v) for v in mean], "std": std and [float(v) for v in std],
            "mode": mode,
            "draws": None if mode == "base" else [_kind(images), seed, copy],
            "precision": precision, "batch_size": batch_size, "machine": machine,
            "torch": torch.__version__,
        }

    def path(self, images, about):
        """Return the place of features that `about` says what they are of."""
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return self.folder / self._weights[:16] / f"{_kind(images)}-{key[:16]}.npy"

    def read(self, images, **settings):
        """Return the features of a set, float32 [N, D], or None where they are not to be had."""
        found = self._find(images, **settings)
        return None if found is None else _gathered(found.pieces(), len(found))

    def keep(self, batches, n, images, **settings):
        """Return the features of a set, [n, D], of batches; a failure to keep them is noted."""
        x = _gathered(batches, n)
        path, about = self._place(images, **settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, x.split(PIECE), n, about)
        except (OSError, utils.UserError) as error:
            if self._writes:
                utils.note(f"--cache-dir: {path} cannot be written ({_reason(error)}); features "
                           "are not kept")
            self._writes = False
        return x

    def _place(self, images, **settings):
        about = self.about(images, **settings)
        return self.path(images, about), about

    def _find(self, images, **settings):
        """The Stored of a set, checked to the last bit, or None."""
        path, about = self._place(images, **settings)
        try:
            found = Stored(path)
            digest = hashlib.sha256()
            for rows in found.pieces():
                digest.update(rows.numpy())
            if found.about != about | {"sha256": digest.hexdigest()}:
                raise ValueError("it is not what it says, or about something else")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # numpy raises many types for foreign bytes
            utils.note(f"features of {images.name}: {path} cannot be used ({_reason(error)}); "
                       "computed again")
            return None
        return found


class Store(Cache):
    """A Cache whose features are written as they are computed and never in memory whole.

    Its files are a Cache's. Damaged ones are made again likewise, but a place that cannot be
    written to is an error: the features have no other.

    Args: as for Cache.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder, forward):
        super().__init__(folder, forward)
        utils.make_folder(self.folder, "--feature-store")

    def read(self, images, **settings):
        """Return the features of a set as a Stored, or None where they are not to be had."""
        return self._find(images, **settings)

    def keep(self, batches, n, images, **settings):
        """Write the features of a set, [n, D] of batches; returns a Stored of them.

        Raises:
            RunError: they cannot be written.
        """
        path, about = self._place(images, **settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, _without_os_errors(batches), n, about)
        except OSError as error:
            raise utils.RunError(f"--feature-store: {path} cannot be written ({_reason(error)})"
                                 ) from None
        return Stored(path)


def _without_os_errors(batches):
    """The same batches; images that cannot be read are no fault of the file that is written."""
    try:
        yield from batches
    except OSError as error:
        raise utils.RunError(str(error)) from error


def _reason(error):
    """One line of an error."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return getattr(error, "strerror", None) or first


def _write(path, batches, n, about):
    """Write features [n, D], which come in batches, and what they are of, whole or not at all."""
    digest = hashlib.sha256()
    with utils.whole_file(path) as file:
        for i, batch in enumerate(batches):
            x = batch.cpu().numpy()
            if i == 0:
                npy.write_array_header_1_0(file, {
                    "descr": npy.dtype_to_descr(x.dtype), "fortran_order": False,
                    "shape": (n, x.shape[1])})
            digest.update(x)
            file.write(x)
        file.write(json.dumps(about | {"sha256": digest.hexdigest()}).encode())


def weights_hash(module):
    """Return a hex digest of the names, types, shapes and values of a module's state.

    A checkpoint that is saved again, in another dialect even, has the same.
    """
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        array = value.cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
