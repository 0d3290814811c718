"""data.py: what each set hands over, where it looks for it, and how images are chosen and ordered.

    pytest tests/test_data.py

Official sets are tiny files in the official layout, whose checksums torchvision is told to expect.
"""

import hashlib
import math
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from scipy.stats import chisquare, norm
from sklearn.datasets import load_digits
from torchvision import datasets, transforms

import data
from infra import image_files
from utils import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load(spec, split, tmp_path, size=8, **kwargs):
    return data.load(spec, split, data_dir=tmp_path, size=size, download=False, **kwargs)


def image_set(n=12, classes=4, **kwargs):
    """Image i is all i, its class i modulo `classes`."""
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    names = tuple("abcdefgh"[:classes])
    return data.ImageSet("tiny", pixels, torch.arange(n) % classes, names, **kwargs)


# --- digits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return {s: data.load("digits", s, data_dir="nowhere", size=8) for s in ("train", "test")}


def test_digits_are_the_1797_of_scikit_learn_each_in_one_split(digits):
    bunch = load_digits()
    levels = np.floor(bunch.images * 255 / 16 + 0.5).astype(np.uint8)  # 0-16 -> 0-255
    whole = Counter((i.tobytes(), t) for i, t in zip(levels, bunch.target, strict=True))
    found = Counter(
        (image[0].numpy().tobytes(), label)
        for part in digits.values()
        for image, label in zip(part.pixels, part.labels.tolist(), strict=True)
    )
    assert found == whole
    assert (len(digits["train"]), len(digits["test"])) == (1352, 445)


def test_a_quarter_of_each_digit_is_for_testing(digits):
    train, test = (digits[s].labels.bincount() for s in ("train", "test"))
    assert len(train) == len(test) == 10
    assert ((test - (train + test) / 4).abs() < 1).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_are_grey_pictures_of_8_pixels_with_17_levels(digits, split):
    part = digits[split]
    assert part.pixels.shape == (len(part), 3, 8, 8)
    assert part.pixels.dtype == torch.uint8
    assert set(part.pixels.unique().tolist()) == {math.floor(v * 255 / 16 + 0.5) for v in range(17)}
    assert torch.equal(part.pixels, part.pixels[:, :1].expand(-1, 3, -1, -1))
    assert part.labels.dtype == torch.int64
    assert part.class_names == tuple("0123456789")


# --- npz ------------------------------------------------------------------------------------------


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1)])
def test_grey_arrays_become_three_equal_channels(tmp_path, shape):
    x = random_bytes(*shape)
    images = load(write_npz(tmp_path / "a.npz", test_images=x), "test", tmp_path)
    expected = torch.from_numpy(x.reshape(5, 1, 6, 7)).expand(5, 3, 6, 7)
    assert torch.equal(images.pixels, expected)
    assert images.pixels.is_contiguous()


def test_colour_arrays_come_with_their_channels_first(tmp_path):
    x = random_bytes(5, 6, 7, 3)
    images = load(write_npz(tmp_path / "a.npz", train_images=x), "train", tmp_path)
    assert torch.equal(images.pixels, torch.from_numpy(x.transpose(0, 3, 1, 2)))
    assert images.name == f"npz:{tmp_path / 'a.npz'}"


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_labels_of_an_array_may_stand_in_a_column(tmp_path, shape):
    y = np.array([2, 0, 1, 2], dtype=np.uint8).reshape(shape)
    spec = write_npz(tmp_path / "a.npz", test_images=random_bytes(4, 6, 6), test_labels=y)
    images = load(spec, "test", tmp_path)
    assert images.labels.tolist() == [2, 0, 1, 2]
    assert images.labels.dtype == torch.int64
    assert images.class_names == ("0", "1", "2")


def test_arrays_without_labels_are_images_without_classes(tmp_path):
    spec = write_npz(tmp_path / "a.npz", test_images=random_bytes(4, 6, 6))
    images = load(spec, "test", tmp_path)
    assert images.class_names is None
    assert images.labels.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("train", "test"), [([0, 4], [1, 0]), ([0, 1], [4, 0])])
def test_both_splits_of_a_file_count_the_same_classes(tmp_path, train, test):
    spec = write_npz(
        tmp_path / "a.npz",
        train_images=random_bytes(2, 6, 6), train_labels=np.array(train),
        test_images=random_bytes(2, 6, 6), test_labels=np.array(test),
    )
    assert all(load(spec, s, tmp_path).class_names == tuple("01234") for s in ("train", "test"))


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"train_images": random_bytes(2, 6, 6)}, "test_images"),
        ({"test_images": np.zeros((2, 6, 6))}, "float64"),
        ({"test_images": random_bytes(2, 6, 6, 4)}, r"\[2, 6, 6, 4\]"),
        ({"test_images": random_bytes(2, 36)}, r"\[2, 36\]"),
        ({"test_images": random_bytes(0, 6, 6)}, "no images"),
        ({"test_images": random_bytes(2, 6, 6), "test_labels": np.arange(3)}, "test_labels"),
        ({"test_images": random_bytes(2, 6, 6), "test_labels": np.array([-1, 0])}, "-1"),
    ],
    ids=["no array", "floats", "four channels", "flat", "none", "too many", "negative"],
)
def test_arrays_of_another_form_are_refused_by_what_is_wrong(tmp_path, arrays, found):
    spec = write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=found):
        load(spec, "test", tmp_path)


