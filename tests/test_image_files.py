"""infra/image_files.py: batches are torchvision's crops, whoever decodes them, in how many parts.

Decoding, indexing and fingerprints of image files: tests/test_data.py.
"""

import math
import multiprocessing
import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageOps
from tiny import sample_org, sample_ssl

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


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_a_folder_stand_as_the_camera_was_held(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (path,) = write(tmp_path / "a/train/x", [(40, 24)], suffix)
    Image.open(path).save(path, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    square = image_files.resize_center_crop(expected, SIZE)
    where = dict(data_dir=tmp_path, size=SIZE)
    for workers in (0, 1):
        found = data.load(f"folder:{tmp_path / 'a'}", "train", workers=workers, **where).pixels
        assert torch.equal(data.load_pixels(found, torch.tensor([0]))[0], square)
    (pixels, params), = batches(found)
    assert torch.equal(pixels[0], image_files.crop(expected, params.box[0], SIZE).flip(
        [2] if params.flip[0] else []))
    if suffix != ".tif":  # which PIL itself turns
        (tmp_path / "imagenet").mkdir()
        (tmp_path / "imagenet/train").symlink_to(tmp_path / "a/train")
        named = data.load("imagenet", "train", **where).pixels[0]
        assert torch.equal(named, image_files.resize_center_crop(
            Image.open(path).convert("RGB"), SIZE))


def test_the_fingerprint_of_files_says_whether_they_are_turned(tmp_path):
    paths = write(tmp_path / "a")
    turned, plain = (image_files.ImageFiles(tmp_path / "a", [p.name for p in paths], SIZE, 1, u)
                     for u in (True, False))
    assert turned.fingerprint_inputs()[0] != plain.fingerprint_inputs()[0]


def test_damaged_exif_leaves_a_picture_as_it_lies(tmp_path):
    (path,) = write(tmp_path / "a", [(40, 24)], ".jpg")
    Image.open(path).save(path, exif=b"Exif\0\0no TIFF at all")
    assert image_files.load_rgb(path, upright=True).size == (24, 40)


def test_a_picture_of_too_many_pixels_is_reduced_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 3000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of PIL, whose word names no file
    jpeg, png = (write(tmp_path / kind, [(64, 72)], kind)[0] for kind in (".jpg", ".png"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = write(tmp_path / "ordinary", [(40, 40)])
        assert image_files.decode([jpeg, *whole], 8).shape == (2, 3, 8, 8)
        with pytest.raises(UserError, match=r"00\.png has 72 x 64 pixels, more than 3,000"):
            image_files.decode([jpeg, png], 8)
    assert caught == []
    assert image_files.load_rgb(jpeg).size == (9, 8)


def test_a_warning_of_pil_that_names_no_file_is_not_printed(tmp_path):
    (path,) = write(tmp_path / "a", [(8, 8)], ".png", "P")
    Image.open(path).save(path, transparency=bytes(range(256)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(path).convert("RGB")
        assert len(caught) == 1
        image_files.decode([path], 8)
    assert len(caught) == 1


@pytest.mark.parametrize(("width", "height"), [(4000, 1), (3999, 1), (2, 5000), (1, 4001)])
def test_the_square_of_a_strip_is_enlarged_alone(tmp_path, monkeypatch, width, height):
    (path,) = write(tmp_path / "a", [(height, width)])
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *how: (
        sizes.append(size) or resize(image, size, *how)))
    whole = image_files.decode([path], SIZE)
    monkeypatch.setattr(image_files, "ENLARGED", 2**15)
    assert torch.equal(image_files.decode([path], SIZE), whole)
    assert [max(size) < 4000 for size in sizes] == [False, True]


def test_a_million_pixels_in_a_row_are_not_all_enlarged(tmp_path, monkeypatch):
    (path,) = write(tmp_path / "a", [(1, 1_000_000)])
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *how: (
        sizes.append(size) or resize(image, size, *how)))
    assert image_files.decode([path], 64).shape == (1, 3, 64, 64)
    assert math.prod(sizes[0]) <= 2**22 + 128


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
    theirs = sample_ssl(48, 40, 40, utils.generator(SEED, "augment", EPOCH, 0))
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
        theirs = sample_org(len(index), utils.generator(SEED, "augment", EPOCH, step))
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
