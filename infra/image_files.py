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
import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader

import augment
import utils
from utils import UserError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFiles:
    """Uint8 images [N, 3, S, S] in files, decoded when they are asked for.

    Args: root: folder. names: paths below it. size: S in pixels. workers: decoded at a time.
    """

    def __init__(self, root, names, size, workers):
        # One array: reference counting would copy a million objects to every worker process.
        self._names = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
        self.root, self.size, self.workers = str(root), size, workers
        self.index = torch.arange(len(self._names))

    @property
    def shape(self):
        """(N, 3, S, S), as a tensor's."""
        return (len(self.index), 3, self.size, self.size)

    def __getitem__(self, index):
        """Return the images at an int64 index [n] as smaller ImageFiles; nothing is decoded yet."""
        chosen = copy.copy(self)
        chosen.index = self.index[index]
        return chosen

    def paths(self):
        """Return the paths of the files: list of N str."""
        names = self._names[self.index.numpy()].tolist()
        return [os.path.join(self.root, os.fsdecode(name)) for name in names]

    def load(self):
        """Return all the images, uint8 [N, 3, S, S]; errors as of `decode`."""
        return decode(self.paths(), self.size, threads=self.workers)

    def fingerprint_inputs(self):
        """Return what the images are taken to be a function of: (text, tensor).

        That is the paths below `root` and the sizes of the files: reading their content would take
        hours. So a file whose content changes but not its size goes unnoticed.
        """
        paths, names = self.paths(), self._names[self.index.numpy()].tolist()
        parts = [paths[i : i + 1000] for i in range(0, len(paths), 1000)]
        with ThreadPoolExecutor() as pool:
            sizes = itertools.chain(*pool.map(lambda part: [*map(os.path.getsize, part)], parts))
            lines = b"".join(b"%s %d\0" % pair for pair in zip(names, sizes, strict=True))
        return f"files {self.size};", torch.frombuffer(bytearray(lines), dtype=torch.uint8)


def find_images(folder):
    """Return the paths (str) of images at any depth, sorted by their parts.

    The content of a hidden folder is hidden; a folder that links lead to twice is read once. The
    type of an entry comes with its name: a million files are listed without a call for each.
    """
    found, seen, left = [], set(), [str(folder)]
    while left:
        here = left.pop()
        real = os.path.realpath(here)
        if real in seen:  # a link may lead back up
            continue
        seen.add(real)
        entries = sorted(os.scandir(here), key=lambda e: e.name, reverse=True)
        left += [e.path for e in entries if e.is_dir() and not e.name.startswith(".")]
        found += [e.path for e in entries if is_image(e)]
    return sorted(found, key=lambda path: path.split(os.sep))


def is_image(entry):
    """Tell whether an entry of os.scandir is an image file that is not hidden."""
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()


def decode(files, max_side, min_side=None, threads=None):
    """Decode image files to squares of one size: uint8 [N, 3, S, S].

    The short side is resized to S pixels (bilinear, antialiased, 8-bit, by PIL as in the original),
    then the central square is kept. S is the smallest short side of all files within the bounds.

    Args:
        files: paths. threads: images decoded at a time; None leaves it to Python.
        max_side, min_side: bounds of S in pixels; without `min_side` it is `max_side`.

    Raises:
        UserError: names the file that can't be decoded, or is grey of more than 8 bits (of 16-bit
            colour PIL takes the upper 8 bits, which is right).
    """
    def short_side(path):
        with _opened(path) as image:
            return min(image.size)

    with ThreadPoolExecutor(threads) as pool:  # PIL decodes outside the interpreter's lock
        side = max_side
        if min_side is not None and min_side < max_side:
            side = max(min_side, min(max_side, *pool.map(short_side, files)))
        out = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        squares = pool.map(lambda file: resize_center_crop(load_rgb(file), side), files)
        for i, image in enumerate(squares):
            out[i] = image
    return out


@contextlib.contextmanager
def _opened(path):
    """An image file opened by PIL; an error inside the context is a UserError that names it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # PIL raises many types on broken files; each means the same here
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot decode the image {path}: {reason}") from None


def load_rgb(path):
    """Decode one file to an RGB image of PIL; errors as of `decode`."""
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):  # "RGB" would clip these at 255
            raise UserError(f"the image {path} has more than 8 bits a channel (PIL mode "
                            f"{image.mode}); convert it to 8 bits")
        return image.convert("RGB")


def resize_center_crop(image, side):
    """Turn an RGB image of PIL into uint8 [3, side, side], as `decode` does."""
    from PIL import Image

    short = min(image.size)  # as torchvision's Resize(int), which rounds the long side down
    width, height = (side if s == short else int(side * s / short) for s in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
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
            return load(files[batch[rows]].paths(), len(batch), rows, views, size, generator)
        except UserError as error:
            return error  # raised here it would come with a traceback

    over = multiprocessing.RawValue(ctypes.c_bool, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more workers than cores, if that is wanted
        batches = iter(DataLoader(
            range(first, len(order)), batch_size=None, collate_fn=load_batch, pin_memory=pin,
            num_workers=files.workers, worker_init_fn=functools.partial(_ignore_signals, over),
            multiprocessing_context="fork",
            generator=torch.Generator(),  # or it would draw from the global stream
        ))
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        over.value = True
        del batches  # and with it the workers, even where a traceback holds this frame


def _ignore_signals(over, worker):
    """Ignore signals, which a shell or Slurm sends to all: the training process answers them.

    It also ends its workers with SIGTERM; then it has set `over` before.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: over.value and os._exit(0))


def _ssl_batch(paths, batch, rows, views, size, generator):
    """Random crops of pictures of any size, flipped; their parameters."""
    u = augment.uniform_ssl(views * batch, generator).unflatten(0, (views, batch))[:, rows]
    box = torch.empty(*u.shape[:2], 4, dtype=torch.int64)  # [views, b, 4]
    pixels = torch.empty(*u.shape[:2], 3, size, size, dtype=torch.uint8)
    for i, path in enumerate(paths):
        image = load_rgb(path)
        box[:, i] = augment.ssl_boxes(u[:, i], image.height, image.width)
        for view in range(views):
            pixels[view, i] = crop(image, box[view, i], size)
    pixels, params = pixels.flatten(0, 1), augment.ssl_params(u.flatten(0, 1), box.flatten(0, 1))
    pixels[params.flip] = pixels[params.flip].flip(3)
    return pixels, params


def _org_batch(paths, batch, rows, views, size, generator):
    """Central squares of pictures; how they are to be shifted and flipped."""
    params = augment.sample_views("org", views, batch, rows, size, size, generator)
    return decode(paths, size, threads=1).repeat(views, 1, 1, 1), params
