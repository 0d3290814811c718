"""The training batches of images that stay in files: decoded and cropped by other processes.

    for pixels, draws in batches(files, "ssl", order, share, views=2, size=224, seed=1, epoch=0):
        x = augment.apply_colors(pixels.to(device), draws, 224, mean, std)

A worker process makes whole batches: crop and flip for "ssl", the central square for "org"; what
comes after is done on the device, with the draws that come along. Every draw is a function of
(seed, epoch, step, position in the global batch), so neither the number of workers nor that of
training processes, nor a resume, changes which crop an image gets.
"""

import ctypes
import functools
import multiprocessing
import os
import signal
import warnings

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import augment
import data
import utils


def batches(files, augmentation, order, share, *, views, size, seed, epoch, first=0, pin=False):
    """Yield the batches of one epoch, made ahead by `files.workers` processes.

    Args:
        files: data.Files of N images.
        augmentation: "ssl" or "org".
        order: sequence of int64 [B], the images of each global batch.
        share: function B -> slice, the images of it that this process trains on.
        views: of each image.
        size: S in pixels. seed, epoch: with the step they decide the draws.
        first: step to begin with.
        pin: whether a GPU is to fetch the batches.

    Yields:
        (pixels, draws) of the b images of this process, view after view: uint8 [views * b, 3, S, S]
        and SSLDraws whose box and flip have been applied, or OrgDraws that are still to be.

    Raises:
        utils.UserError: names the file that can't be decoded.
    """
    over = multiprocessing.RawValue(ctypes.c_bool, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # more workers than cores, if that is wanted
        made = iter(DataLoader(
            Batches(files, augmentation, order, share, views, size, seed, epoch), batch_size=None,
            sampler=range(first, len(order)), num_workers=files.workers, pin_memory=pin,
            worker_init_fn=functools.partial(_leave_signals, over), multiprocessing_context="fork",
            generator=torch.Generator(),  # or it would draw from the global stream
        ))
    try:
        for batch in made:
            if isinstance(batch, utils.UserError):
                raise batch
            yield batch
    finally:
        over.value = True
        del made  # and with it the workers, even where a traceback holds this frame


def _leave_signals(over, worker):
    """Let the process that trains answer signals, which a shell or Slurm sends to all.

    SIGTERM is also what it ends its workers with; then it has said that all is over.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: over.value and os._exit(0))


class Batches(Dataset):
    """The batches of one epoch, made when they are asked for: item s is that of step s.

    Args: as for `batches`.
    """

    def __init__(self, files, augmentation, order, share, views, size, seed, epoch):
        self._files, self._order, self._share = files, order, share
        self._views, self._size = views, size
        self._make, self._place = MAKERS[augmentation], (seed, "augment", epoch)

    def __getitem__(self, step):
        """Return (pixels, draws) of a step; a file that can't be decoded as the UserError."""
        whole = self._order[step]
        mine = self._share(len(whole))
        generator = utils.generator(*self._place, step)
        paths = self._files[whole[mine]].paths()
        try:
            return self._make(paths, len(whole), mine, self._views, self._size, generator)
        except utils.UserError as error:
            return error  # raised here it would come with a traceback


def _ssl(paths, n, mine, views, size, generator):
    """Random crops of pictures of any sizes, flipped; the draws of their colours."""
    u = augment.uniform_ssl(views * n, generator).unflatten(0, (views, n))[:, mine]
    box = torch.empty(*u.shape[:2], 4, dtype=torch.int64)  # [views, b, 4]
    pixels = torch.empty(*u.shape[:2], 3, size, size, dtype=torch.uint8)
    for i, path in enumerate(paths):
        picture = data.picture(path)
        box[:, i] = augment.ssl_boxes(u[:, i], picture.height, picture.width)
        for view in range(views):
            pixels[view, i] = crop(picture, box[view, i], size)
    pixels, draws = pixels.flatten(0, 1), augment.ssl_draws(u.flatten(0, 1), box.flatten(0, 1))
    pixels[draws.flip] = pixels[draws.flip].flip(3)
    return pixels, draws


def _org(paths, n, mine, views, size, generator):
    """Central squares of pictures; how they are to be shifted and flipped."""
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for i, path in enumerate(paths):
        pixels[i] = data.square(path, size)
    draws = augment.draw_org(views * n, generator)
    draws = (d.unflatten(0, (views, n))[:, mine].flatten(0, 1) for d in draws)
    return pixels.repeat(views, 1, 1, 1), augment.OrgDraws(*draws)


MAKERS = {"ssl": _ssl, "org": _org}


def crop(picture, box, size):
    """Cut a window out of a picture and bring it to one size, in 8 bits.

    Args:
        picture: RGB image of PIL.
        box: int64 [4], top, left, height and width in pixels.
        size: S.

    Returns:
        uint8 [3, S, S].

    Source: torchvision's resized_crop of PIL images, as in the original: bilinear, antialiased,
    and pixels outside the window have no part in it.
    """
    top, left, height, width = box.tolist()
    picture = picture.crop((left, top, left + width, top + height))
    return data.to_tensor(picture.resize((size, size), Image.Resampling.BILINEAR))
