"""Which image sets exist, and how their images come to be uint8 [N, 3, H, W] in memory.

    train = load("cifar10", "train", data_dir="./datasets", size=32)
    train.pixels, train.labels          # uint8 [50000, 3, 32, 32], int64 [50000]
    load("folder:photos/odd", "test", data_dir="./datasets", size=64)
    load("imagenet", "train", data_dir="./datasets", size=224, workers=8).pixels  # Files: on disk

SETS is the table of facts: a row per set. Nothing here is random but the noise sets, the order of
training and the choice of known outliers; each has a generator of its own.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

import distributed
import utils
from utils import UserError

DOWNLOAD_ERRORS = (OSError, EOFError, RuntimeError, HTTPException, tarfile.TarError)
NOISE_IMAGES = 10_000  # of each of blobs, gaussian and uniform
NOISE_BLOCK = 100  # images drawn by one generator
DTD_IMAGES = 5_640
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Width of the narrowest crop of the training augmentation (a fifth of the area, 3:4) relative to
# the short side: a larger picture has detail that no crop of it keeps.
NARROWEST_CROP = math.sqrt(0.2 * 3 / 4)
# Files decoded at a time where nobody says: a ResNet-50 at 224 pixels leaves more of them waiting,
# and each worker holds batches in shared memory.
MOST_WORKERS = 8
MEASURED_FILES = 2_000  # of a set on disk, of which mean and deviation are measured


@dataclass(frozen=True)
class ImageSet:
    """Images of one split of one set, with their classes.

    Attributes:
        name: as it appears in logs and records.
        pixels: uint8 [N, 3, H, W], or Noise or Files, of which images are made when they are asked
            for; indexed by an int64 tensor either way.
        labels: int64 [N]; all 0 where the images have no classes.
        class_names: of the whole set, by label; None where the images have no classes.
        paths: where each image came from, None where images come many to a file.
    """

    name: str
    pixels: "torch.Tensor | Noise | Files"
    labels: torch.Tensor
    class_names: tuple[str, ...] | None = None
    paths: tuple[str, ...] | None = None

    def __len__(self):
        return len(self.labels)

    def take(self, index):
        """Return the images at an int64 index [n], in its order, as a set of the same name."""
        paths = self.paths and tuple(self.paths[i] for i in index.tolist())
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], paths=paths)

    def restrict(self, classes):
        """Return the images of some classes, relabelled 0, 1, ... in the order of `classes`."""
        new = torch.full((len(self.class_names),), -1)
        new[list(classes)] = torch.arange(len(classes))
        kept = self.take((new[self.labels] >= 0).nonzero().squeeze(1))
        names = tuple(self.class_names[c] for c in classes)
        return replace(kept, labels=new[kept.labels], class_names=names)


class Noise:
    """Float32 images [N, 3, S, S] in [0, 1], drawn when they are asked for.

    Block b of 100 images comes from a generator of (seed, kind, b), so any part can be had without
    the rest: 10,000 images of 224 pixels would be 6 GB.

    Args:
        kind: "blobs", "gaussian" or "uniform".
        size: S in pixels.
        seed: int.
        index: int64 [N], which images; None is the first 10,000.
    """

    def __init__(self, kind, size, seed, index=None):
        self.kind, self.size, self.seed = kind, size, seed
        self.index = torch.arange(NOISE_IMAGES) if index is None else index

    @property
    def shape(self):
        """(N, 3, S, S), as a tensor's."""
        return (len(self.index), 3, self.size, self.size)

    def __getitem__(self, index):
        """Return the images at an int64 index [n] as a smaller Noise; nothing is drawn yet."""
        return Noise(self.kind, self.size, self.seed, self.index[index])

    def draw(self):
        """Return all the images, float32 [N, 3, S, S]."""
        out = torch.empty(self.shape)
        block = self.index // NOISE_BLOCK
        for b in block.unique().tolist():
            mine = (block == b).nonzero().squeeze(1)
            out[mine] = self._block(b)[self.index[mine] - b * NOISE_BLOCK]
        return out

    def made_of(self):
        """Return what the images are a function of: (text, tensor)."""
        return f"{self.kind} {self.size} {self.seed};", self.index

    def _block(self, b):
        rng = np.random.default_rng([self.seed, *self.kind.encode(), b])
        shape = (NOISE_BLOCK, self.size, self.size, 3)
        if self.kind == "blobs":
            images = blobs(rng.random(shape) < 0.7)
        elif self.kind == "gaussian":
            images = rng.normal(0.5, 0.25, shape).clip(0, 1)
        else:
            images = rng.random(shape)
        return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)


