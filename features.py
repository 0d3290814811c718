"""Images -> features: one pass of a network over an image set, or a look into a cache.

    settings = FeatureSettings(size=32, batch_size=256, mean=MEAN, std=STD)
    x = extract(network.encoder, images, settings)                              # float32 [N, D]
    x = extract(network.encoder, images, settings, FeatureCache("cache", network.encoder))

Besides the result only two batches are held; with a FeatureStore for a cache the result is in a
file. Of several processes each computes every n-th batch, so that batches, and with them the last
bits of features, are those of one process; the main process gets them all.
"""

import contextlib
import hashlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import augment
import data
import utils
from infra import distributed, storage

PRECISIONS = ("fp32", "bf16")
CACHE_FORMAT = 3  # raised when the same settings come to give other features or other files


@dataclass(frozen=True)
class FeatureSettings:
    """How features are taken: all that decides them but the network and the images."""

    size: int  # S in pixels, the side that images are brought to
    batch_size: int  # images a pass; decides no more than rounding
    mean: tuple | None = None  # normalisation constants by channel on the [0, 1] scale
    std: tuple | None = None
    mode: str = "base"  # augmentation of the images: "base" (resize), "org" or "ssl"
    interpolation: str = "bilinear"  # of "base"; "bicubic" is what some pretrained encoders want
    seed: int = 0  # of the augmentation; with the set and the copy it decides every draw
    # "ssl" copies of each "base" image, as the original's known outliers of SSDk; None: no copies
    copies: int | None = None
    precision: str = "fp32"  # "bf16" is torch's automatic mixed precision, in the network only

    def rows(self, images):
        """Return how many rows of features a set of images has."""
        return len(images) * (self.copies or 1)


def default_batch_size(device):
    """Return how many images a pass are fastest on a device."""
    # 32 a thread keep activations in a core's cache: 1.4 times as fast as 256 (bench_extract.py).
    return 256 if device.type == "cuda" else min(32 * torch.get_num_threads(), 256)


# --- computing ------------------------------------------------------------------------------------


def extract(network, images, settings, cache=None):
    """Compute the features of every image of a set, or of augmented copies of each.

    Args: network: a module, [B, 3, S, S] -> [B, D]; used in evaluation mode, left in the mode it
        was. images: data.ImageSet of N images. settings: FeatureSettings. cache: FeatureCache or
        FeatureStore of this network: if the features are there they are read, else kept.
    Returns: float32 [N, D] on the CPU, of a FeatureStore a DiskFeatures; [copies * N, D], copy
        after copy of the whole set. Several processes share the work, called with the same: the
        main one, whose cache it is, has it, the others None.
    """
    main = distributed.is_main_process()
    found = cache.read(images, settings) if cache and main else None
    if distributed.broadcast_object(found is not None):
        utils.note(f"features of {images.name}: from the cache")
        return found
    batches = _feature_batches(network, images, settings)
    if cache and main:
        return cache.keep(batches, images, settings)
    return _concatenate(batches, settings.rows(images))


def _feature_batches(network, images, settings):
    """Yield the features of `extract` in order, some rows at a time: float32 [n, D]."""
    one_pass = _shared_pass if distributed.world_size() > 1 else _pass
    if settings.copies is None:
        yield from one_pass(network, images, settings)
        return
    if tuple(images.pixels.shape[2:]) != (settings.size, settings.size):
        pixels = data.load_pixels(images.pixels, torch.arange(len(images)))
        images = replace(images, pixels=augment.apply_base(
            pixels, settings.size, interpolation=settings.interpolation))
    for copy in range(settings.copies):
        yield from one_pass(network, images, replace(settings, mode="ssl"), copy)


def _shared_pass(network, images, settings, copy=0):
    """Yield what _pass does, a round of batches at a time; only on the main process."""
    n, size, width = distributed.world_size(), settings.batch_size, None
    own = _pass(network, images, settings, copy, slice(distributed.rank(), None, n))
    for start, batch in itertools.zip_longest(range(0, len(images), n * size), _one_ahead(own)):
        if width is None:  # a process without a batch cannot know it
            width = distributed.broadcast_object(None if batch is None else batch.shape[1])
        rows = torch.zeros(size, width)
        if batch is not None:
            rows[: len(batch)] = batch
        every = distributed.gather_to_main(rows)
        if distributed.is_main_process():
            yield torch.cat(every)[: len(images) - start]


