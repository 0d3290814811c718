"""Which image sets exist, and how their images come to be uint8 [N, 3, H, W] in memory.

    train = load("cifar10", "train", data_dir="./datasets", size=32)
    train.pixels, train.labels          # uint8 [50000, 3, 32, 32], int64 [50000]
    load("folder:photos/odd", "test", data_dir="./datasets", size=64)
    load("imagenet", "train", data_dir="./datasets", size=224, workers=8)   # stay on disk

DATASETS has a row per set. Only the noise sets, the order of training and the choice of known
outliers are random; each has its own generator.
"""

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import utils
from infra import distributed, image_files, storage
from infra.image_files import ImageFiles, LazyImages
from utils import UserError

DIGITS = tuple("0123456789")
NOISE_IMAGES = 10_000  # of each of blobs, gaussian and uniform
NOISE_BLOCK = 100  # images drawn by one generator
DTD_IMAGES = 5_640
# Width of the narrowest training crop (a fifth of the area, 3:4) relative to the short side: a
# larger picture has detail that no crop of it keeps.
NARROWEST_CROP = math.sqrt(0.2 * 3 / 4)
MAX_WORKERS = 8  # by default; more would wait for a ResNet-50, with batches in shared memory
MEASURED_FILES = 2_000  # of a set on disk, from which normalisation constants are measured
ROUNDING = 1 / 255 / math.sqrt(12)  # standard deviation of what rounding to grey levels adds


@dataclass(frozen=True)
class ImageSet:
    """Images of one split of one set, with their classes."""

    name: str  # in logs and records
    pixels: "torch.Tensor | Noise | ImageFiles"  # uint8 [N, 3, H, W], or made when asked for
    labels: torch.Tensor  # int64 [N]; all 0 where the images have no classes
    class_names: tuple[str, ...] | None = None  # of the whole set, by label; None: no classes
    paths: tuple[str, ...] | None = None  # of the image files; None where a file holds many images

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        """Return the images at an int64 index [n], in its order, as a set of the same name."""
        paths = self.paths and tuple(self.paths[i] for i in index.tolist())
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], paths=paths)


class Noise(LazyImages):
    """Float32 images [N, 3, S, S] in [0, 1], sampled when they are asked for.

    Block b of 100 images comes from a generator of (seed, kind, b), so any part can be had without
    the rest: 10,000 images of 224 pixels would be 6 GB. `kind` is a key of NOISE.
    """

    def __init__(self, kind, size, seed):
        self.kind, self.size, self.seed = kind, size, seed
        self.index = torch.arange(NOISE_IMAGES)

    def load(self):
        """Return all the images, float32 [N, 3, S, S]."""
        out = torch.empty(self.shape)
        block, place = self.index // NOISE_BLOCK, self.index % NOISE_BLOCK
        for b in block.unique().tolist():
            rng = np.random.default_rng([self.seed, *self.kind.encode(), b])
            images = NOISE[self.kind](rng, (NOISE_BLOCK, self.size, self.size, 3))
            images = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
            out[block == b] = images[place[block == b]]
        return out

    def fingerprint_inputs(self):
        """Return what the images are a function of: (text, tensor)."""
        return f"{self.kind} {self.size} {self.seed};", self.index


def blobs(coins):
    """Turn coin tosses, 0/1 [N, S, S, 3], into blobs of colour, float32.

    They are blurred along all three axes of an image, colour included, and 0 where that is below
    0.75. Source: same as the original (skimage's gaussian without a channel axis), to the last bit.
    """
    from scipy.ndimage import gaussian_filter

    coins = np.asarray(coins, dtype=np.float32)
    blurred = gaussian_filter(coins, sigma=(0, 1.5, 1.5, 1.5), mode="nearest", truncate=4)
    blurred[blurred < 0.75] = 0
    return blurred


NOISE = {  # functions (numpy generator, [N, S, S, 3]) -> images of that shape
    "blobs": lambda rng, shape: blobs(rng.random(shape) < 0.7),
    "gaussian": lambda rng, shape: rng.normal(0.5, 0.25, shape).clip(0, 1),
    "uniform": lambda rng, shape: rng.random(shape),
}