def blobs(coins):
    """Turn coin tosses into blobs of colour.

    Args:
        coins: bool or 0/1 [N, S, S, 3], true with probability 0.7.

    Returns:
        float32 [N, S, S, 3]: blurred by a Gaussian of 1.5 pixels along all three axes of an image,
        colour included, and 0 where that is below 0.75.

    Source: same as the original (skimage's gaussian without a channel axis), to the last bit.
    """
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(
        np.asarray(coins, dtype=np.float32), sigma=(0, 1.5, 1.5, 1.5), mode="nearest", truncate=4
    )
    blurred[blurred < 0.75] = 0
    return blurred


class Files:
    """Uint8 images [N, 3, S, S] in files, decoded when they are asked for.

    Args:
        root: folder. names: paths of files below it.
        size: S in pixels; images are made squares of it as by `decode`.
        workers: images decoded at a time.
        index: int64 [N], which of the names; None is all.
    """

    def __init__(self, root, names, size, workers, index=None):
        # One array of bytes: a million objects would be copied by every process that counts
        # references to them.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.root, self.size, self.workers = str(root), size, workers
        self.index = torch.arange(len(self._names)) if index is None else index

    @property
    def shape(self):
        """(N, 3, S, S), as a tensor's."""
        return (len(self.index), 3, self.size, self.size)

    def __getitem__(self, index):
        """Return the images at an int64 index [n] as smaller Files; nothing is decoded yet."""
        chosen = copy.copy(self)
        chosen.index = self.index[index]
        return chosen

    def paths(self):
        """Return the paths of the files: list of N str."""
        names = self._names[self.index.numpy()].tolist()
        return [os.path.join(self.root, os.fsdecode(name)) for name in names]

    def draw(self):
        """Return all the images, uint8 [N, 3, S, S].

        Raises:
            UserError: names the file that can't be decoded.
        """
        out = torch.empty(self.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(self.workers) as pool:
            for i, image in enumerate(pool.map(lambda f: square(f, self.size), self.paths())):
                out[i] = image
        return out

    def made_of(self):
        """Return what the images are taken to be a function of: (text, tensor).

        That is the paths below `root` and the sizes of the files: their content would take hours
        to read, so a file that is changed without changing its size is not noticed.
        """
        paths = self.paths()
        parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
        with ThreadPoolExecutor() as pool:
            sizes = pool.map(lambda part: [os.path.getsize(path) for path in part], parts)
            sizes = list(itertools.chain.from_iterable(sizes))
        names = self._names[self.index.numpy()].tolist()
        lines = b"".join(b"%s %d\0" % pair for pair in zip(names, sizes, strict=True))
        return f"files {self.size};", torch.frombuffer(bytearray(lines), dtype=torch.uint8)


def pixels_at(pixels, index):
    """Return the images at an int64 index [n]: uint8 or float32 [n, 3, H, W]."""
    chosen = pixels[index]
    return chosen if isinstance(chosen, torch.Tensor) else chosen.draw()


# --- the sets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is known of an image set before it is read."""

    load: object  # function (request) -> ImageSet
    trains: bool  # whether it has a training split
    large: bool = False  # whether its files are decoded when needed, unless the user says otherwise
    mean: tuple | None = None  # normalisation constants by channel; None: measured on the images
    std: tuple | None = None


@dataclass(frozen=True)
class Request:
    """Which images are wanted: the arguments of `load`, resolved."""

    name: str
    path: Path | None
    split: str
    data_dir: Path
    size: int
    crops: bool
    seed: int
    download: bool
    workers: int


def load(spec, split, *, data_dir, size, crops=False, seed=0, download=True, workers=0):
    """Read one split of an image set into memory, or find its files.

    Args:
        spec: a name of SETS; "folder:PATH" or "npz:PATH" say where, without PATH it is `data_dir`.
        split: "train" or "test".
        data_dir: folder that holds the named sets.
        size: side in pixels that the images will have; sets of files of many sizes (folder,
            imagenet, texture) and noise are made for it, the others come as they are.
        crops: whether the images are for random crops: those of a folder in memory then keep a
            short side of 2.6 * size, below which no crop would have `size` pixels of its own.
        seed: of the noise sets.
        download: whether a missing set may be fetched from its official place.
        workers: sets made of image files: 0 decodes all of them now; else they stay Files, of
            which so many are decoded at a time.

    Returns:
        ImageSet.

    Raises:
        UserError: unknown set, missing or corrupt files, no images; says which and where.
    """
    name, path = parse_spec(spec)
    if split == "train" and not SETS[name].trains:
        raise UserError(f"{name} has no training images; it can only be an outlier set (--ood)")
    if name in WITH_PATH and path is None:
        path = Path(data_dir)
    request = Request(name, path, split, Path(data_dir), size, crops, seed, download, workers)
    images = SETS[name].load(request)
    if not len(images):
        raise UserError(f"{spec}: no images in its {split} split")
    return images


def default_workers(spec):
    """Return how many files to decode at a time where nobody says: 0 is all of them at the start.

    Args:
        spec: of the in-distribution set, as for `load`.

    Returns:
        0, or for a set that is too large for that the processor's cores, shared among the
        processes of this machine, and 8 at most.
    """
    cores = len(os.sched_getaffinity(0)) // distributed.local_world()
    return min(max(1, cores), MOST_WORKERS) if SETS[parse_spec(spec)[0]].large else 0


def has_split(spec, split, *, data_dir):
    """Tell whether a set has a split at all: a folder or file may come without test images.

    Args: as for `load`.
    """
    name, path = parse_spec(spec)
    path = path or Path(data_dir)
    if name == "folder":
        return (path / split).is_dir()
    if name == "imagenet":
        return (path / "imagenet" / IMAGENET_SPLITS[split]).is_dir()
    if name == "npz" and path.is_file():
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
            return f"{split}_images" in file.files
    return True


def parse_spec(spec):
    """Split "NAME" or "NAME:PATH" into (name, path or None).

    Raises:
        UserError: unknown name, or a path for a set that has its own place.
    """
    name, _, path = spec.partition(":")
    if name not in SETS:
        raise UserError(f"unknown image set '{spec}'; known are {', '.join(SETS)}")
    if path and name not in WITH_PATH:
        raise UserError(f"image set '{spec}': only folder and npz take a path; {name} is looked "
                        "for under --data-dir")
    return name, Path(path) if path else None


def restrict(images, classes):
    """Return the images of some classes of an ImageSet, relabelled 0, 1, ...

    Args:
        classes: ascending ints.

    Raises:
        UserError: the images have no classes, or not one of these.
    """
    known = len(images.class_names or ())
    if not known:
        raise UserError(f"--in-classes: the images of {images.name} have no classes")
    if classes[-1] >= known:
        raise UserError(f"--in-classes: {images.name} has classes 0-{known - 1}, not {classes[-1]}")
    kept = images.restrict(classes)
    if not len(kept):
        raise UserError(f"--in-classes: {images.name} has no images of classes {list(classes)}")
    return kept


def rename(images, name):
    """Return an ImageSet under another name."""
    return replace(images, name=name)


def to(images, device):
    """Return an ImageSet with pixels and labels on a device, to stay there; Files stay files."""
    pixels = images.pixels if isinstance(images.pixels, Files) else images.pixels.to(device)
    return replace(images, pixels=pixels, labels=images.labels.to(device))


def fingerprint(pixels, labels):
    """Return the sha256 (hex) of images and their labels, wherever they came from.

    Args:
        pixels: tensor [N, ...], or Noise or Files, of which it is that of what they are made of.
        labels: tensor [N].
    """
    digest = hashlib.sha256(usedforsecurity=False)
    if isinstance(pixels, (Noise, Files)):
        text, pixels = pixels.made_of()
        digest.update(text.encode())
    for array in (a.cpu().contiguous().numpy() for a in (labels, pixels)):
        digest.update(f"{array.dtype} {array.shape};".encode())
        digest.update(array)
    return digest.hexdigest()


def absolute(spec):
    """Return "NAME" or "NAME:PATH" with the path made absolute."""
    name, path = parse_spec(spec)
    return f"{name}:{path.resolve()}" if path else name


def normalisation(spec, images):
    """Return (mean, std) of a set by channel, on the [0, 1] scale: the table's, or measured.

    Args:
        spec: as for `load`.
        images: the training ImageSet; measured only where the table has no constants, and of
            more than 2,000 files on 2,000 that are always the same.

    Returns:
        two lists of three numbers.
    """
    facts = SETS[parse_spec(spec)[0]]
    if facts.mean is not None:
        return list(facts.mean), list(facts.std)
    total, square, count = torch.zeros(3).double(), torch.zeros(3).double(), 0
    index = torch.arange(len(images))
    if isinstance(images.pixels, Files):
        index = epoch_order(len(images), 0, 0)[:MEASURED_FILES]
    for rows in index.split(256):
        x = pixels_at(images.pixels, rows).double() / 255
        total += x.sum(dim=(0, 2, 3))
        square += x.square().sum(dim=(0, 2, 3))
        count += x[:, 0].numel()
    mean = total / count
    std = (square / count - mean**2).clamp(min=0).sqrt()
    std[std < 1e-6] = 1  # one grey level in all images: nothing to scale
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]