@pytest.mark.parametrize("labels", [
    np.eye(4, 14, dtype=np.uint8), np.arange(4.0), np.array(list("abcd")), np.array([True] * 4),
    np.array(["a", None, 2, []], dtype=object), np.int64(3), np.zeros((4, 1, 1), int),
], ids=["14 findings", "floats", "text", "bool", "objects", "a number", "three axes"])
def test_labels_of_no_class_each_are_said_and_leave_images_without_classes(
    tmp_path, capsys, labels
):
    spec = write_npz(tmp_path / "a.npz", test_images=random_bytes(4, 6, 6), test_labels=labels,
                     train_images=random_bytes(2, 6, 6), train_labels=np.arange(2))
    images = load(spec, "test", tmp_path)
    assert (len(images), images.class_names, images.labels.tolist()) == (4, None, [0] * 4)
    said = capsys.readouterr().err
    assert f"test_labels of {tmp_path / 'a.npz'} is {np.asarray(labels).dtype}" in said
    assert load(spec, "train", tmp_path).class_names == ("0", "1")  # its own are sound


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 a torn one"])
def test_a_broken_npz_file_is_named(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.npz"):
        load(f"npz:{path}", "test", tmp_path)


# --- folders of image files -----------------------------------------------------------------------


def write_image(path, height=8, width=8, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_bytes(height, width, 3, seed=seed)).convert(mode).save(path)
    return path


def by_torchvision(path, size):
    """The original's way: PIL, Resize(int), CenterCrop."""
    chain = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    image = np.array(chain(Image.open(path).convert("RGB")))
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.fixture
def pets(tmp_path):
    """A folder whose splits share one class and have one each of their own."""
    root = tmp_path / "pets"
    for seed, name in enumerate((
        "train/dog/b.png", "train/dog/a.png", "train/cat/one.png", "train/cat/deep/two.png",
        "test/dog/c.png", "test/eel/d.bmp", "test/eel/e.PNG",
    )):
        write_image(root / name, seed=seed)
    (root / "train/dog/notes.txt").write_text("no image")
    (root / "train/empty").mkdir()
    (root / "train/dog/.c.png").write_bytes(b"hidden")
    (root / "train/.trash").mkdir()
    (root / "train/.trash/d.png").write_bytes(b"hidden")
    return root


@pytest.mark.parametrize(
    ("split", "files", "labels"),
    [
        ("train", ["cat/deep/two.png", "cat/one.png", "dog/a.png", "dog/b.png"], [0, 0, 1, 1]),
        ("test", ["dog/c.png", "eel/d.bmp", "eel/e.PNG"], [1, 2, 2]),
    ],
)
def test_the_classes_of_a_folder_are_those_of_both_splits_by_name(pets, split, files, labels):
    images = load(f"folder:{pets}", split, pets.parent)
    assert images.class_names == ("cat", "dog", "eel")
    assert images.paths == tuple(str(pets / split / f) for f in files)
    assert images.labels.tolist() == labels
    expected = [by_torchvision(pets / split / f, 8) for f in files]
    assert torch.equal(images.pixels, torch.stack(expected))


def test_a_folder_without_a_path_is_the_data_folder(pets):
    images = load("folder", "test", pets)
    assert images.name == "folder"
    assert len(images) == 3


def test_images_in_no_class_folder_have_no_classes(tmp_path):
    names = [f"{i}.jpg" for i in range(3)]
    for i, name in enumerate(names):
        write_image(tmp_path / "a/train" / name, seed=i)
    images = load(f"folder:{tmp_path / 'a'}", "train", tmp_path)
    assert images.class_names is None
    assert images.labels.tolist() == [0, 0, 0]
    assert images.paths == tuple(str(tmp_path / "a/train" / n) for n in names)


def test_folders_behind_links_are_read_once(tmp_path):
    image = write_image(tmp_path / "elsewhere/x.png")
    (tmp_path / "a/train/cat").mkdir(parents=True)
    (tmp_path / "a/train/cat/link").symlink_to(image.parent)
    (image.parent / "back").symlink_to(tmp_path / "a/train/cat")  # a circle
    images = load(f"folder:{tmp_path / 'a'}", "train", tmp_path)
    assert images.paths == (str(tmp_path / "a/train/cat/link/x.png"),)


def test_images_beside_class_folders_are_said_to_have_no_classes(tmp_path, capsys):
    write_image(tmp_path / "a/train/cat/1.png")
    write_image(tmp_path / "a/train/2.png")
    images = load(f"folder:{tmp_path / 'a'}", "train", tmp_path)
    assert (len(images), images.class_names) == (2, None)
    assert "without classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "hidden", ["train/cat/.x.png", "train/.x/x.png", "train/cat/.ipynb_checkpoints/x.png"]
)
def test_hidden_files_and_the_files_of_hidden_folders_are_not_images(tmp_path, hidden):
    seen = write_image(tmp_path / "a/train/cat/seen.png")
    write_image(tmp_path / "a" / hidden)
    images = load(f"folder:{tmp_path / 'a'}", "train", tmp_path)
    assert images.paths == (str(seen),)
    assert images.class_names == ("cat",)


def test_a_hidden_folder_above_the_images_hides_nothing(tmp_path):
    write_image(tmp_path / ".cache/a/train/cat/seen.png")
    assert len(load(f"folder:{tmp_path / '.cache/a'}", "train", tmp_path)) == 1


SHAPES = [(30, 40), (50, 20), (17, 17), (9, 9), (32, 32), (32, 33), (32, 35), (33, 20), (7, 64),
          (100, 67)]  # height, width; enlarged and reduced, odd and even leftovers