def load_pixels(pixels, index):
    """Return the images at an int64 index [n]: uint8 or float32 [n, 3, H, W]."""
    chosen = pixels[index]
    return chosen if isinstance(chosen, torch.Tensor) else chosen.load()


# --- the sets -------------------------------------------------------------------------------------


class DatasetInfo(NamedTuple):
    """What is known of an image set before it is read."""

    load: Callable  # LoadRequest -> ImageSet
    trains: bool = True  # whether it has a training split
    large: bool = False  # whether its files are decoded when needed, unless the user says otherwise
    mean: tuple | None = None  # normalisation constants by channel; None: measured on the images
    std: tuple | None = None


class LoadRequest(NamedTuple):
    """The arguments of `load`, resolved."""

    name: str  # of the ImageSet: "NAME" or "NAME:PATH"
    root: Path  # PATH or data_dir
    split: str
    size: int
    crops: bool
    seed: int
    download: bool
    workers: int
    interpolation: str


def load(spec, split, *, data_dir, size, crops=False, seed=0, download=True, workers=0,
         interpolation="bilinear"):
    """Read one split of an image set into memory, or find its files: an ImageSet.

    Args:
        spec: a name of DATASETS, or "folder:PATH" or "npz:PATH"; without PATH it is `data_dir`.
        split: "train" or "test". data_dir: folder that holds the named sets.
        size: side in pixels of noise and of images in files; other sets keep their own size.
        crops: whether the images are for random crops: those of files in memory then keep a short
            side of up to 2.6 * size, so that the narrowest crop has `size` pixels of its own.
        seed: of the noise sets. workers: image files decoded at a time, as ImageFiles; 0 decodes
            all of them now. interpolation: of image files, see image_files.decode.
    Raises: UserError: unknown set, missing or corrupt files, no images; says which and where.
    """
    name, path = parse_spec(spec)
    if split == "train" and not DATASETS[name].trains:
        raise UserError(f"{name} has no training images; it can only be an outlier set (--ood)")
    root = path or Path(data_dir)
    full_name = name if root == Path(data_dir) else f"{name}:{root}"
    images = DATASETS[name].load(LoadRequest(full_name, root, split, size, crops, seed, download,
                                             workers, interpolation))
    if not len(images):
        raise UserError(f"{spec}: no images in its {split} split")
    return images


def default_workers(spec):
    """Return `load`'s workers by default: 0; for a large set the cores of a process, at most 8."""
    cores = len(os.sched_getaffinity(0)) // distributed.local_world_size()
    return min(max(1, cores), MAX_WORKERS) if DATASETS[parse_spec(spec)[0]].large else 0


def has_split(spec, split, *, data_dir):
    """Tell whether a set has a split at all: a folder or file may come without test images."""
    name, path = parse_spec(spec)
    path = path or Path(data_dir)
    if name == "npz" and path.is_file():
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
            return f"{split}_images" in file.files
    folders = {"folder": path / split, "imagenet": path / "imagenet" / IMAGENET_SPLITS[split]}
    return name not in folders or folders[name].is_dir()


def parse_spec(spec):
    """Split "NAME" or "NAME:PATH" into (name, path or None); a UserError names what is allowed."""
    name, _, path = spec.partition(":")
    if name not in DATASETS:
        raise UserError(f"unknown image set '{spec}'; known are {', '.join(DATASETS)}")
    if path and name not in WITH_PATH:
        raise UserError(f"image set '{spec}': only folder and npz take a path; {name} is looked "
                        "for under --data-dir")
    return name, Path(os.path.expanduser(path)) if path else None