def _torchvision(folder, class_name, split_argument="split"):
    """Make the loader of a set that torchvision knows: its download, its checks."""

    def load_set(request):
        import torchvision

        cls = getattr(torchvision.datasets, class_name)
        where = request.data_dir / folder
        split = request.split == "train" if split_argument == "train" else request.split
        kwargs = {"root": str(where), split_argument: split}
        try:
            images = cls(**kwargs, download=False)
        except RuntimeError:  # torchvision's "not found or corrupted"
            _explain_corruption(cls, where, request)
            images = _download(cls, kwargs, where, request)
        except (OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{request.name}: cannot read its files in {where}: {error}") from None
        pixels, labels = images.data, getattr(images, "targets", None)
        if pixels.shape[-1] == 3:
            pixels = pixels.transpose(0, 3, 1, 2)
        labels = images.labels if labels is None else labels
        labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        names = getattr(images, "classes", None) or [str(c) for c in range(10)]
        return ImageSet(
            request.name, torch.from_numpy(np.ascontiguousarray(pixels)), labels, tuple(names)
        )

    return load_set


def _official_files(cls, where, split):
    """(path, md5) of the files torchvision reads, then those it downloads."""
    if hasattr(cls, "split_list"):  # SVHN
        _, name, md5 = cls.split_list[split]
        return [(where / name, md5)], [(name, md5)]
    named = [*cls.train_list, *cls.test_list]
    if hasattr(cls, "meta"):  # CIFAR's names of classes
        named.append((cls.meta["filename"], cls.meta["md5"]))
    files = [(where / cls.base_folder / name, md5) for name, md5 in named]
    return files, [(cls.filename, cls.tgz_md5)]


def _explain_corruption(cls, where, request):
    """Stop if a file is there but not the official one; return if files are only missing."""
    files, _ = _official_files(cls, where, request.split)
    for path, expected in files:
        if path.is_file():
            found = utils.file_hash(path, "md5")
            if found != expected:
                raise UserError(
                    f"{request.name}: {path} is corrupt: its md5 is {found}, expected {expected}; "
                    "remove it to have it downloaded again, or put the official file there"
                )


def _download(cls, kwargs, where, request):
    """Let torchvision fetch and check the set; say what to put where if it can't."""
    _, archives = _official_files(cls, where, request.split)
    wanted = ", ".join(f"{name} (md5 {md5})" for name, md5 in archives)
    place = f"put {wanted}{'' if hasattr(cls, 'split_list') else ', unpacked,'} in {where}"
    if not request.download:
        raise UserError(f"{request.name}: not found under {where}; {place}")
    try:
        return cls(**kwargs, download=True)
    except DOWNLOAD_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{request.name}: not found under {where}, and its download failed ({reason}); {place}"
        ) from None


