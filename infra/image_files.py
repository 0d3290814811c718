"""Images in files: found, decoded when they are needed, and cropped by worker processes.

    files = ImageFiles("photos/train", ["a.jpg", "b/c.png"], size=64, workers=4)
    files[torch.tensor([1])].load()                          # uint8 [1, 3, 64, 64]
    for pixels, params in training_batches(files, "ssl", order, rows_of, views=2, size=64, ...):
        x = augment.apply_colors(pixels.to(device), params, 64, mean, std)

A worker process makes whole training batches: crop and flip for "ssl", the central square for
"org"; the device does the rest, with the parameters that come along. Every draw is a function of
(seed, epoch, step, position in the global batch), so neither the number of workers or of training
processes nor a resume changes which crop an image gets.
"""

import contextlib
import copy
import io
import itertools
import os
import signal
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader

import augment
import utils
from utils import UserError

# PIL chooses by content, and for some formats starts a program, as Ghostscript for EPS.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SUFFIXES = ", ".join(IMAGE_SUFFIXES)
MAX_PIXELS = 178_956_970  # of a picture that is decoded whole: 540 MB; where PIL refuses by default
ENLARGED = 2**22  # pixels to which a strip is enlarged at most, 13 MB


class LazyImages:
    """Images [N, 3, S, S] of a side `size`, made by `load`; `index` says which of all they are."""

    @property
    def shape(self):
        """(N, 3, S, S), as a tensor's."""
        return (len(self.index), 3, self.size, self.size)

    def __getitem__(self, index):
        """Return the images at an int64 index [n] as a smaller set; none is made yet."""
        chosen = copy.copy(self)
        chosen.index = self.index[index]
        return chosen


class ImageFiles(LazyImages):
    """Uint8 images [N, 3, S, S] in files, decoded when they are asked for.

    Args: root: folder. names: paths below it. size: S in pixels. workers: decoded at a time.
        upright, interpolation, failed: see `decode`.
    """

    def __init__(self, root, names, size, workers, upright=False, interpolation="bilinear",
                 failed=None):
        # One array: reference counting would copy a million objects to every worker process.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.root, self.size, self.workers, self.upright = str(root), size, workers, upright
        self.interpolation, self.failed = interpolation, failed
        self.index = torch.arange(len(self._names))

    def paths(self):
        """Return the paths of the files: list of N str."""
        return [os.path.join(self.root, os.fsdecode(name)) for name in self._chosen()]

    def _chosen(self):
        return self._names[self.index.numpy()].tolist()

    def load(self):
        """Return all the images, uint8 [N, 3, S, S]; errors as of `decode`."""
        return decode(self.paths(), self.size, None, self.workers, self.upright,
                      self.interpolation, self.failed)

    def fingerprint_inputs(self):
        """Return what the images are taken to be a function of: (text, tensor).

        Paths and sizes: to read the files takes hours. Changes of equal size go unnoticed.
        """
        paths = self.paths()
        parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
        with ThreadPoolExecutor() as pool:
            sizes = itertools.chain(*pool.map(lambda part: [*map(os.path.getsize, part)], parts))
            lines = b"".join(b"%s %d\0" % pair for pair in zip(self._chosen(), sizes, strict=True))
        text = f"files {self.size}{' upright' * self.upright};"
        return text, torch.frombuffer(bytearray(lines), dtype=torch.uint8)


def list_folder(folder, failed=None):
    """Return (folders, images, others) of a folder itself: paths (str), a Counter by suffix.

    What is hidden is left out. A link that leads nowhere is a UserError, or added to `failed`.
    """
    folders, images, others = [], [], Counter()
    # The type of an entry comes with its name: a million files are listed without a call for each.
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            error = UserError(f"{entry.path} is a link to {os.readlink(entry.path)}, where there "
                              "is nothing; put the picture there, or remove the link")
            if failed is None:
                raise error
            failed[entry.path] = error
        elif entry.is_dir():
            folders.append(entry.path)
        elif suffix in IMAGE_SUFFIXES and entry.is_file():
            images.append(entry.path)
        else:
            others[suffix or "without a suffix"] += 1
    return folders, images, others