@pytest.mark.parametrize("size", [32, 17, 8])
def test_files_become_in_their_order_the_squares_of_torchvisions_resize_and_centre_crop(
    tmp_path, size
):
    paths = [write_image(tmp_path / f"{i}.png", *s, seed=i) for i, s in enumerate(SHAPES)]
    found = image_files.decode(paths, size)
    assert found.dtype == torch.uint8
    assert torch.equal(found, torch.stack([by_torchvision(p, size) for p in paths]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_files_of_any_8_bit_mode_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = write_image(tmp_path / f"a.{suffix}", 20, 30, mode=mode)
    assert torch.equal(image_files.decode([path], 16)[0], by_torchvision(path, 16))


# --- files that are decoded as they are needed ----------------------------------------------------


@pytest.fixture
def imagenet(tmp_path):
    """A folder with imagenet/ in it: pictures of unequal sizes in its official layout."""
    names = ("train/n02/a.JPEG", "train/n02/b.JPEG", "train/n01/c.JPEG", "train/n03/deep/d.JPEG",
             "val/n03/e.JPEG", "val/n01/f.JPEG")
    for i, name in enumerate(names):
        write_image(tmp_path / "imagenet" / name, *SHAPES[i], seed=i)
    (tmp_path / "imagenet/train/n04").mkdir()
    return tmp_path


IMAGENET = {"train": (["n01/c", "n02/a", "n02/b", "n03/deep/d"], [0, 1, 1, 2]),
            "test": (["n01/f", "n03/e"], [0, 2])}


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_imagenet_is_read_as_its_archives_unpack(imagenet, split, workers):
    images = load("imagenet", split, imagenet, workers=workers)
    names, labels = IMAGENET[split]
    folder = imagenet / "imagenet" / {"train": "train", "test": "val"}[split]
    assert images.name == "imagenet"
    assert images.class_names == ("n01", "n02", "n03", "n04")
    assert images.paths == tuple(str(folder / f"{name}.JPEG") for name in names)
    assert images.labels.tolist() == labels
    pixels = data.load_pixels(images.pixels, slice(0, len(images)))
    assert torch.equal(pixels, torch.stack([by_torchvision(p, 8) for p in images.paths]))
    assert isinstance(images.pixels, image_files.ImageFiles) == (workers > 0)


@pytest.mark.parametrize(("split", "folder"), [("train", "train"), ("test", "val")])
def test_imagenet_that_is_not_there_or_flat_is_refused_with_its_place(tmp_path, split, folder):
    place = f"imagenet/{folder}/CLASS/"
    with pytest.raises(UserError, match=f"imagenet: not found.*{place}"):
        load("imagenet", split, tmp_path)
    assert not data.has_split("imagenet", split, data_dir=tmp_path)
    write_image(tmp_path / "imagenet" / folder / "ILSVRC2012_val_00000001.JPEG")
    assert data.has_split("imagenet", split, data_dir=tmp_path)
    with pytest.raises(UserError, match=f"no images .*in the class folders .*{place}"):
        load("imagenet", split, tmp_path)


def test_files_are_indexed_as_a_tensor_and_decoded_when_they_are_asked_for(imagenet, monkeypatch):
    images = load("imagenet", "train", imagenet, workers=2)
    resident = load("imagenet", "train", imagenet).pixels
    assert images.pixels.shape == (4, 3, 8, 8)
    decoded = []
    load_rgb = image_files.load_rgb
    monkeypatch.setattr(image_files, "load_rgb", lambda file, upright: (
        decoded.append(file) or load_rgb(file, upright)))
    part = images.subset(torch.tensor([3, 0, 0]))
    assert torch.equal(data.restrict(images, (1,)).pixels.index, torch.tensor([1, 2]))
    assert part.pixels[1:].shape == (2, 3, 8, 8)
    assert data.to(part, "cpu").pixels is part.pixels
    assert decoded == []
    assert torch.equal(part.pixels.load(), resident[[3, 0, 0]])
    assert sorted(decoded) == sorted(part.paths)
    assert part.pixels.paths() == list(part.paths)
    assert torch.equal(data.load_pixels(part.pixels, torch.tensor([2, 0])), resident[[0, 3]])
    assert data.load_pixels(part.pixels, torch.tensor([], dtype=torch.int64)).shape == (0, 3, 8, 8)


def test_known_outliers_of_files_are_those_of_the_same_images_in_memory(imagenet):
    images = load("imagenet", "train", imagenet, workers=2, size=12)
    more = images.subset(torch.arange(4).repeat(3))
    known, rest = data.few_shot(more.labels, 1, generator())
    assert (len(more.subset(known)), len(more.subset(rest))) == (3, 9)
    assert more.subset(known).pixels.load().shape == (3, 3, 12, 12)


def test_the_fingerprint_of_files_is_of_their_names_below_the_folder_sizes_and_labels(imagenet):
    def of(where, split="train", **kwargs):
        images = load("imagenet", split, where, **{"workers": 1} | kwargs)
        return data.fingerprint(images.pixels, images.labels)

    before = of(imagenet)
    moved = imagenet / "elsewhere"
    shutil.copytree(imagenet / "imagenet", moved / "imagenet")
    assert of(moved, workers=3) == before
    assert of(moved, size=9) != before
    assert of(moved, split="test") != before
    assert of(moved, workers=0) != before
    images = load("imagenet", "train", moved, workers=1)
    assert data.fingerprint(images.pixels, images.labels + 1) != before
    folder = moved / "imagenet/train"
    (folder / "n01/c.JPEG").rename(folder / "n01/z.JPEG")
    assert of(moved) != before
    (folder / "n01/z.JPEG").rename(folder / "n01/c.JPEG")
    with open(folder / "n01/c.JPEG", "ab") as file:
        file.write(b" ")
    assert of(moved) != before


@pytest.mark.parametrize(("level", "other"), [(0, 1), (255, 254), (128, 140), (7, 7)])
def test_a_channel_of_nearly_one_level_is_not_scaled(level, other):
    pixels = torch.from_numpy(random_bytes(60, 3, 8, 8))
    pixels[:, 2] = level
    pixels[7, 2, 3, 3] = other
    images = data.ImageSet("dark", pixels, torch.zeros(60, dtype=torch.int64))
    mean, std = data.normalisation("folder", images)
    assert std[2] == 1
    assert mean[2] == pytest.approx(level / 255, abs=1e-3)
    assert 0.2 < std[0] < 0.4


@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_constants_of_files_are_measured_on_a_part_that_is_always_the_same(
    imagenet, monkeypatch, most
):
    monkeypatch.setattr(data, "MEASURED_FILES", most)
    images = load("imagenet", "train", imagenet, workers=1)
    rows = data.epoch_order(4, 0, 0)[:most]
    x = images.pixels[rows].load().double() / 255
    assert len(x) == min(most, 4)
    mean, std = data.normalisation("imagenet", images)
    assert mean == pytest.approx(x.mean(dim=(0, 2, 3)).tolist(), abs=6e-5)
    assert std == pytest.approx(x.transpose(0, 1).flatten(1).std(dim=1, correction=0).tolist(),
                                abs=6e-5)
    assert data.normalisation("imagenet", images) == (mean, std)


@pytest.mark.parametrize(("spec", "cores", "local", "workers"), [
    ("imagenet", 6, 1, 6), ("imagenet", 6, 4, 1), ("imagenet", 6, 9, 1), ("imagenet", 96, 2, 8),
    ("folder:a", 6, 1, 0), ("cifar10", 6, 1, 0),
])
def test_imagenet_is_decoded_on_the_cores_of_each_process_and_other_sets_in_memory(
    monkeypatch, spec, cores, local, workers
):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr("infra.distributed.local_world_size", lambda: local)
    assert data.default_workers(spec) == workers


def test_16_bit_files_are_refused_by_name(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)).save(path)
    with pytest.raises(UserError, match=r"deep\.png"):
        image_files.decode([path], 8)


@pytest.mark.parametrize("min_side", [None, 4])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, min_side):
    good = write_image(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes(good.read_bytes()[:40])
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "torn.png"):
        with pytest.raises(UserError, match=f"cannot decode the image .*{name}"):
            image_files.decode([good, tmp_path / name], 8, min_side)