def _mnist(request):
    """MNIST's 60,000 + 10,000 digits of 28x28 pixels, grey."""
    from torchvision.datasets import MNIST

    where = request.data_dir / "mnist"
    place = f"put {', '.join(name for name, _ in MNIST.resources)} in {where / 'MNIST/raw'}"
    try:
        try:
            images = MNIST(str(where), request.split == "train", download=False)
        except RuntimeError:  # torchvision's "not found"
            if not request.download:
                raise UserError(f"mnist: not found under {where}; {place}, unpacked") from None
            images = MNIST(str(where), request.split == "train", download=True)
    except DOWNLOAD_ERRORS as error:
        raise UserError(f"mnist: not found under {where}, and its download failed ({error}); "
                        f"{place}, unpacked") from None
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"mnist: cannot read its files in {where}: {_reason(error)}") from None
    pixels = images.data[:, None].expand(-1, 3, -1, -1).contiguous()  # grey, three times
    return ImageSet("mnist", pixels, images.targets.long(), tuple(str(c) for c in range(10)))


def _digits(request):
    """scikit-learn's 1,797 digits of 8x8 pixels; every fourth of a class is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        test[(labels == c).nonzero().squeeze(1)[3::4]] = True
    chosen = test if request.split == "test" else ~test
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    pixels = pixels[:, None].expand(-1, 3, -1, -1)  # 16 grey levels, three times
    names = tuple(str(c) for c in range(10))
    return ImageSet("digits", pixels[chosen].contiguous(), labels[chosen], names)


def _noise(request):
    pixels = Noise(request.name, request.size, request.seed)
    return ImageSet(request.name, pixels, torch.zeros(len(pixels.index), dtype=torch.int64))


def _npz(request):
    """The arrays {split}_images and {split}_labels of one file, as MedMNIST has them."""
    path = request.path
    if not path.is_file():
        raise UserError(f"npz: no file {path}")
    wanted = (f"{request.split}_images", "train_labels", "test_labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in wanted if k in file.files}
            keys = file.files
    except (OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise UserError(f"npz: cannot read {path} as an .npz file: {error}") from None
    except Exception as error:  # zipfile.BadZipFile and zlib.error share no base of their own
        raise UserError(f"npz: {path} is corrupt: {error}") from None
    key = f"{request.split}_images"
    if key not in arrays:
        raise UserError(f"npz: {path} has no array '{key}', only {', '.join(keys) or 'nothing'}")
    x = arrays[key]
    if x.dtype != np.uint8:
        raise UserError(f"npz: {key} of {path} is {x.dtype}; 8-bit images (uint8) are needed")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)) or 0 in x.shape[1:]:
        raise UserError(f"npz: {key} of {path} has shape {list(x.shape)}; [N, height, width], "
                        "[N, height, width, 1] or [N, height, width, 3] is needed")
    if x.ndim == 3:
        x = x[..., None]
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
    labels, names = torch.zeros(len(x), dtype=torch.int64), None
    if f"{request.split}_labels" in arrays:
        labels, names = _npz_labels(arrays, path, request.split, len(x))
    return ImageSet("npz" if request.path == request.data_dir else f"npz:{path}",
                    pixels, labels, names)


def _npz_labels(arrays, path, split, n):
    """Check labels [n] or [n, 1]; return them as int64 with names 0, 1, ... of both splits."""
    key = f"{split}_labels"
    y = arrays[key]
    if y.shape not in ((n,), (n, 1)) or y.dtype.kind not in "iu":
        raise UserError(f"npz: {key} of {path} is {y.dtype} {list(y.shape)}; one whole number for "
                        f"each of the {n} images is needed")
    both = [arrays[k] for k in ("train_labels", "test_labels") if k in arrays]
    both = [b for b in both if b.size and b.dtype.kind in "iu"]
    highest = max((int(b.max()) for b in both), default=0)
    if n and (y.min() < 0 or highest >= utils.MOST_CLASSES):
        raise UserError(f"npz: {key} of {path} goes from {y.min()} to {highest}; classes are "
                        "numbered from 0")
    labels = torch.from_numpy(y.reshape(n).astype(np.int64))
    return labels, tuple(str(c) for c in range(highest + 1))


# --- sets made of image files ---------------------------------------------------------------------


def _folder(request):
    """Images below PATH/train or PATH/test: a folder per class, or no classes.

    An outlier set may also be a folder without train/ and test/: all its images.
    """
    root = request.path
    if not root.is_dir():
        raise UserError(f"folder: no folder {root}")
    splits = [root / s for s in ("train", "test") if (root / s).is_dir()]
    name = "folder" if root == request.data_dir else f"folder:{root}"
    if not splits and request.split == "test" and root != request.data_dir:
        splits, chosen = [root], root
    else:
        chosen = root / request.split
    if not chosen.is_dir():
        raise UserError(f"folder: {root} has no folder {request.split}/ with images in it")
    classes = {split: _classes(split) for split in splits}
    names = sorted({name for found in classes.values() for name in found})
    found = classes[chosen]
    by_class = found or {None: image_files(chosen)}
    if not any(by_class.values()):
        raise UserError(f"folder: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {chosen}")
    return _of_files(name, request, chosen, by_class, names if found else None)


IMAGENET_SPLITS = {"train": "train", "test": "val"}


def _imagenet(request):
    """ImageNet as ILSVRC 2012 comes: imagenet/train/CLASS/*.JPEG and imagenet/val/CLASS/*.JPEG."""
    root = request.data_dir / "imagenet"
    chosen = root / IMAGENET_SPLITS[request.split]
    place = f"put its images in {chosen}/CLASS/*.JPEG, with a folder for each class"
    if not chosen.is_dir():
        raise UserError(f"imagenet: not found in {chosen}; {place}")
    splits = [root / s for s in IMAGENET_SPLITS.values() if (root / s).is_dir()]
    names = sorted({d.name for s in splits for d in _folders(s)})
    by_class = {d.name: image_files(d) for d in _folders(chosen)}
    if not any(by_class.values()):
        raise UserError(f"imagenet: no images in the class folders of {chosen}; {place}")
    return _of_files("imagenet", request, chosen, by_class, names)


def _of_files(name, request, root, by_class, names):
    """Make an ImageSet of image files below `root`, {class: [path]}; `names` of all classes."""
    files = [f for found in by_class.values() for f in found]
    labels = torch.tensor([names.index(c) if names else 0 for c, found in by_class.items()
                           for _ in found])
    if request.workers:
        below = [os.path.relpath(f, root) for f in files]
        pixels = Files(root, below, request.size, request.workers)
    else:
        most = math.ceil(request.size / NARROWEST_CROP) if request.crops else request.size
        pixels = decode(files, most, request.size)
    return ImageSet(name, pixels, labels, names and tuple(names), tuple(files))


def _folders(folder):
    """The folders in a folder, by name; hidden ones are none."""
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def _classes(folder):
    """{name of a subfolder: its images}, by name; none where images lie in `folder` itself."""
    below = {d.name: files for d in _folders(folder) if (files := image_files(d))}
    if any(_is_image(entry) for entry in os.scandir(folder)):
        if below:
            utils.note(f"{folder} holds images beside its folders of images; all are read as "
                       "images without classes")
        return {}
    return below


def image_files(folder):
    """Return the paths (str) of images at any depth, sorted by their parts.

    What lies in a hidden folder is hidden; a folder that links lead to twice is read once. The
    type of an entry comes with its name: a million files are listed without asking for each.
    """
    found, seen, left = [], set(), [str(folder)]
    while left:
        here = left.pop()
        real = os.path.realpath(here)
        if real in seen:  # a link may lead back up
            continue
        seen.add(real)
        with os.scandir(here) as entries:
            entries = sorted((e for e in entries), key=lambda e: e.name, reverse=True)
        left += [e.path for e in entries if e.is_dir() and not e.name.startswith(".")]
        found += [e.path for e in entries if _is_image(e)]
    return sorted(found, key=lambda path: path.split(os.sep))


def _is_image(entry):
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()


def _texture(request):
    """All of DTD: below data_dir/dtd/images as the original wants it, else torchvision's place."""
    places = [request.data_dir / "dtd/images", request.data_dir / "dtd/dtd/images"]
    found = next((p for p in places if p.is_dir()), None)
    if found is None:
        found = _download_dtd(request, places)
    by_class = _classes(found)
    n = sum(map(len, by_class.values()))
    if not n:
        raise UserError(f"texture: no images in the class folders of {found}")
    if n != DTD_IMAGES:
        utils.note(f"texture: {found} holds {n} images of {len(by_class)} classes; the "
                   f"whole of DTD has {DTD_IMAGES} of 47, which published numbers are of")
    return _of_files("texture", request, found, by_class, list(by_class))


def _download_dtd(request, places):
    from torchvision.datasets import DTD

    place = f"put the images of dtd-r1.0.1.tar.gz (md5 {DTD._MD5}) in {places[0]}/CLASS/"
    if not request.download:
        raise UserError(f"texture: not found in {places[0]}; {place}")
    try:
        DTD(str(request.data_dir), download=True)
    except DOWNLOAD_ERRORS as error:
        raise UserError(
            f"texture: not found in {places[0]}, and its download failed ({error}); {place}"
        ) from None
    return places[1]


def decode(files, most, least=None):
    """Decode image files to squares of one size.

    The short side is brought to S pixels (bilinear, antialiased, 8-bit, by PIL as the original
    does), then the central square is kept. S is the smallest short side of all files, so that
    none is enlarged, within the bounds.

    Args:
        files: paths.
        most, least: bounds of S; without `least` it is `most`.

    Returns:
        uint8 [N, 3, S, S].

    Raises:
        UserError: names the file that can't be decoded, or is grey of more than 8 bits (of 16-bit
            colour PIL takes the upper 8 bits, which is right); the squares don't fit into memory.
    """
    least = most if least is None else least
    _check_memory(len(files), least)
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        side = most
        if least < most:
            side = max(least, min(most, *pool.map(_short_side, files)))
            _check_memory(len(files), side)
        out = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        for i, image in enumerate(pool.map(lambda f: square(f, side), files)):
            out[i] = image
    return out


def _check_memory(n, side):
    """Stop if n decoded images of this side are more than the memory that is left."""
    # Every process of this machine holds a copy, and the first of them goes first
    copies = distributed.local_world() - (distributed.local_rank() > 0)
    needed, left = copies * n * 3 * side**2, utils.available_memory()
    if needed > left:
        raise UserError(
            f"{n} images of {side} pixels take {needed / 2**30:.1f} GiB of memory"
            f"{f' in {copies} processes' if copies > 1 else ''}, and {left / 2**30:.1f} GiB are "
            "left; with --workers 4, say, they are decoded as they are needed")


def _short_side(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception as error:
        raise UserError(f"cannot decode the image {path}: {_reason(error)}") from None


def picture(path):
    """Decode one file to an RGB image of PIL.

    Raises:
        UserError: names the file; as `decode`.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # "RGB" would clip these at 255
                raise UserError(f"the image {path} has more than 8 bits a channel (PIL mode "
                                f"{image.mode}); convert it to 8 bits")
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # PIL raises many types on broken files; each means the same here
        raise UserError(f"cannot decode the image {path}: {_reason(error)}") from None


def square(path, side):
    """Decode one file to uint8 [3, side, side], as `decode` does."""
    from PIL import Image

    image = picture(path)
    scale = side / min(image.size)
    if scale != 1:
        # torchvision's Resize(int): the long side is cut down to a whole number of pixels
        width, height = (side if s == min(image.size) else int(side * s / min(image.size))
                         for s in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((s - side) / 2) for s in image.size)
    return to_tensor(image.crop((left, top, left + side, top + side)))


def to_tensor(image):
    """Return an RGB image of PIL as uint8 [3, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _reason(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


CIFAR10 = {"mean": (0.491, 0.482, 0.447), "std": (0.202, 0.199, 0.201)}
CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # the original's choice: no change

SETS = {
    "cifar10": Facts(_torchvision("cifar10", "CIFAR10", "train"), True, **CIFAR10),
    "cifar100": Facts(_torchvision("cifar100", "CIFAR100", "train"), True, **CIFAR100),
    "svhn": Facts(_torchvision("svhn", "SVHN"), True, **PLAIN),
    "stl": Facts(_torchvision("stl10", "STL10"), True, **PLAIN),
    "mnist": Facts(_mnist, True),
    "digits": Facts(_digits, True),
    "folder": Facts(_folder, True),
    "imagenet": Facts(_imagenet, True, large=True),
    "npz": Facts(_npz, True),
    "texture": Facts(_texture, False),
    "blobs": Facts(_noise, False),
    "gaussian": Facts(_noise, False),
    "uniform": Facts(_noise, False),
}
WITH_PATH = ("folder", "npz")  # sets that are wherever the user has them
TRAINABLE = [name for name, facts in SETS.items() if facts.trains]


# --- order and choice -----------------------------------------------------------------------------


def epoch_order(n, seed, epoch):
    """Return the order of an epoch's images: int64 [n], a function of (seed, epoch) alone."""
    return torch.randperm(n, generator=utils.generator(seed, "order", epoch))


def few_shot(labels, k, generator):
    """Choose k known outliers of each class at random.

    Args:
        labels: int64 [N].
        k: how many of each class, 1 or more.
        generator: torch.Generator on the CPU.

    Returns:
        (known, rest): int64 indices, a partition of 0..N-1; `known` class after class, at random
        within each, `rest` rising.

    Raises:
        ValueError: a class has no more than k images; names it.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    known = []
    for c in labels.unique().tolist():
        mine = shuffled[labels[shuffled] == c]
        if len(mine) <= k:
            raise ValueError(f"class {c} has {len(mine)} images, so none would be left to test on")
        known.append(mine[:k])
    known = torch.cat(known)
    left = torch.ones(len(labels), dtype=torch.bool)
    left[known] = False
    return known, left.nonzero().squeeze(1)