def _one_ahead(items):
    """The items of an iterator, each when the next has been asked for and is on its way."""
    before = next(items, None)
    while before is not None:
        after = next(items, None)
        yield before
        before = after


def _pass(network, images, settings, copy=0, part=slice(None)):
    """Yield the features [B, D] of the batches in a slice of them, on the network's device."""
    device = next(network.parameters()).device
    mean, std = settings.mean, settings.std
    if mean is not None:  # copied to the device once, not at every batch
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    # Sampled for the whole set, so that the batch size changes no draw; nothing for "base".
    generator = utils.generator(settings.seed, settings.mode, _kind(images), copy)
    params = None if settings.mode == "base" else augment.sample_views(
        settings.mode, 1, len(images), slice(None), *images.pixels.shape[2:], generator)
    was_training = network.training
    network.eval()
    for rows, pixels in _prefetch(images, settings.batch_size, part, device):
        with torch.inference_mode():
            if params is None:
                x = augment.apply_base(pixels, settings.size, mean, std, settings.interpolation)
            else:
                x = augment.AUGMENTATIONS[settings.mode](
                    pixels, augment.subset(params, rows), settings.size, mean, std)
            with utils.autocast(device, settings.precision):
                batch = network(x).float()
        yield batch
    network.train(was_training)


def _kind(images):
    """The name of a set without its path: the way a path is spelt decides nothing."""
    return images.name.partition(":")[0]


def _prefetch(images, batch_size, part, device):
    """Yield (rows, pixels on the device) of a slice of the batches, the next loaded meanwhile."""
    def fetch(start):
        rows = slice(start, min(start + batch_size, len(images)))
        pixels = data.load_pixels(images.pixels, rows)
        if device.type == "cuda":
            with torch.cuda.device(device):  # a new thread's is the first
                pixels = pixels.pin_memory().to(device, non_blocking=True)
        return rows, pixels

    starts = range(0, len(images), batch_size)[part]
    quiet = None if distributed.is_main_process() else True  # None: on a terminal only
    with ThreadPoolExecutor(1) as pool:
        coming = _one_ahead(pool.submit(fetch, start) for start in starts)
        for future in tqdm(coming, images.name, len(starts), leave=False, disable=quiet):
            yield future.result()


def _concatenate(batches, n):
    """Rows [n, D] on the CPU of batches [B, D] from anywhere; None without batches."""
    out, start = None, 0
    for batch in batches:
        out = torch.empty(n, batch.shape[1]) if out is None else out
        out[start : start + len(batch)] = batch
        start += len(batch)
    return out


def check_same_inputs(network, sets):
    """Check that all processes have the same weights and images; a UserError names what differs."""
    if distributed.world_size() > 1:
        hashes = {s.name: data.fingerprint(s.pixels, s.labels) for s in sets}
        distributed.check_same({"the network": weights_hash(network)} | hashes)


# --- on disk --------------------------------------------------------------------------------------


