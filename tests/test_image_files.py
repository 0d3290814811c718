"""infra/image_files.py: batches are torchvision's crops, whoever decodes them, in how many parts.

Decoding, indexing and fingerprints of image files: tests/test_data.py.
"""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

import augment
import data
import utils
from infra import image_files
from utils import UserError

SEED, EPOCH, SIZE = 5, 2, 16
SHAPES = [(40, 24), (17, 30), (33, 33), (9, 50), (16, 16), (8, 12), (60, 21)]  # height, width


def write(folder, shapes=SHAPES, suffix=".png", mode="RGB"):
    """Write pictures of random bytes; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:02d}{suffix}" for i in range(len(shapes))]
    for path, (height, width) in zip(paths, shapes, strict=True):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.convert(mode).save(path)
    return paths


def files_of(paths, workers=1, size=SIZE):
    return image_files.ImageFiles(paths[0].parent, [p.name for p in paths], size, workers)


def everything(n):
    return slice(0, n)


def batches(files, batch_size=3, augmentation="ssl", rows_of=everything, **kwargs):
    order = data.epoch_order(len(files.index), SEED, EPOCH).split(batch_size)
    views = 2 if augmentation == "ssl" else 1
    settings = dict(views=views, size=SIZE, seed=SEED, epoch=EPOCH) | kwargs
    return list(image_files.training_batches(files, augmentation, order, rows_of, **settings))


def assert_equal(one, other):
    assert len(one) == len(other)
    for (x, params), (y, others) in zip(one, other, strict=True):
        assert torch.equal(x, y)
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_crops_are_torchvisions_of_the_whole_picture_to_the_last_bit(tmp_path):
    kinds = [(".png", "RGB"), (".jpg", "RGB"), (".bmp", "L"), (".JPEG", "CMYK")]
    paths = [path for kind in kinds for path in write(tmp_path / "a", SHAPES, *kind)]
    order = data.epoch_order(len(paths), SEED, EPOCH).split(10)
    found = batches(files_of(paths), 10)
    assert [len(x) for x, _ in found] == [20, 20, 16]  # two views of 10, 10, 8
    for step, ((pixels, params), index) in enumerate(zip(found, order, strict=True)):
        u = augment.uniform_ssl(2 * len(index), utils.generator(SEED, "augment", EPOCH, step))
        for row in range(2 * len(index)):
            image = Image.open(paths[index[row % len(index)]]).convert("RGB")
            own = u[row : row + 1]
            own = augment.ssl_params(own, augment.ssl_boxes(own, image.height, image.width))
            expected = F.resized_crop(image, *own.box[0].tolist(), [SIZE, SIZE])
            expected = F.hflip(expected) if own.flip[0] else expected
            assert torch.equal(pixels[row], F.pil_to_tensor(expected))
            assert all(torch.equal(a[0], b[row]) for a, b in zip(own, params, strict=True))


def test_crops_of_squares_differ_from_those_in_memory_by_rounding_alone(tmp_path):
    # A square that is no larger than 2.6 times the crop stands in memory as it is, and its draws
    # are the same numbers. PIL rounds to whole levels after each of its two passes: half a level,
    # of which the second pass takes a weighted mean, and half a level.
    write(tmp_path / "train", [(40, 40)] * 24)
    where = dict(data_dir=tmp_path, size=SIZE, crops=True)
    resident = data.load("folder", "train", **where).pixels
    assert resident.shape == (24, 3, 40, 40)
    files = data.load("folder", "train", workers=1, **where).pixels
    (pixels, params), = batches(files, batch_size=24)
    order = data.epoch_order(24, SEED, EPOCH)
    theirs = augment.sample_ssl(48, 40, 40, utils.generator(SEED, "augment", EPOCH, 0))
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))
    repeated = resident[order].repeat(2, 1, 1, 1)
    in_memory = augment.resized_crop(repeated, params.box, params.flip, SIZE)
    difference = pixels.double() - 255 * in_memory.double()
    assert difference.abs().max() < 1.02
    # Halves are rounded up, and a window of 16 or 32 pixels makes many of them
    assert difference.mean().abs() < 0.05


def test_squares_for_shifts_and_flips_are_those_of_evaluation(tmp_path):
    files = files_of(write(tmp_path / "a"))
    found = batches(files, augmentation="org")
    order = data.epoch_order(len(SHAPES), SEED, EPOCH).split(3)
    for step, ((pixels, params), index) in enumerate(zip(found, order, strict=True)):
        assert torch.equal(pixels, files[index].load())
        theirs = augment.sample_org(len(index), utils.generator(SEED, "augment", EPOCH, step))
        assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))


@pytest.mark.parametrize("augmentation", ["ssl", "org"])
def test_neither_workers_nor_a_resume_change_a_batch(tmp_path, augmentation):
    paths = write(tmp_path / "a")
    expected = batches(files_of(paths, 1), augmentation=augmentation)
    torch.manual_seed(2)  # the global stream must not matter
    state = torch.get_rng_state()
    for first, workers in ((0, 3), (2, 2)):
        found = batches(files_of(paths, workers), augmentation=augmentation, first=first)
        assert_equal(found, expected[first:])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("augmentation", ["ssl", "org"])
def test_the_shares_of_processes_are_parts_of_the_batch_of_one(tmp_path, augmentation):
    files = files_of(write(tmp_path / "a"))
    whole = batches(files, 5, augmentation)
    cuts = (lambda n: slice(0, n // 3), lambda n: slice(n // 3, n // 2), lambda n: slice(n // 2, n))
    parts = [batches(files, 5, augmentation, cut) for cut in cuts]
    views = 2 if augmentation == "ssl" else 1
    for step, (pixels, params) in enumerate(whole):
        for field in range(1 + len(params)):
            expected = (pixels, *params)[field]
            mine = [(part[step][0], *part[step][1])[field] for part in parts]
            mine = [m.unflatten(0, (views, len(m) // views)) for m in mine]  # some are empty
            assert torch.equal(torch.cat(mine, dim=1).flatten(0, 1), expected)


@pytest.mark.parametrize("augmentation", ["ssl", "org"])
def test_a_broken_file_ends_with_its_name_from_inside_a_worker(tmp_path, augmentation):
    paths = write(tmp_path / "a")
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    with pytest.raises(UserError, match=r"cannot decode the image .*a/04\.png") as caught:
        batches(files_of(paths, 2), augmentation=augmentation)
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.fixture
def begun(tmp_path):
    """Batches of one picture each, of which two workers have made some."""
    files = files_of(write(tmp_path / "a"), 2)
    order = data.epoch_order(len(SHAPES), SEED, EPOCH).split(1)
    made = image_files.training_batches(files, "ssl", order, everything, views=2, size=SIZE,
                                        seed=SEED, epoch=EPOCH)
    next(made), next(made)
    return made


@pytest.mark.usefixtures("terminal")
def test_workers_leave_signals_to_their_parent(begun):
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        for child in multiprocessing.active_children():
            os.kill(child.pid, getattr(signal, name))
    time.sleep(0.1)  # or the next batch may be asked for before the signals arrive
    assert [len(pixels) for pixels, _ in begun] == [2] * (len(SHAPES) - 2)


def test_workers_end_when_their_parent_stops_asking(begun):
    children = multiprocessing.active_children()
    assert len(children) == 2
    begun.close()
    assert not any(child.is_alive() for child in children)