def restrict(images, classes):
    """Return the images of some classes of an ImageSet, relabelled 0, 1, ... in the order given.

    Raises: UserError: the images have no classes, or there are none of these.
    """
    known, highest = len(images.class_names or ()), max(classes)
    if not known:
        raise UserError(f"--in-classes: the images of {images.name} have no classes")
    if highest >= known:
        raise UserError(f"--in-classes: {images.name} has classes 0-{known - 1}, not {highest}")
    new = torch.full((known,), -1)
    new[list(classes)] = torch.arange(len(classes))
    kept = images.subset((new[images.labels] >= 0).nonzero().squeeze(1))
    if not len(kept):
        raise UserError(f"--in-classes: {images.name} has no images of classes {list(classes)}")
    names = tuple(images.class_names[c] for c in classes)
    return replace(kept, labels=new[kept.labels], class_names=names)


def to(images, device):
    """Return an ImageSet with pixels and labels on a device, to stay there; files stay on disk."""
    pixels = images.pixels if isinstance(images.pixels, ImageFiles) else images.pixels.to(device)
    return replace(images, pixels=pixels, labels=images.labels.to(device))


def fingerprint(pixels, labels):
    """Return the sha256 (hex) of labels and images; of Noise and ImageFiles, of what makes them."""
    digest = hashlib.sha256(usedforsecurity=False)
    if isinstance(pixels, LazyImages):
        text, pixels = pixels.fingerprint_inputs()
        digest.update(text.encode())
    for array in (a.cpu().contiguous().numpy() for a in (labels, pixels)):
        digest.update(f"{array.dtype} {array.shape};".encode())
        digest.update(array)
    return digest.hexdigest()


def place(images, data_dir):
    """Return the path of the file or folder that the images of a set lie in; it need not exist."""
    if images.paths:
        return os.path.commonpath([min(images.paths), max(images.paths)])
    name, _, path = images.name.partition(":")
    return path or (data_dir if name in WITH_PATH else
                    os.path.join(data_dir, {"stl": "stl10"}.get(name, name)))


def normalisation(spec, images):
    """Return (mean, std) by channel on the [0, 1] scale, two lists: the table's, else measured.

    They are measured on the training ImageSet `images`; of files, on 2,000 that stay the same.
    """
    info = DATASETS[parse_spec(spec)[0]]
    if info.mean is not None:
        return list(info.mean), list(info.std)
    sums, count, index = torch.zeros(2, 3, dtype=torch.float64), 0, torch.arange(len(images))
    if isinstance(images.pixels, ImageFiles):
        index = epoch_order(len(images), 0, 0)[:MEASURED_FILES]
    for rows in index.split(256):
        x = load_pixels(images.pixels, rows).double() / 255
        sums += torch.stack([y.sum(dim=(0, 2, 3)) for y in (x, x.square())])
        count += x[:, 0].numel()
    mean, square = sums / count
    std = (square - mean**2).clamp(min=0).sqrt()
    std[std < ROUNDING] = 1  # nearly one grey level in all images: nothing to scale
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]


def _to_rgb(x):
    """uint8 array [N, H, W], [N, H, W, 1] or [N, H, W, 3] -> contiguous tensor [N, 3, H, W]."""
    x = torch.from_numpy(x[..., None] if x.ndim == 3 else x)
    return x.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


def _torchvision(class_name, request):
    """A set that torchvision downloads, checks and reads, in a folder of its own."""
    import torchvision

    cls = getattr(torchvision.datasets, class_name)
    where = request.root / class_name.lower()
    is_svhn_or_stl = class_name in ("SVHN", "STL10")
    split = request.split if is_svhn_or_stl else request.split == "train"
    try:
        images = cls(str(where), split, download=False)
    except Exception as error:  # of many types: of files, pickle, archives and torchvision
        if "not found" not in str(error):  # torchvision's words: "not found or corrupted"
            what = f"{request.name}: cannot read its files in {where}"
            raise UserError(f"{what}: {error!r}") from None
        files, wanted = _official_files(cls, where, split)
        for path, expected in files:
            if path.is_file() and (found := storage.file_hash(path, "md5")) != expected:
                raise UserError(f"{request.name}: {path} is corrupt: its md5 is {found}, expected "
                                f"{expected}; remove it to have it downloaded again, or put the "
                                "official file there") from None
        images = _download(request, where, wanted, lambda: cls(str(where), split, download=True))
    pixels = np.asarray(images.data)
    pixels = pixels.transpose(0, 2, 3, 1) if is_svhn_or_stl else pixels  # channels last
    labels = np.asarray(images.labels if is_svhn_or_stl else images.targets)
    names = (name.partition(" - ")[0] for name in getattr(images, "classes", DIGITS))  # "7 - seven"
    return ImageSet(request.name, _to_rgb(pixels), torch.from_numpy(labels).long(), tuple(names))