class DiskFeatures:
    """Features [N, D] in a .npy file of float32, read when rows are asked for."""

    device = torch.device("cpu")  # of the rows that are read

    def __init__(self, path):
        self.path = Path(path)
        self.shape = self.numpy().shape

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Read rows at a slice or at an int64 index: float32 tensor [n, D]."""
        rows = rows.numpy() if isinstance(rows, torch.Tensor) else rows
        # Mapped anew each time, so that no page stays mapped, and counted, after it was read.
        return torch.from_numpy(np.array(self.numpy()[rows]))

    def numpy(self):
        """Return the array, float32 [N, D], mapped from the file."""
        try:
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:  # the file was cut or replaced meanwhile
            raise OSError(f"{self.path} cannot be read: {error}") from None


class FeatureCache:
    """Features of one network on disk: FOLDER/WEIGHTS/SET-KEY.npy, and a .json that says of what.

    Nothing that goes wrong with it is an error: a file that is damaged or about something else is
    reported, computed again and replaced; a place that cannot be written to is reported once.
    """

    flag = "--cache-dir"

    def __init__(self, folder, network):
        self.folder = Path(folder)
        with contextlib.suppress(OSError):  # made now, or a result could be given its name
            self.folder.mkdir(parents=True, exist_ok=True)
        self._weights = weights_hash(network)
        self._device = next(network.parameters()).device
        self._writes = True

    def key(self, images, settings):
        """Return what decides features to the last bit: a dict of JSON's types.

        Not in it: paths, names of classes, and the seed where nothing is augmented.
        """
        augmented = settings.mode != "base" or settings.copies is not None
        # Batch size, machine and torch decide only rounding, but a cache must change no bit.
        machine = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        if self._device.type == "cuda":
            machine = torch.cuda.get_device_name(self._device)
        return utils.to_json_types(asdict(settings)) | {
            "format": CACHE_FORMAT, "weights": self._weights, "machine": machine,
            "images": data.fingerprint(images.pixels, images.labels), "torch": torch.__version__,
            "seed": [_kind(images), settings.seed] if augmented else None,
        }

    def path(self, images, key):
        """Return the place of the features that have a key."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / self._weights[:16] / f"{_kind(images)}-{digest[:16]}.npy"

    def read(self, images, settings):
        """Return the features of a set, float32 [N, D], or None where they are not to be had."""
        found = self._find(images, settings)
        return None if found is None else found[:]

    def keep(self, batches, images, settings):
        """Return the features of a set, [N, D], of batches; a failure to keep them is noted."""
        x = _concatenate(batches, settings.rows(images))
        try:
            self._write([x], images, settings)
        except (utils.RunError, utils.UserError) as error:
            if self._writes:
                utils.note(f"{error}; features are not kept")
            self._writes = False
        return x

    def _find(self, images, settings):
        """The DiskFeatures of a set, checked to the last bit, or None."""
        key = self.key(images, settings)
        path = self.path(images, key)
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if about != key | {"sha256": storage.file_hash(path)}:
                raise ValueError("it is damaged, or about something else")
            return DiskFeatures(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            utils.note(f"features of {images.name}: {path} cannot be used ({error}); computed "
                       "again")
            return None

    def _write(self, batches, images, settings):
        """Write features that come in batches [B, D], then what they are of; returns the path."""
        key = self.key(images, settings)
        path = self.path(images, key)
        about, n = path.with_suffix(".json"), settings.rows(images)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in self.folder.iterdir():  # of other networks too: their files are large
                storage.sweep(folder)
            about.unlink(missing_ok=True)  # it must not speak for the new array
            with storage.atomic_write(path) as file:
                for i, batch in enumerate(batches):
                    x = batch.cpu().numpy()
                    if i == 0:
                        header = {"descr": "<f4", "fortran_order": False, "shape": (n, x.shape[1])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(x)
            with storage.atomic_write(about, "w", encoding="utf-8") as file:
                json.dump(key | {"sha256": storage.file_hash(path)}, file)
        except OSError as error:
            raise utils.RunError(
                f"{self.flag}: {path} cannot be written ({error.strerror or error})") from None
        return path


class FeatureStore(FeatureCache):
    """A FeatureCache whose features are written as they are computed and never in memory whole.

    Raises: UserError: a folder that cannot be written to. RunError: such a file.
    """

    flag = "--feature-store"

    def __init__(self, folder, network):
        super().__init__(folder, network)
        storage.make_output_folder(self.folder, self.flag)

    read = FeatureCache._find  # the rows stay in their file

    def keep(self, batches, images, settings):
        """Write the features of a set, [N, D], as their batches come; returns DiskFeatures."""
        return DiskFeatures(self._write(batches, images, settings))


def weights_hash(module):
    """Return a hex digest of a module's state; however its checkpoint is stored, it is the same."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        array = value.cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