@pytest.mark.parametrize(
    ("shapes", "side"),
    [
        ([(60, 80), (70, 65)], 21),  # ceil(8 * 2.58)
        ([(15, 80), (70, 65)], 15),  # the smallest of all short sides, if that is less
        ([(6, 6), (70, 65)], 8),  # one small picture does not shrink the others below the size
        ([(12, 12), (12, 12)], 12),
    ],
)
def test_a_folder_for_crops_keeps_2_6_times_the_size_where_the_files_have_it(
    tmp_path, shapes, side
):
    for i, shape in enumerate(shapes):
        write_image(tmp_path / f"a/train/{i}.png", *shape, seed=i)
    images = load(f"folder:{tmp_path / 'a'}", "train", tmp_path, size=8, crops=True)
    expected = [by_torchvision(path, side) for path in images.paths]
    assert torch.equal(images.pixels, torch.stack(expected))


def test_the_narrowest_crop_of_a_folder_for_crops_has_as_many_pixels_as_the_result():
    side = math.ceil(32 / data.NARROWEST_CROP)
    narrowest = math.sqrt(side * side * 0.2 * 3 / 4)
    assert 32 <= narrowest < 33


def test_an_outlier_folder_without_splits_gives_all_its_images(tmp_path):
    files = [write_image(tmp_path / "odd" / f, seed=i) for i, f in enumerate(("a.png", "b.png"))]
    images = load(f"folder:{tmp_path / 'odd'}", "test", tmp_path)
    assert images.paths == tuple(map(str, files))
    assert images.class_names is None


def test_an_outlier_folder_of_class_folders_gives_all_its_classes(tmp_path):
    write_image(tmp_path / "odd/x/a.png")
    write_image(tmp_path / "odd/w/b.png")
    images = load(f"folder:{tmp_path / 'odd'}", "test", tmp_path)
    assert images.class_names == ("w", "x")
    assert images.labels.tolist() == [0, 1]


def test_an_outlier_folder_with_a_test_split_gives_that_split_alone(tmp_path):
    write_image(tmp_path / "odd/train/a.png")
    inside = write_image(tmp_path / "odd/test/b.png")
    write_image(tmp_path / "odd/c.png")
    assert load(f"folder:{tmp_path / 'odd'}", "test", tmp_path).paths == (str(inside),)


@pytest.mark.parametrize(
    ("files", "split", "found"),
    [
        ([], "test", "no folder"),
        (["a.txt"], "test", "no images"),
        (["train/a.png"], "test", "test/"),
        (["a.png"], "train", "train/"),
    ],
    ids=["missing", "no images", "no test split", "no train split"],
)
def test_a_folder_without_what_is_wanted_is_refused(tmp_path, files, split, found):
    for name in files:
        path = tmp_path / "odd" / name
        path.parent.mkdir(parents=True)
        write_image(path) if path.suffix == ".png" else path.write_text("no image")
    with pytest.raises(UserError, match=found):
        load(f"folder:{tmp_path / 'odd'}", split, tmp_path)