def _official_files(cls, where, split):
    """[(path, md5)] of the files that torchvision checks, and what to put where: text."""
    if cls.__name__ == "SVHN":
        _, name, md5 = cls.split_list[split]
        return [(where / name, md5)], f"{name} (md5 {md5}) in {where}"
    if cls.__name__ == "MNIST":
        archives = ", ".join(f"{name} (md5 {md5})" for name, md5 in cls.resources)
        return [], f"{archives}, unpacked, in {where / 'MNIST/raw'}"
    named = [*cls.train_list, *cls.test_list]
    if hasattr(cls, "meta"):  # CIFAR's names of classes
        named.append((cls.meta["filename"], cls.meta["md5"]))
    files = [(where / cls.base_folder / name, md5) for name, md5 in named]
    return files, f"{cls.filename} (md5 {cls.tgz_md5}), unpacked, in {where}"


def _download(request, where, wanted, download):
    """Let torchvision download and check a set; if it can't, say what to put where."""
    reason, missing = "", [p for p in (where, *where.parents) if not p.exists()]
    if request.download:
        try:
            return download()
        except Exception as error:  # of as many types, and those of the connection
            reason = f", and its download failed ({error!r})"
        for folder, *_ in os.walk(missing[-1], topdown=False) if missing else ():
            with contextlib.suppress(OSError):  # it holds what was downloaded
                os.rmdir(folder)
    raise UserError(f"{request.name}: not found under {where}{reason}; put {wanted}") from None