def find_images(folder, failed=None):
    """Return (images, others) of a folder at any depth, as of `list_folder`, sorted by their parts.

    A folder that links lead to twice is read once.
    """
    found, others, seen, left = [], Counter(), set(), [str(folder)]
    while left:
        here = left.pop()
        if (real := os.path.realpath(here)) in seen:  # a link may lead back up
            continue
        seen.add(real)
        folders, images, more = list_folder(here, failed)
        left, found, others = left + folders, found + images, others + more
    return sorted(found, key=lambda path: path.split(os.sep)), others


def note_unread(name, others, n):
    """Say which files beside the n images of a set were not read: a Counter of `list_folder`."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
    if kinds:
        utils.note(f"{name}: {others.total()} of {others.total() + n} files were not read: {kinds} "
                   f"(images are {SUFFIXES})")


def decode(files, max_side, min_side=None, threads=None, upright=False, interpolation="bilinear",
           failed=None):
    """Decode image files to squares of one size: uint8 [N, 3, S, S].

    The short side is resized to S pixels (antialiased, 8-bit, by PIL as in the original), then the
    central square is kept. S is the smallest short side of all files within the bounds.

    Args:
        files: paths. threads: images decoded at a time; None leaves it to Python.
        max_side, min_side: bounds of S in pixels; without `min_side` it is `max_side`.
        upright: as of `load_rgb`. interpolation: "bilinear", the original's, or "bicubic".
        failed: a dict to which {path: UserError} of files that cannot be decoded are added, whose
            images are black; None raises the first.
    Raises: UserError: names the file that can't be decoded, or is grey of more than 8 bits.
    """
    def short_side(path):
        with _opened(path) as image:
            return min(image.size)

    def load(path):
        try:
            return resize_center_crop(load_rgb(path, upright), side, interpolation)
        except UserError as error:
            if failed is None:
                raise
            failed[path] = error
            return torch.zeros(3, side, side, dtype=torch.uint8)

    # PIL decodes outside the interpreter's lock. Its warnings do not say of which file they are.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.filterwarnings("ignore", module="PIL")
        side = max_side
        if min_side is not None and min_side < max_side:
            side = max(min_side, min(max_side, *pool.map(short_side, files)))
        out = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        for i, image in enumerate(pool.map(load, files)):
            out[i] = image
    return out


@contextlib.contextmanager
def _opened(path):
    """An image file opened by PIL; an error inside the context is a UserError that names it."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # `load_rgb` has a limit of its own, which names the file
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # PIL raises many types on broken files; each means the same here
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot decode the image {path}: {reason}") from None


