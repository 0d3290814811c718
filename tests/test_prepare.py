"""Outlier sets made from a user's own images; and MNIST, which OpenOOD has beside them."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import data
from infra import prepare
from utils import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folder of seven photos of 300 x 280 to 300 x 400 pixels, two of them deeper."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for i in range(7):
        path = home / "photos" / ("deep" if i > 4 else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (280 + 20 * i, 300, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return home / "photos"


def test_fix_images_are_torchvisions_resize_crop_and_antialiased_resize(
    call, photos, tmp_path
):
    done = call("infra/prepare.py", "fix", photos, "out.npz", "--images", 7, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as file:
        assert file.files == ["test_images"]
        images = file["test_images"]
    chain = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(256), transforms.Resize(32)]
    )
    files = sorted(photos.rglob("*.png"))
    expected = np.stack([np.array(chain(Image.open(f).convert("RGB"))) for f in files])
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected)
    read = data.load(f"npz:{tmp_path / 'out.npz'}", "test", data_dir=tmp_path, size=32)
    assert read.pixels.shape == (7, 3, 32, 32)


def test_the_draw_is_a_function_of_the_seed(photos):
    drawn = [prepare.choose(photos, 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(files)) == 4 and files == sorted(files) for files in drawn)


def test_a_list_of_openood_gives_its_images_in_its_order(call, photos, tmp_path):
    (tmp_path / "list.txt").write_text("photos/3.png 7\nphotos/deep/5.png -1\n")
    done = call("infra/prepare.py", "list", "list.txt", "out.npz", "--root", photos.parent,
                cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as file:
        images = file["test_images"]
    chain = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    for image, name in zip(images, ("3.png", "deep/5.png"), strict=True):
        assert np.array_equal(image, np.array(chain(Image.open(photos / name))))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fix", "photos", "out.npz"], ["photos holds 7 images", "--images 10000"]),
        (["fix", "gone", "out.npz"], ["no folder gone"]),
        (["fix", "photos", "out.zip"], ["out.zip", "end in .npz"]),
        (["list", "gone.txt", "out.npz"], ["gone.txt"]),
        (["list", "list.npz", "./list.npz"], ["OUT.npz and the source are the same file"]),
        (["list", "link.npz", "list.npz"], ["OUT.npz and the source are the same file"]),
        (["list", "list.txt", "full.npz"], ["full.npz is no regular file"]),
        (["list", "empty.txt", "out.npz"], ["empty.txt names no image"]),
        (["list", "list.txt", "out.npz", "--root", "photos"],
         ["1 of the 1 images", "--root photos", "photos/photos/3.png"]),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(call, photos, tmp_path, arguments, words):
    (tmp_path / "photos").symlink_to(photos)
    (tmp_path / "list.txt").write_text("photos/3.png 7\n")
    (tmp_path / "list.npz").write_text("photos/3.png 7\n")
    (tmp_path / "link.npz").symlink_to("list.npz")
    (tmp_path / "full.npz").symlink_to("/dev/full")
    (tmp_path / "empty.txt").write_text("\n")
    done = call("infra/prepare.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in words), line
    assert not (tmp_path / "out.npz").exists()


def idx(path, array):
    """Write an array of bytes as MNIST's files have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


def test_mnist_is_grey_in_three_channels_with_its_digits_as_classes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    raw = tmp_path / "mnist/MNIST/raw"
    for split in ("train", "t10k"):
        idx(raw / f"{split}-images-idx3-ubyte", images)
        idx(raw / f"{split}-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    read = data.load("mnist", "test", data_dir=tmp_path, size=32, download=False)
    assert torch.equal(read.pixels, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1))
    assert read.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert read.class_names == tuple("0123456789")

    (raw / "t10k-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(UserError, match=r"mnist: cannot read its files in .*mnist"):
        data.load("mnist", "test", data_dir=tmp_path, size=32, download=False)


def test_a_missing_mnist_is_refused_with_its_place(tmp_path):
    with pytest.raises(UserError, match=r"mnist: not found under .*; put train-images.* in .*raw"):
        data.load("mnist", "test", data_dir=tmp_path, size=32, download=False)