def _digits(request):
    """scikit-learn's 1,797 digits of 8x8 pixels; every fourth of a class is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    chosen = torch.full((len(labels),), request.split == "train")
    for c in range(10):
        chosen[(labels == c).nonzero().squeeze(1)[3::4]] ^= True
    pixels = _to_rgb(np.rint(bunch.images * (255 / 16)).astype(np.uint8))  # 16 grey levels
    return ImageSet("digits", pixels[chosen], labels[chosen], DIGITS)


def _noise(request):
    pixels = Noise(request.name, request.size, request.seed)
    return ImageSet(request.name, pixels, torch.zeros(NOISE_IMAGES, dtype=torch.int64))


def _npz(request):
    """The arrays {split}_images and {split}_labels of one file, as MedMNIST has them.

    Labels are integers [N] or [N, 1]; the classes are 0, 1, ... of both splits, else none.
    """
    path, key = request.root, f"{request.split}_images"
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = file.files
            arrays = {k: file[k] for k in [key] if k in keys}
            for k in {"train_labels", "test_labels"}.intersection(keys):
                with contextlib.suppress(ValueError):  # of Python's objects: they are not unpickled
                    arrays[k] = file[k]
    except Exception as error:  # of many types: of files, zip archives, zlib and numpy
        raise UserError(f"npz: cannot read {path} as an .npz file: {error!r}") from None
    if key not in arrays:
        raise UserError(f"npz: {path} has no array '{key}', only {', '.join(keys) or 'nothing'}")
    x = arrays[key]
    is_image = x.ndim >= 3 and x.shape[3:] in ((), (1,), (3,)) and 0 not in x.shape[1:]
    if x.dtype != np.uint8 or not is_image:
        raise UserError(f"npz: {key} of {path} is {x.dtype} {list(x.shape)}; expected uint8 [N, "
                        "height, width], [N, height, width, 1] or [N, height, width, 3]")
    key, n = f"{request.split}_labels", len(x)
    both = {k: y for k, y in arrays.items() if k.endswith("_labels") and y.dtype.kind in "iu"
            and (y.ndim == 1 or y.shape[1:] == (1,))}
    if key not in both:
        if key in keys:  # most runs never read them: SimCLR's, and outliers of eval_ssd.py
            y = arrays.get(key, np.array(None))
            utils.note(f"npz: {key} of {path} is {y.dtype} {list(y.shape)}, no integers [N] or "
                       "[N, 1]: its images are without classes")
        return ImageSet(request.name, _to_rgb(x), torch.zeros(n, dtype=torch.int64))
    y, highest = both[key], max(int(b.max(initial=0)) for b in both.values())
    if len(y) != n or y.min(initial=0) < 0 or highest >= utils.MAX_CLASSES:
        raise UserError(f"npz: {key} of {path} is {y.dtype} {list(y.shape)} from "
                        f"{y.min(initial=0)} to {highest}; expected a class, from 0 to at most "
                        f"{utils.MAX_CLASSES - 1}, for each of the {n} images")
    labels = torch.from_numpy(y.reshape(n).astype(np.int64))
    return ImageSet(request.name, _to_rgb(x), labels, tuple(map(str, range(highest + 1))))


# --- sets made of image files ---------------------------------------------------------------------


def _folder(request):
    """Images below PATH/train or PATH/test: a folder per class, or no classes."""
    root = request.root
    if not root.is_dir():
        raise UserError(f"folder: no folder {root}")
    splits = [root / s for s in ("train", "test") if (root / s).is_dir()]
    chosen, (folders, loose, _) = root / request.split, image_files.list_folder(root)
    beside = [image for path in folders if splits and Path(path) not in splits
              for image in image_files.find_images(path)[0]]
    # An outlier set may be any folder, and one of its classes may be called train or test.
    is_split = len(splits) == 2 or (splits and not beside)
    if request.split == "test" and request.name != "folder" and not is_split:
        splits, chosen = [root], root
    elif splits and chosen == splits[-1] and (beside := loose + beside):
        utils.note(f"folder: {len(beside)} images of {root} beside train/ and test/ were not read, "
                   f"the first {beside[0]}")
    if not chosen.is_dir():
        raise UserError(f"folder: {root} has no folder {request.split}/ with images in it")
    classes = {split: _classes(split, may_be_flat=True) for split in splits}
    by_class, others = classes[chosen]
    names = sorted({name for known, _ in classes.values() for name in known if name is not None})
    return _of_files(request, chosen, by_class, others, None if None in by_class else names or None)


IMAGENET_SPLITS = {"train": "train", "test": "val"}


def _imagenet(request):
    """ImageNet as ILSVRC 2012 comes: imagenet/train/CLASS/*.JPEG and imagenet/val/CLASS/*.JPEG."""
    root = request.root / "imagenet"
    chosen = root / IMAGENET_SPLITS[request.split]
    if not chosen.is_dir():
        raise UserError(f"imagenet: not found; put its images in {chosen}/CLASS/*.JPEG")
    by_class, others = _classes(chosen)
    names = {os.path.basename(path) for s in IMAGENET_SPLITS.values() if (root / s).is_dir()
             for path in image_files.list_folder(root / s)[0]}
    return _of_files(request, chosen, by_class, others, sorted(names))


def _classes(folder, may_be_flat=False):
    """({name of a subfolder: its images}, Counter of other files); {None: all} of a flat folder."""
    folders, loose, others = image_files.list_folder(folder)
    below = {}
    for path in folders:
        images, more = image_files.find_images(path)
        below |= {os.path.basename(path): images} if images else {}
        others += more
    if loose and may_be_flat:
        if below:
            utils.note(f"{folder} holds images beside folders of images; all are without classes")
        below = {None: image_files.find_images(folder)[0]}
    return below, others


def _of_files(request, root, by_class, others, names=None):
    """Make an ImageSet of image files below `root`, {class: [path]}; `names` of all classes."""
    files = [f for found in by_class.values() for f in found]
    image_files.note_unread(f"{request.name}: {root}", others, len(files))
    if not files:
        place = root if names is None else f"the class folders {root}/CLASS/"
        raise UserError(f"{request.name}: no images ({image_files.SUFFIXES}) in {place}")
    label = {name: i for i, name in enumerate(names or [None])}
    labels = torch.tensor([label[c] for c, found in by_class.items() for _ in found])
    upright = request.name.partition(":")[0] == "folder"  # named sets are as they were published
    how = dict(upright=upright, interpolation=request.interpolation)
    if request.workers:
        below = [os.path.relpath(f, root) for f in files]
        pixels = ImageFiles(root, below, request.size, request.workers, **how)
    else:
        most = math.ceil(request.size / NARROWEST_CROP) if request.crops else request.size
        pixels = image_files.decode(files, most, request.size, **how)
    return ImageSet(request.name, pixels, labels, names and tuple(names), tuple(files))


def _texture(request):
    """All of DTD: below data_dir/dtd/images as the original wants it, else torchvision's place."""
    usual, torchvisions = request.root / "dtd/images", request.root / "dtd/dtd/images"
    found = usual if usual.is_dir() else torchvisions
    if not found.is_dir():
        from torchvision.datasets import DTD

        wanted = f"the images of dtd-r1.0.1.tar.gz (md5 {DTD._MD5}) in {usual}/CLASS/"
        _download(request, usual, wanted, lambda: DTD(str(request.root), download=True))
    by_class, others = _classes(found)
    images = _of_files(request, found, by_class, others, list(by_class))
    if len(images) != DTD_IMAGES:
        utils.note(f"texture: {found} holds {len(images)} images of {len(by_class)} classes; the "
                   f"whole of DTD, which published numbers are of, has {DTD_IMAGES} of 47")
    return images


CIFAR10 = {"mean": (0.491, 0.482, 0.447), "std": (0.202, 0.199, 0.201)}
CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # the original's choice: no change

DATASETS = {
    "cifar10": DatasetInfo(functools.partial(_torchvision, "CIFAR10"), **CIFAR10),
    "cifar100": DatasetInfo(functools.partial(_torchvision, "CIFAR100"), **CIFAR100),
    "svhn": DatasetInfo(functools.partial(_torchvision, "SVHN"), **PLAIN),
    "stl": DatasetInfo(functools.partial(_torchvision, "STL10"), **PLAIN),
    "mnist": DatasetInfo(functools.partial(_torchvision, "MNIST")),
    "digits": DatasetInfo(_digits),
    "folder": DatasetInfo(_folder),
    "imagenet": DatasetInfo(_imagenet, large=True),
    "npz": DatasetInfo(_npz),
    "texture": DatasetInfo(_texture, trains=False),
    **{kind: DatasetInfo(_noise, trains=False) for kind in NOISE},
}
WITH_PATH = ("folder", "npz")  # sets that are wherever the user has them
TRAINABLE = [name for name, info in DATASETS.items() if info.trains]


# --- order and choice -----------------------------------------------------------------------------


def epoch_order(n, seed, epoch):
    """Return the order of an epoch's images: int64 [n], a function of (seed, epoch) alone."""
    return torch.randperm(n, generator=utils.generator(seed, "order", epoch))


def few_shot(labels, k, generator):
    """Choose k known outliers of each class at random.

    Args: labels: int64 [N]. k: int >= 1. generator: torch.Generator on the CPU.
    Returns: (known, rest), int64 indices that partition 0..N-1; `known` class after class, at
        random within each, `rest` ascending.
    Raises: ValueError: names a class of k images or fewer.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    known = []
    for c in labels.unique().tolist():
        mine = shuffled[labels[shuffled] == c]
        if len(mine) <= k:
            raise ValueError(f"class {c} has {len(mine)} images, so none would be left to test on")
        known.append(mine[:k])
    known = torch.cat(known)
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill(0, known, False)
    return known, rest.nonzero().squeeze(1)