def load_rgb(path, upright=False, enough=None):
    """Decode one file to an RGB image of PIL; errors as of `decode`.

    Args: upright: whether to turn the picture as its EXIF says. enough: pixels of the short side
        to which a JPEG may be reduced while it is decoded.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        if enough is not None:
            image.draft(None, (enough, enough))
        if image.width * image.height > MAX_PIXELS:  # a JPEG is reduced while it is decoded
            image.draft(None, (image.width // 8, image.height // 8))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"the image {path} has {image.width} x {image.height} pixels, more "
                            f"than {MAX_PIXELS:,}; save it smaller, or as JPEG")
        if image.mode.startswith(("I", "F")):  # "RGB" would clip these at 255
            raise UserError(f"the image {path} has more than 8 bits a channel (PIL mode "
                            f"{image.mode}); convert it to 8 bits")
        rgb = image.convert("RGB")
        if upright:
            with contextlib.suppress(Exception):  # damaged EXIF does not make pixels unreadable
                ImageOps.exif_transpose(rgb, in_place=True)
        return rgb


def thumbnail(path, side):
    """Return a picture, upright, as JPEG of at most `side` x `side` pixels: bytes."""
    small = load_rgb(path, upright=True, enough=2 * side)  # many times as fast as to decode it all
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()


def resize_center_crop(image, side, interpolation="bilinear"):
    """Turn an RGB image of PIL into uint8 [3, side, side], as `decode` does."""
    from PIL import Image

    short, most = min(image.size), max(16, ENLARGED // side**2)
    # Only the middle of a strip is enlarged. An even number of pixels goes, so the centre stays.
    left, top = (max(0, (s - most * short) // 2) for s in image.size)
    if left or top:
        image = image.crop((left, top, image.width - left, image.height - top))
    # As torchvision's Resize(int), which rounds the long side down
    width, height = (side if s == short else int(side * s / short) for s in image.size)
    image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = (round((s - side) / 2) for s in image.size)
    return to_tensor(image.crop((left, top, left + side, top + side)))


def crop(image, box, size):
    """Resize a window, int64 [4] (top, left, height, width), of a PIL image: uint8 [3, size, size].

    Source: torchvision's resized_crop by PIL, as in the original: antialiased, of the window alone.
    """
    from PIL import Image

    top, left, height, width = box.tolist()
    image = image.crop((left, top, left + width, top + height))
    return to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))


def to_tensor(image):
    """Return an RGB image of PIL as uint8 [3, height, width]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def training_batches(files, augmentation, order, rows_of, *, views, size, seed, epoch, first=0,
                     pin=False):
    """Yield the batches of one epoch, made ahead by `files.workers` processes; errors as `decode`.

    Args:
        files: ImageFiles. augmentation: "ssl" or "org". order: sequence of int64 [B], the images of
            each global batch. rows_of: function B -> slice, those that this process trains on.
        views: of each image. size: S in pixels. first: step to begin with.
        seed, epoch: with the step they decide the draws. pin: whether a GPU fetches the batches.
    Yields: (pixels, params) of its b images, view after view: uint8 [views * b, 3, S, S], and
        SSLParams (box and flip are applied) or OrgParams (to be applied).
    """
    load = {"ssl": _ssl_batch, "org": _org_batch}[augmentation]

    def load_batch(step):
        batch, generator = order[step], utils.generator(seed, "augment", epoch, step)
        rows = rows_of(len(batch))
        try:
            return load(files[batch[rows]], len(batch), rows, views, size, generator)
        except UserError as error:
            return error  # raised here it would come with a traceback

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more workers than cores, if that is wanted
        batches = iter(DataLoader(
            range(first, len(order)), batch_size=None, collate_fn=load_batch, pin_memory=pin,
            num_workers=files.workers, worker_init_fn=_ignore_signals,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # or it would draw from the global stream
        ))
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        del batches  # and with it the workers, even where a traceback holds this frame


def _ignore_signals(worker):
    """Leave signals, which a shell or Slurm sends to all, to the training process."""
    # It asks its workers to end, after the batch they are at; they look whether it is still there.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _ssl_batch(files, batch, rows, views, size, generator):
    """Random crops of pictures of any size, flipped; their parameters."""
    u = augment.uniform_ssl(views * batch, generator).unflatten(0, (views, batch))[:, rows]
    box = torch.empty(*u.shape[:2], 4, dtype=torch.int64)  # [views, b, 4]
    pixels = torch.empty(*u.shape[:2], 3, size, size, dtype=torch.uint8)
    for i, path in enumerate(files.paths()):
        image = load_rgb(path, files.upright)
        box[:, i] = augment.ssl_boxes(u[:, i], image.height, image.width)
        for view in range(views):
            pixels[view, i] = crop(image, box[view, i], size)
    pixels, params = pixels.flatten(0, 1), augment.ssl_params(u.flatten(0, 1), box.flatten(0, 1))
    pixels[params.flip] = pixels[params.flip].flip(3)
    return pixels, params


def _org_batch(files, batch, rows, views, size, generator):
    """Central squares of pictures; how they are to be shifted and flipped."""
    params = augment.sample_views("org", views, batch, rows, size, size, generator)
    pixels = decode(files.paths(), size, threads=1, upright=files.upright)
    return pixels.repeat(views, 1, 1, 1), params
