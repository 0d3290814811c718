"""Images -> features: one pass of a network over an image set, or a look into a cache.

    train = extract(network.encoder, images, size=32, batch_size=256, mean=MEAN, std=STD)
    train = take(network.encoder, images, cache=Cache("cache", network.encoder), size=32, ...)

The result is the only thing held besides two batches: a float32 array [N, D] on the CPU.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import augment
import data
import utils

PRECISIONS = ("fp32", "bf16")
CACHE_FORMAT = 1  # of the cache's files; raised when the same settings come to give other features


def extract(
    forward, images, *, size, batch_size, mean=None, std=None, mode="base", seed=0, copy=0,
    precision="fp32",
):
    """Compute the features of every image of a set.

    Args:
        forward: a module, [B, 3, S, S] -> [B, D]; used in evaluation mode, left in the mode it was.
        images: data.ImageSet of N images.
        size: S in pixels.
        batch_size: images a pass; the features do not depend on it (but for rounding).
        mean, std: normalisation constants by channel; None for none.
        mode: "base" (resize), "org" or "ssl": the augmentation of the images.
        seed, copy: of the augmentation; they and the set decide it, whatever the batch size.
        precision: "fp32", or "bf16" for torch's automatic mixed precision in the network.

    Returns:
        float32 tensor [N, D] on the CPU.
    """
    device = next(forward.parameters()).device
    draws = _draw(images, mode, utils.generator(seed, mode, _kind(images), copy))
    if mean is not None:  # once, not at every batch
        mean, std = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    was_training = forward.training
    forward.eval()
    out = None
    with torch.inference_mode():
        for rows, pixels in _batches(images, batch_size, device):
            if mode == "base":
                x = augment.apply_base(pixels, size, mean, std)
            else:
                apply = augment.apply_ssl if mode == "ssl" else augment.apply_org
                x = apply(pixels, type(draws)(*(d[rows] for d in draws)), size, mean, std)
            with utils.autocast(device, precision):
                batch = forward(x).float()
            if out is None:
                out = torch.empty(len(images), batch.shape[1])
            out[rows] = batch
    forward.train(was_training)
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


def _batches(images, batch_size, device):
    """Yield (slice, pixels on the device); the next batch is made while one is worked on."""
    def fetch(start):
        rows = slice(start, min(start + batch_size, len(images)))
        pixels = data.pixels_at(images.pixels, rows)
        if device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)
        return rows, pixels

    starts = range(0, len(images), batch_size)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fetch, 0)
        for start in tqdm(starts, desc=images.name, leave=False, disable=None):
            batch = coming.result()
            if start + batch_size < len(images):
                coming = pool.submit(fetch, start + batch_size)
            yield batch


def extract_copies(forward, images, *, copies, **kwargs):
    """Compute the features of several "ssl" augmented copies of each image.

    Args:
        copies: how many of each image. The others: as for `extract`. The copies are made of the
            "base" images, at their size.

    Returns:
        float32 tensor [copies * N, D] on the CPU, copy after copy of the whole set.

    Source: same as the original's known outliers of SSDk.
    """
    every = torch.arange(len(images))
    base = augment.apply_base(data.pixels_at(images.pixels, every), kwargs["size"])
    images = replace(images, pixels=base)
    each = [extract(forward, images, mode="ssl", copy=c, **kwargs) for c in range(copies)]
    return torch.cat(each)


def take(forward, images, *, cache=None, copies=None, **settings):
    """Return the features of a set from a cache if they are there; compute and keep them else.

    Args:
        cache: Cache of this network, or None.
        copies: as for `extract_copies`; None for the images themselves.
        settings: of `extract`.

    Returns:
        float32 tensor on the CPU: bit for bit what `extract` or `extract_copies` returned.
    """
    found = cache and cache.read(images, copies=copies, **settings)
    if found is not None:
        utils.note(f"features of {images.name}: from the cache")
        return found
    if copies is None:
        x = extract(forward, images, **settings)
    else:
        x = extract_copies(forward, images, copies=copies, **settings)
    if cache:
        cache.write(x, images, copies=copies, **settings)
    return x


# --- the cache ------------------------------------------------------------------------------------


class Cache:
    """Features of one network on disk: a file FOLDER/WEIGHTS/SET-KEY.npz for each image set.

    A file holds `features` [N, D] and `about`, JSON that says what they are of and their sha256.
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
        return self.folder / self._weights[:16] / f"{_kind(images)}-{key[:16]}.npz"

    def read(self, images, **settings):
        """Return the features of a set, float32 [N, D], or None where they are not to be had."""
        about = self.about(images, **settings)
        path = self.path(images, about)
        try:
            with np.load(path, allow_pickle=False) as file:
                x, stored = file["features"], json.loads(str(file["about"]))
            if stored != about | {"sha256": _digest(x)}:
                raise ValueError("it is not what it says, or about something else")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # numpy and zipfile raise many types for foreign bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            utils.note(f"features of {images.name}: {path} cannot be used ({reason}); computed "
                       "again")
            return None
        return torch.from_numpy(x)

    def write(self, x, images, **settings):
        """Keep the features x of a set; a failure is noted, once."""
        about = self.about(images, **settings)
        path = self.path(images, about)
        about["sha256"] = _digest(x.numpy())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with utils.whole_file(path) as file:
                np.savez(file, features=x.numpy(), about=np.array(json.dumps(about)))
        except (OSError, utils.UserError) as error:
            if self._writes:
                reason = getattr(error, "strerror", None) or error
                utils.note(f"--cache-dir: {path} cannot be written ({reason}); features are not "
                           "kept")
            self._writes = False


def _digest(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


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
