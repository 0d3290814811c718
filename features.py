"""Images -> features: one pass of a network over an image set.

    train = extract(network.encoder, images, size=32, batch_size=256, mean=MEAN, std=STD)

The result is the only thing held besides one batch: a float32 array [N, D] on the CPU.
"""

from dataclasses import replace

import torch
from tqdm import tqdm

import augment
import data
import utils


def extract(
    forward, images, *, size, batch_size, mean=None, std=None, mode="base", seed=0, copy=0
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

    Returns:
        float32 tensor [N, D] on the CPU.
    """
    device = next(forward.parameters()).device
    kind = images.name.partition(":")[0]  # the way a path is spelt decides nothing
    draws = _draw(images, mode, utils.generator(seed, mode, kind, copy))
    was_training = forward.training
    forward.eval()
    out = None
    starts = range(0, len(images), batch_size)
    with torch.inference_mode():
        for start in tqdm(starts, desc=images.name, leave=False, disable=None):
            index = torch.arange(start, min(start + batch_size, len(images)))
            pixels = data.pixels_at(images.pixels, index).to(device)
            if mode == "base":
                x = augment.apply_base(pixels, size, mean, std)
            else:
                apply = augment.apply_ssl if mode == "ssl" else augment.apply_org
                x = apply(pixels, type(draws)(*(d[index] for d in draws)), size, mean, std)
            batch = forward(x).float()
            if out is None:
                out = torch.empty(len(images), batch.shape[1])
            out[start : start + len(batch)] = batch
    forward.train(was_training)
    return out


def _draw(images, mode, generator):
    """Draw the augmentation of a whole set; nothing for "base"."""
    if mode == "ssl":
        return augment.draw_ssl(len(images), *images.pixels.shape[2:], generator)
    return augment.draw_org(len(images), generator) if mode == "org" else None


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
