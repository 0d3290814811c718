"""A network of 8 features and images of 8 pixels: whole commands take a fraction of a second.

Its covariances are regular, so that scores can be compared to many digits, and a ResNet's own
arithmetic is tested elsewhere (golden/forward.npz).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import augment
import models


class TinyEncoder(nn.Module):
    """Float [B, 3, S, S] -> float [B, 8]; it goes by the name of "tiny" where models.py has it."""

    width = 8

    def __init__(self):
        super().__init__()
        # Without padding batch norm would hide the mean that images are normalised by.
        self.conv = nn.Conv2d(3, self.width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(self.width)

    def forward(self, x):
        # A kink would turn another rounding, on another machine, into another gradient.
        return F.softplus(self.bn(self.conv(x))).mean(dim=(2, 3))


def draws(seed, *key):
    """The generator of a place in a run, written out: words are the bytes of their letters."""
    words = [seed]
    for part in key:
        words += list(part.encode()) if isinstance(part, str) else [part]
    (state,) = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


def sample_ssl(n, height, width, generator):
    """The parameters of one view of n images each."""
    return augment.sample_views("ssl", 1, n, slice(None), height, width, generator)


def sample_org(n, generator):
    return augment.sample_views("org", 1, n, slice(None), 8, 8, generator)


def tiny_network(head, classes, seed=0):
    """A TinyEncoder with a head of models.HEADS, its weights drawn from a seed."""
    return models.build_model("tiny", head, classes, draws(seed, "weights"))


def write_images(path, train=60, test=60, shift=25, seed=0):
    """Write an .npz of images of 8 pixels, whose 4 classes have tints that noise half hides."""
    rng, arrays = np.random.default_rng(seed), {}
    tints = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    for split, n in (("train", train), ("test", test)):
        labels = np.arange(n) % 4
        noise = rng.integers(0, 256 - shift, (n, 8, 8, 3))
        images = noise + shift * tints[labels, None, None]
        arrays[f"{split}_images"] = images.astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(path, **arrays)
    return path