@pytest.mark.parametrize("names", [("bench", "test", "tube"), ("bench", "train", "tube"),
                                   ("deep/down", "test", "link")])
def test_an_outlier_set_may_have_a_class_called_train_or_test(tmp_path, names):
    for i, name in enumerate(names):
        folder = tmp_path / ("odd" if name != "link" else "elsewhere") / name
        for j in range(4):
            write_image(folder / f"{j}.png", seed=4 * i + j)
    if "link" in names:
        (tmp_path / "odd/link").symlink_to(folder)
    images = load(f"folder:{tmp_path / 'odd'}", "test", tmp_path)
    assert images.class_names == tuple(sorted(name.partition("/")[0] for name in names))
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("beside", "split"),
    [(["1.png", "2.png"], ["test"]), (["bench/1.png", "tube/deep/2.jpg"], ["train", "test"])],
    ids=["loose", "folders beside both splits"],
)
def test_images_beside_the_splits_are_counted(tmp_path, capsys, beside, split):
    for name in [*beside, *(f"{s}/{i}.png" for s in split for i in range(2))]:
        write_image(tmp_path / "odd" / name)
    assert len(load(f"folder:{tmp_path / 'odd'}", "test", tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"2 images of {tmp_path / 'odd'} beside train/ and test/ were not read" in said
    assert str(tmp_path / "odd" / beside[0]) in said


def test_files_that_are_not_read_are_counted_by_their_kind(tmp_path, capsys):
    write_image(tmp_path / "odd/cat/1.png")
    write_image(tmp_path / "odd/dog/1.png")
    for name in ("cat/a.gif", "cat/b.GIF", "cat/c.heic", "dog/deep/DSC0001", "labels.csv",
                 "fox/only.avif", ".hidden"):
        (tmp_path / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "odd" / name).write_bytes(b"x")
    images = load(f"folder:{tmp_path / 'odd'}", "test", tmp_path)
    assert (len(images), images.class_names) == (2, ("cat", "dog"))
    said = capsys.readouterr().err
    for words in ("6 of 8 files were not read", "2 .gif", "1 .heic", "1 .avif", "1 .csv",
                  "1 without a suffix", ".webp"):
        assert words in said
    load(f"folder:{tmp_path / 'odd/dog'}", "test", tmp_path)
    assert "1 of 2 files were not read: 1 without a suffix" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.jpg", "cat/deep/x.png", "dog", "x.gif", "round.jpg"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    write_image(tmp_path / "odd/cat/1.png")
    link = tmp_path / "odd" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(link if name == "round.jpg" else "/nowhere/x")
    with pytest.raises(UserError, match=f"{link} is a link to .*, where there is nothing"):
        load(f"folder:{tmp_path / 'odd'}", "test", tmp_path)


def test_a_tilde_after_folder_or_npz_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_image(tmp_path / "odd/1.png")
    write_npz(tmp_path / "a.npz", test_images=random_bytes(4, 6, 6))
    assert load("folder:~/odd", "test", "nowhere").paths == (str(tmp_path / "odd/1.png"),)
    assert load("npz:~/a.npz", "test", "nowhere").name == f"npz:{tmp_path / 'a.npz'}"


# --- sets with a place of their own ---------------------------------------------------------------


@pytest.mark.parametrize("place", ["dtd/images", "dtd/dtd/images"])
def test_texture_is_every_image_of_dtd_by_class(tmp_path, capsys, place):
    files = ["banded/b_1.jpg", "banded/b_2.jpg", "zigzagged/a.jpg"]
    paths = [write_image(tmp_path / place / f, 30, 40, seed=i) for i, f in enumerate(files)]
    images = load("texture", "test", tmp_path, size=16)
    assert images.class_names == ("banded", "zigzagged")
    assert images.labels.tolist() == [0, 0, 1]
    assert images.paths == tuple(map(str, paths))
    assert torch.equal(images.pixels, torch.stack([by_torchvision(p, 16) for p in paths]))
    assert "3 images of 2 classes" in capsys.readouterr().err  # not the 5,640 of 47


def test_the_whole_of_dtd_passes_without_a_word(tmp_path, monkeypatch, capsys):
    write_image(tmp_path / "dtd/images/banded/a.jpg")
    monkeypatch.setattr(data, "DTD_IMAGES", 1)
    load("texture", "test", tmp_path)
    assert capsys.readouterr().err == ""


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_pickle(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


class Official:
    """Writes a tiny copy of a set as its authors laid it out, and has torchvision accept it.

    `images` and `labels` are, by split, what the set should then hand over.
    """

    def __init__(self, root, monkeypatch, name, cls, side, n):
        self.root, self.monkeypatch, self.name, self.cls = root, monkeypatch, name, cls
        self.images = {
            s: random_bytes(n[s], 3, side, side, seed=i) for i, s in enumerate(("train", "test"))
        }
        self.labels = {s: [(7 * i + 3) % 10 for i in range(n[s])] for s in n}

    def expect(self, attribute, folder):
        """Put the checksums of our files in the place of the official ones."""
        rows = [[name, md5(folder / name)] for name, _ in getattr(self.cls, attribute)]
        self.monkeypatch.setattr(self.cls, attribute, rows)


def write_cifar10(root, monkeypatch):
    made = Official(root, monkeypatch, "cifar10", datasets.CIFAR10, 32, {"train": 10, "test": 3})
    folder = root / "cifar10/cifar-10-batches-py"
    for i in range(5):  # two images a file
        part = slice(2 * i, 2 * i + 2)
        write_pickle(folder / f"data_batch_{i + 1}", labels=made.labels["train"][part],
                     data=made.images["train"][part].reshape(2, 3072))
    write_pickle(
        folder / "test_batch", labels=made.labels["test"], data=made.images["test"].reshape(3, 3072)
    )
    made.names = tuple(f"class {i}" for i in range(10))
    return finish_cifar(made, folder, label_names=list(made.names))


def write_cifar100(root, monkeypatch):
    made = Official(root, monkeypatch, "cifar100", datasets.CIFAR100, 32, {"train": 6, "test": 3})
    folder = root / "cifar100/cifar-100-python"
    for split, x in made.images.items():
        write_pickle(folder / split, data=x.reshape(len(x), 3072), fine_labels=made.labels[split],
                     coarse_labels=[0] * len(x))
    made.names = tuple(f"class {i}" for i in range(100))
    return finish_cifar(made, folder, fine_label_names=list(made.names), coarse_label_names=["all"])


def finish_cifar(made, folder, **names):
    meta = made.cls.meta
    write_pickle(folder / meta["filename"], **names)
    made.expect("train_list", folder)
    made.expect("test_list", folder)
    changed = {**meta, "md5": md5(folder / meta["filename"])}
    made.monkeypatch.setattr(made.cls, "meta", changed)
    made.files = {"images": folder / made.cls.test_list[0][0], "names": folder / meta["filename"]}
    return made


def write_svhn(root, monkeypatch):
    made = Official(root, monkeypatch, "svhn", datasets.SVHN, 32, {"train": 5, "test": 4})
    rows = dict(datasets.SVHN.split_list)
    (root / "svhn").mkdir()
    for split, x in made.images.items():
        path = root / "svhn" / f"{split}_32x32.mat"
        y = np.array([[v or 10] for v in made.labels[split]], dtype=np.uint8)  # 0 is called 10
        scipy.io.savemat(path, {"X": x.transpose(2, 3, 1, 0), "y": y})
        rows[split] = [rows[split][0], path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", rows)
    made.names, made.files = tuple("0123456789"), {"images": path}
    return made


def write_stl(root, monkeypatch):
    made = Official(root, monkeypatch, "stl", datasets.STL10, 96, {"train": 3, "test": 2})
    folder = root / "stl10/stl10_binary"
    folder.mkdir(parents=True)
    for split, x in made.images.items():  # column after column, classes from 1
        (folder / f"{split}_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(v + 1 for v in made.labels[split]))
    (folder / "unlabeled_X.bin").write_bytes(b"")
    made.names = tuple(f"class {i}" for i in range(10))
    (folder / "class_names.txt").write_text("\n".join(made.names))
    made.expect("train_list", folder)
    made.expect("test_list", folder)
    made.files = {"images": folder / "test_X.bin"}
    return made


OFFICIAL = {
    "cifar10": write_cifar10, "cifar100": write_cifar100, "svhn": write_svhn, "stl": write_stl,
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_are_read_as_images_of_channels_rows_columns(
    tmp_path, monkeypatch, name, split
):
    made = OFFICIAL[name](tmp_path, monkeypatch)
    images = load(name, split, tmp_path, size=32)
    assert images.name == name
    assert images.pixels.dtype == torch.uint8
    assert torch.equal(images.pixels, torch.from_numpy(made.images[split]))
    assert images.pixels.is_contiguous()
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == made.labels[split]
    assert images.class_names == made.names


@pytest.mark.parametrize(
    ("name", "file"), [*((n, "images") for n in OFFICIAL), ("cifar10", "names")]
)
def test_an_official_file_with_another_checksum_is_named_as_corrupt(
    tmp_path, monkeypatch, name, file
):
    made = OFFICIAL[name](tmp_path, monkeypatch)
    path = made.files[file]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=f"{path.name} is corrupt"):
        load(name, "test", tmp_path, size=32)


@pytest.mark.parametrize("name", [*OFFICIAL, "texture"])
def test_a_missing_set_is_refused_with_its_place_and_checksum(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: not found .*md5"):
        load(name, "test", tmp_path)


# --- noise ----------------------------------------------------------------------------------------

KINDS = ("blobs", "gaussian", "uniform")


def test_blobs_are_the_originals_to_the_last_bit(golden):
    numbers = golden("blobs.npz")
    found = data.blobs(numbers["binomial"])
    assert found.dtype == np.float32
    assert np.array_equal(found, numbers["blobs"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_noise_set_is_10000_images_of_the_wanted_size(tmp_path, kind):
    images = load(kind, "test", tmp_path, size=5, seed=1)
    assert len(images) == 10_000
    assert images.pixels.shape == (10_000, 3, 5, 5)
    assert images.class_names is None
    assert images.labels.unique().tolist() == [0]
    part = data.load_pixels(images.pixels, torch.tensor([0, 9_999]))
    assert part.shape == (2, 3, 5, 5)
    assert part.dtype == torch.float32


@pytest.fixture(scope="module")
def whole():
    """All images of each kind, 6 pixels wide, float32 [10000, 3, 6, 6]."""
    return {kind: data.Noise(kind, 6, seed=3).load() for kind in KINDS}


PARTS = {
    "one": [4_321],
    "a block's edge": [99, 100, 101],
    "backwards": [9_999, 250, 249, 0],
    "twice the same": [7, 7, 107, 7],
    "none": [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_part_of_a_noise_set_is_that_part_of_the_whole(whole, kind):
    noise = data.Noise(kind, 6, seed=3)
    for part, rows in PARTS.items():
        index = torch.tensor(rows, dtype=torch.int64)
        assert torch.equal(noise[index].load(), whole[kind][index]), part
        assert torch.equal(data.load_pixels(noise, index), whole[kind][index]), part
    part = noise[torch.tensor([500, 20, 333])]  # a part of it is counted from there
    assert torch.equal(part[torch.tensor([2, 0])].load(), whole[kind][[333, 500]])


@pytest.mark.parametrize("kind", KINDS)
def test_two_seeds_make_different_noise_and_one_seed_the_same(whole, kind):
    index = torch.arange(100)
    assert torch.equal(data.Noise(kind, 6, seed=3)[index].load(), whole[kind][:100])
    other = data.Noise(kind, 6, seed=4)[index].load()
    assert not (other == whole[kind][:100]).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_images_of_a_noise_set_are_alike(whole, kind):
    images = whole[kind].flatten(1)
    images = images[images.any(dim=1)]  # so small a picture may hold no blob at all
    assert len(images) > 9_500
    assert len(images.unique(dim=0)) == len(images)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_lies_between_0_and_1_and_fills_that_range(whole, kind):
    x = whole[kind]
    assert x.min() >= 0
    assert x.max() <= 1
    assert x.max() > 0.95


def test_gaussian_noise_has_the_moments_of_a_clipped_normal_distribution(whole):
    x = whole["gaussian"].double()
    inner = 2 * norm.cdf(2) - 1 - 4 * norm.pdf(2)  # of z^2 where |z| < 2
    std = 0.25 * math.sqrt(inner + 4 * 2 * norm.cdf(-2))
    assert x.mean().item() == pytest.approx(0.5, abs=0.002)
    assert x.std().item() == pytest.approx(std, abs=0.002)
    assert (x == 0).double().mean().item() == pytest.approx(norm.cdf(-2), abs=0.002)
    assert (x == 1).double().mean().item() == pytest.approx(norm.cdf(-2), abs=0.002)


def test_uniform_noise_has_the_moments_of_a_uniform_distribution(whole):
    x = whole["uniform"].double()
    assert x.mean().item() == pytest.approx(0.5, abs=0.002)
    assert x.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.002)


def test_blobs_are_0_or_at_least_three_quarters_and_toss_coins_of_seven_tenths(whole, golden):
    x = whole["blobs"]
    assert ((x == 0) | (x >= 0.75)).all()
    side = golden("blobs.npz")["blobs"].shape[1]
    ours = data.Noise("blobs", side, seed=0)[torch.arange(200)].load()
    coins = np.random.default_rng(5).binomial(1, 0.7, (200, side, side, 3))
    theirs = data.blobs(coins)
    assert (ours > 0).double().mean().item() == pytest.approx((theirs > 0).mean(), abs=0.01)
    assert (golden("blobs.npz")["blobs"] > 0).mean() == pytest.approx((theirs > 0).mean(), abs=0.05)


# --- choosing images ------------------------------------------------------------------------------


def test_a_subset_keeps_the_order_of_its_index_and_all_that_belongs_to_an_image():
    images = image_set(paths=tuple(f"{i}.png" for i in range(12)))
    taken = images.subset(torch.tensor([9, 0, 5]))
    assert taken.pixels[:, 0, 0, 0].tolist() == [9, 0, 5]
    assert taken.labels.tolist() == [1, 0, 1]
    assert taken.paths == ("9.png", "0.png", "5.png")
    assert taken.class_names == images.class_names
    assert len(images) == 12


def test_a_subset_of_noise_is_the_noise_of_its_index(whole):
    noise = data.load("uniform", "test", data_dir="nowhere", size=6, seed=3)
    taken = noise.subset(torch.tensor([150, 3]))
    assert torch.equal(taken.pixels.load(), whole["uniform"][[150, 3]])
    assert len(taken) == 2


def test_restricting_to_classes_numbers_them_anew_from_0():
    kept = data.restrict(image_set(), (1, 3))
    assert kept.pixels[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9, 11]
    assert kept.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert kept.class_names == ("b", "d")


def test_restricting_numbers_classes_in_the_order_given():
    kept = data.restrict(image_set(), (3, 1))
    assert kept.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert kept.class_names == ("d", "b")


def test_restricting_leaves_the_whole_set_as_it_was():
    images = image_set()
    data.restrict(images, (2,))
    assert images.labels.tolist() == [0, 1, 2, 3] * 3
    assert images.class_names == tuple("abcd")


@pytest.mark.parametrize(
    ("images", "classes", "found"),
    [
        (image_set(), (1, 4), "classes 0-3, not 4"),
        (image_set(n=2), (2, 3), "no images of classes"),
        (data.ImageSet("plain", torch.zeros(2, 3, 4, 4), torch.zeros(2).long()), (0,), "no class"),
    ],
    ids=["unknown class", "empty class", "no classes"],
)
def test_restricting_to_what_is_not_there_is_refused(images, classes, found):
    with pytest.raises(UserError, match=found):
        data.restrict(images, classes)


# --- facts and names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", [0.491, 0.482, 0.447], [0.202, 0.199, 0.201]),
        ("cifar100", [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
        ("svhn", [0, 0, 0], [1, 1, 1]),
        ("stl", [0, 0, 0], [1, 1, 1]),
    ],
)
def test_the_originals_sets_keep_the_originals_constants(name, mean, std):
    assert data.normalisation(name, None) == (mean, std)


@pytest.mark.parametrize("spec", ["digits", "folder:a", "npz:b"])
@pytest.mark.parametrize("n", [1, 300])
def test_other_sets_are_normalised_by_their_own_mean_and_standard_deviation(spec, n):
    x = (random_bytes(n, 3, 5, 4) * np.array([1, 0.5, 0.2])[:, None, None]).astype(np.uint8)
    images = data.ImageSet("tiny", torch.from_numpy(x), torch.zeros(n).long())
    mean, std = data.normalisation(spec, images)
    assert mean == pytest.approx((x / 255).mean(axis=(0, 2, 3)), abs=6e-5)  # four digits are kept
    assert std == pytest.approx((x / 255).std(axis=(0, 2, 3)), abs=6e-5)


def test_a_channel_of_one_level_is_not_scaled():
    x = torch.full((3, 3, 4, 4), 51, dtype=torch.uint8)
    images = data.ImageSet("tiny", x, torch.zeros(3).long())
    assert data.normalisation("digits", images) == ([0.2, 0.2, 0.2], [1, 1, 1])


@pytest.mark.parametrize(
    ("spec", "name", "path"),
    [
        ("cifar10", "cifar10", None),
        ("folder", "folder", None),
        ("folder:photos/odd", "folder", "photos/odd"),
        ("npz:", "npz", None),
        ("npz:a:b.npz", "npz", "a:b.npz"),
    ],
)
def test_a_set_is_named_by_a_word_and_perhaps_a_path(spec, name, path):
    found_name, found_path = data.parse_spec(spec)
    assert found_name == name
    assert found_path is None if path is None else found_path.as_posix() == path


@pytest.mark.parametrize(
    ("spec", "found"),
    [("cifar", "unknown image set 'cifar'; known are .*cifar100"), ("", "unknown"),
     ("cifar10:here", "only folder and npz take a path"), ("CIFAR10", "unknown")],
)
def test_a_set_of_another_name_is_refused_with_what_is_known(spec, found):
    with pytest.raises(UserError, match=found):
        data.parse_spec(spec)


@pytest.mark.parametrize("name", ["texture", *KINDS])
def test_outlier_sets_cannot_be_trained_on(tmp_path, name):
    assert name not in data.TRAINABLE
    with pytest.raises(UserError, match=f"{name} has no training images"):
        load(name, "train", tmp_path)


@pytest.mark.parametrize(("split", "expected"), [("train", True), ("test", False)])
def test_a_folder_or_file_may_come_without_a_split_and_says_so(tmp_path, split, expected):
    write_image(tmp_path / "a/train/x.png")
    spec = write_npz(tmp_path / "a.npz", train_images=random_bytes(2, 4, 4))
    assert data.has_split(f"folder:{tmp_path / 'a'}", split, data_dir=tmp_path) == expected
    assert data.has_split("folder", split, data_dir=tmp_path / "a") == expected
    assert data.has_split(spec, split, data_dir=tmp_path) == expected
    assert data.has_split("cifar10", split, data_dir=tmp_path)


# --- order and known outliers ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 97])
def test_the_order_of_an_epoch_is_a_permutation(n):
    assert sorted(data.epoch_order(n, seed=1, epoch=0).tolist()) == list(range(n))


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch_alone():
    order = data.epoch_order(97, seed=1, epoch=5)
    torch.rand(3)  # of the global stream, which has no part in it
    assert torch.equal(data.epoch_order(97, seed=1, epoch=5), order)
    others = [data.epoch_order(97, seed=s, epoch=e) for s, e in ((1, 6), (2, 5), (5, 1), (1, 0))]
    assert not any(torch.equal(o, order) for o in others)
    assert len(torch.stack(others).unique(dim=0)) == 4


LABELS = torch.tensor([0] * 6 + [1] * 9 + [2] * 12)[torch.randperm(27, generator=generator(2))]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_known_outliers_of_each_class_and_the_rest_part_the_set(k):
    known, rest = data.few_shot(LABELS, k, generator())
    assert LABELS[known].bincount().tolist() == [k, k, k]
    assert sorted(known.tolist() + rest.tolist()) == list(range(27))
    assert rest.tolist() == sorted(rest.tolist())
    assert known.dtype == rest.dtype == torch.int64


def test_the_known_outliers_of_a_set_without_classes_are_k_of_all():
    known, rest = data.few_shot(torch.zeros(20).long(), 4, generator())
    assert (len(known), len(rest)) == (4, 16)


def test_classes_without_images_have_no_known_outliers():
    known, _ = data.few_shot(torch.tensor([1, 7, 1, 7, 7]), 1, generator())
    assert sorted(torch.tensor([1, 7, 1, 7, 7])[known].tolist()) == [1, 7]


def test_known_outliers_are_a_function_of_the_generator():
    first, again, other = (data.few_shot(LABELS, 3, generator(s))[0] for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert set(first.tolist()) != set(other.tolist())


def test_every_image_of_a_class_is_chosen_as_often_as_the_others():
    g = generator(6)
    chosen = torch.cat([data.few_shot(LABELS, 2, g)[0] for _ in range(1000)])
    counts = chosen.bincount(minlength=27)
    for label in range(3):
        mine = counts[label == LABELS]
        assert mine.sum() == 2000
        # Two of a draw differ, so the counts spread a little less than chisquare supposes.
        assert chisquare(mine.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("k", [6, 9])
def test_known_outliers_that_would_leave_a_class_empty_are_refused(k):
    with pytest.raises(ValueError, match="class 0 has 6 images"):
        data.few_shot(LABELS, k, generator())
