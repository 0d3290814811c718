"""Features are what the network gives, whatever the batch; the cache gives them back to the bit."""

import json
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, environment

import data
import features
import utils

SETTINGS = dict(size=8, batch_size=4, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])


class Tiny(torch.nn.Module):
    """A network of one layer that counts its passes."""

    def __init__(self, seed=0):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 5)
        torch.nn.init.normal_(
            self.layer.weight, generator=torch.Generator().manual_seed(seed))
        torch.nn.init.zeros_(self.layer.bias)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.layer(x.flatten(1))


def tiny_images(n=10, seed=0, name="npz:here/tiny.npz"):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator).to(torch.uint8)
    return data.ImageSet(name, pixels, torch.arange(n) % 2, ("a", "b"))


def notes(capsys):
    return [line.partition(": note: ")[2] for line in capsys.readouterr().err.splitlines()]


# --- extraction -----------------------------------------------------------------------------------


def test_features_are_the_network_of_the_normalised_images():
    network, images = Tiny(), tiny_images()
    mean, std = (torch.tensor(SETTINGS[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    expected = network((images.pixels.float() / 255 - mean) / std).detach()
    found = features.extract(network, images, **SETTINGS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_copies_are_augmented_from_the_resized_images_one_after_the_other():
    images, network = tiny_images(), Tiny()
    base = replace(images, pixels=images.pixels.float() / 255)  # 8 pixels already
    expected = [features.extract(network, base, mode="ssl", copy=c, **SETTINGS) for c in (0, 1, 2)]
    found = features.extract(network, images, copies=3, **SETTINGS)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[:10], found[10:20])


@pytest.mark.parametrize("kind", ["blobs", "gaussian"])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
def test_every_image_of_a_noise_set_is_drawn_for_its_own_row(kind, batch_size):
    noise = data.Noise(kind, 8, seed=3)[torch.arange(40, 290)]
    images = data.ImageSet(kind, noise, torch.zeros(250, dtype=torch.int64))
    network = Tiny()
    expected = network(noise.draw()).detach()
    found = features.extract(network, images, size=8, batch_size=batch_size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_image_that_cannot_be_drawn_stops_the_extraction(monkeypatch):
    def fail(self):
        raise OSError("gone")

    monkeypatch.setattr(data.Noise, "draw", fail)
    images = data.ImageSet("blobs", data.Noise("blobs", 8, 0), torch.zeros(10_000).long())
    with pytest.raises(OSError, match="gone"):
        features.extract(Tiny(), images, size=8, batch_size=100)


@pytest.mark.parametrize("mode", ["base", "ssl"])
def test_bf16_rounds_in_the_network_only_and_gives_float32(mode):
    network, images, seen = Tiny(), tiny_images(), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    full, half = (
        features.extract(network, images, mode=mode, precision=p, **SETTINGS | {"batch_size": 10})
        for p in features.PRECISIONS
    )
    assert half.dtype == torch.float32
    assert torch.equal(*seen)  # resizing and normalisation are not touched
    assert 0 < (half - full).abs().max() < 0.03 * full.abs().max()


@pytest.mark.parametrize(
    ("device", "threads", "expected"), [("cuda", 1, 256), ("cpu", 1, 32), ("cpu", 64, 256)]
)
def test_the_batch_size_follows_the_device(monkeypatch, device, threads, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert features.default_batch_size(torch.device(device)) == expected


# --- many processes -------------------------------------------------------------------------------


def in_processes(n, code, tmp_path):
    """Run the code in n processes that know `distributed`, this module's names and the folder."""
    path = tmp_path / "program.py"
    path.write_text(
        "import sys\nfrom pathlib import Path\nimport torch\nimport distributed\nimport features\n"
        "from test_features import *\nhere = Path(sys.argv[1])\n"
        f"def main():\n    distributed.start()\n{code}\nutils.program(main)\n")
    return subprocess.run(
        [sys.executable, path, tmp_path], check=False, capture_output=True, text=True, timeout=120,
        env=environment(PET_NPROC_PER_NODE=n, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
    )


CASES = [{"mode": mode} for mode in ("base", "org", "ssl")] + [{"copies": 2}, {"batch_size": 100}]
EXTRACT = """
    network, found = Tiny().train(), []
    for case in CASES:
        found.append(features.extract(network, tiny_images(18), spread=True, **SETTINGS | case))
    assert network.training
    passes = distributed.everyones(network.passes)
    if distributed.is_lead():
        torch.save((found, passes), here / "found")
    else:
        assert found == [None] * len(CASES)
"""


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_features_are_the_same_to_the_last_bit_in_any_number_of_processes(tmp_path, processes):
    done = in_processes(processes, EXTRACT, tmp_path)
    assert done.returncode == 0, done.stderr
    found, passes = torch.load(tmp_path / "found")
    for x, case in zip(found, CASES, strict=True):
        assert torch.equal(x, features.extract(Tiny(), tiny_images(18), **SETTINGS | case))
    # 18 images are 5 batches of 4, in each of 3 modes and of 2 copies; or 1 of 100
    assert passes == {1: [26], 2: [16, 10], 3: [11, 10, 5]}[processes]


SERVE = """
    sets = [tiny_images(10, seed=s) for s in (0, 1, 1 + distributed.rank() * DIFFERENT)]
    network = Tiny()
    crew = features.Crew(network, sets)
    if not distributed.is_lead():
        crew.serve()
        (here / "passes").write_text(str(network.passes))
        return
    cache = features.Store(here / "cache", network)
    found = [features.take(network, sets[i], cache=cache, crew=crew, **SETTINGS)[:]
             for i in (1, 0, 1)]
    crew.dismiss()
    torch.save(found, here / "found")
"""


def test_the_other_processes_help_with_what_is_not_in_the_cache(tmp_path):
    done = in_processes(2, SERVE.replace("DIFFERENT", "0"), tmp_path)
    assert done.returncode == 0, done.stderr
    for x, seed in zip(torch.load(tmp_path / "found"), (1, 0, 1), strict=True):
        assert torch.equal(x, features.extract(Tiny(), tiny_images(seed=seed), **SETTINGS))
    assert (tmp_path / "passes").read_text() == "2"  # the second of three batches of two sets


def test_processes_with_different_images_are_refused_with_one_line(tmp_path):
    done = in_processes(2, SERVE.replace("DIFFERENT", "1"), tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "npz:here/tiny.npz is not the same in process 1" in line


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [None, 3])
def test_the_second_time_features_come_from_the_cache_without_a_pass(tmp_path, capsys, copies):
    images = tiny_images()
    first, second = Tiny(), Tiny()
    for network in (first, second):
        kwargs = SETTINGS | {"copies": copies, "cache": features.Cache(tmp_path, network)}
        network.found = features.take(network, images, **kwargs)
    assert first.passes == 3 * (copies or 1)
    assert second.passes == 0
    assert torch.equal(first.found, second.found)
    direct = features.take(Tiny(), images, copies=copies, **SETTINGS)
    assert torch.equal(first.found, direct)
    assert notes(capsys) == ["features of npz:here/tiny.npz: from the cache"]


def about(network=None, images=None, **settings):
    cache = features.Cache("nowhere", network or Tiny())
    return cache.about(images or tiny_images(), **SETTINGS | settings)


def changed(pixels, labels):
    images = tiny_images()
    images.pixels[3, 1, 2, 2] += pixels
    images.labels[3] += labels
    return images


@pytest.mark.parametrize(
    "other",
    [
        {"network": Tiny(seed=1)}, {"images": changed(1, 0)}, {"images": changed(0, 1)},
        {"images": tiny_images(9)}, {"size": 9}, {"batch_size": 5}, {"mean": [0.5, 0.4, 0.31]},
        {"std": None, "mean": None}, {"mode": "org"}, {"mode": "ssl"}, {"precision": "bf16"},
        {"copies": 1}, {"copies": 2},
    ],
    ids=lambda other: " ".join(other),
)
def test_what_changes_a_feature_changes_the_key(other):
    cache = features.Cache("cache", Tiny())
    first, second = (cache.path(tiny_images(), a) for a in (about(), about(**other)))
    assert first != second


@pytest.mark.parametrize("mode", ["ssl", "org"])
@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"copy": 1}, {"images": tiny_images(name="digits")}], ids=str
)
def test_the_draws_of_an_augmentation_are_part_of_the_key(mode, other):
    assert about(mode=mode) != about(mode=mode, **other)
    assert about() == about(**other)  # without an augmentation nothing is drawn


@pytest.mark.parametrize(
    "other",
    [data.Noise("uniform", 8, 0), data.Noise("blobs", 9, 0), data.Noise("blobs", 8, 1),
     data.Noise("blobs", 8, 0)[torch.arange(9_999)]],
    ids=["kind", "size", "seed", "index"],
)
def test_what_noise_is_drawn_from_is_part_of_the_key(other):
    labels = torch.zeros(10_000, dtype=torch.int64)
    first = data.fingerprint(data.Noise("blobs", 8, 0), labels)
    assert first == data.fingerprint(data.Noise("blobs", 8, 0), labels)
    assert first != data.fingerprint(other, labels)


def test_machine_and_torch_are_part_of_the_key(monkeypatch):
    before = about()
    assert before["machine"].startswith("cpu ")
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert about() != before


@pytest.mark.parametrize(
    "images",
    [tiny_images(name="npz:/elsewhere/tiny.npz"), replace(tiny_images(), class_names=None),
     replace(tiny_images(), paths=tuple("abcdefghij"))],
    ids=["place", "class names", "paths"],
)
def test_what_changes_no_feature_does_not_change_the_key(images):
    assert about(images=images) == about()


def test_a_checkpoint_that_is_saved_again_in_another_dialect_hits(tmp_path):
    network = Tiny()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    state = {f"module.{k}": v for k, v in reversed(network.state_dict().items())}
    torch.save({"model": state, "epoch": 3}, tmp_path / "b.pth")
    hashes = set()
    for name in ("a.pth", "b.pth"):
        again = Tiny(seed=9)
        again.load_state_dict(utils.load_checkpoint(tmp_path / name)[0])
        hashes.add(features.weights_hash(again))
    assert hashes == {features.weights_hash(network)}


def cut(path, other):
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path, other):
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # among the features: the header is 128 bytes
    path.write_bytes(content)


def forge(path, other):
    """A sound file with all features changed, which its text does not say."""
    x = np.load(path)
    text = path.read_bytes()[-len(json.dumps(features.Stored(path).about)):]
    np.save(path, x + 1)
    path.write_bytes(path.read_bytes() + text)


def confuse(path, other):
    path.write_bytes(other.read_bytes())


def foreign(path, other):
    path.write_bytes(b"no features")


def empty(path, other):
    path.write_bytes(b"")


def strip(path, other):
    np.save(path, np.load(path))


def widen(path, other):
    text = path.read_bytes()[128 + 4 * 10 * 5:]
    np.save(path, np.load(path).astype(np.float64))
    path.write_bytes(path.read_bytes() + text)


@pytest.mark.parametrize("kind", [features.Cache, features.Store])
@pytest.mark.parametrize("harm", [cut, flip_a_bit, forge, confuse, foreign, empty, strip, widen],
                         ids=lambda harm: harm.__name__)
def test_a_damaged_or_foreign_file_is_reported_computed_again_and_replaced(
    tmp_path, capsys, harm, kind
):
    images, network = tiny_images(), Tiny()
    cache = kind(tmp_path, network)
    expected = features.take(network, images, cache=cache, **SETTINGS)[:]
    (path,) = tmp_path.rglob("*.npy")
    features.take(network, tiny_images(seed=5), cache=cache, **SETTINGS)
    (other,) = set(tmp_path.rglob("*.npy")) - {path}
    harm(path, other)
    capsys.readouterr()

    before = network.passes
    assert torch.equal(features.take(network, images, cache=cache, **SETTINGS)[:], expected)
    assert network.passes == before + 3
    (said,) = notes(capsys)
    assert said.startswith(f"features of {images.name}: {path} cannot be used (")
    assert said.endswith("); computed again")
    assert torch.equal(features.take(network, images, cache=cache, **SETTINGS)[:], expected)
    assert network.passes == before + 3
    assert notes(capsys) == [f"features of {images.name}: from the cache"]


def test_a_place_that_cannot_be_written_to_costs_one_note(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    network = Tiny()
    cache = features.Cache(tmp_path / "file/cache", network)
    for seed in (0, 1):
        x = features.take(network, tiny_images(seed=seed), cache=cache, **SETTINGS)
        assert x.shape == (10, 5)
    (said,) = notes(capsys)
    assert "--cache-dir" in said
    assert said.endswith("cannot be written (Not a directory); features are not kept")


def test_a_full_disk_costs_one_note_and_leaves_no_file(tmp_path, capsys):
    network, images = Tiny(), tiny_images(500)
    cache = features.Cache(tmp_path, network)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        x = features.take(network, images, cache=cache, **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(x, features.extract(network, images, **SETTINGS))
    (said,) = notes(capsys)
    assert "File too large" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_of_the_cache_says_what_its_features_are_of(tmp_path):
    network = Tiny()
    features.take(network, tiny_images(), cache=features.Cache(tmp_path, network), **SETTINGS)
    (path,) = tmp_path.rglob("*.npy")
    assert path.name.startswith("npz-")
    said = features.Stored(path).about
    assert np.load(path).shape == (10, 5)
    assert said["weights"] == features.weights_hash(network)
    assert (said["size"], said["mode"], said["draws"]) == (8, "base", None)


# --- the store ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [None, 3])
def test_features_in_a_store_are_those_in_memory_to_the_last_bit(tmp_path, copies):
    network, images = Tiny(), tiny_images()
    expected = features.extract(Tiny(), images, copies=copies, **SETTINGS)
    for _ in range(2):  # as they are written, then as they are found
        found = features.take(network, images, cache=features.Store(tmp_path, network),
                              copies=copies, **SETTINGS)
        assert isinstance(found, features.Stored)
        assert found.shape == tuple(expected.shape)
        assert torch.equal(found[:], expected)
        np.testing.assert_array_equal(found.numpy(), expected)
    assert network.passes == 3 * (copies or 1)


def test_any_rows_can_be_read_from_a_store(tmp_path, monkeypatch):
    network, images = Tiny(), tiny_images()
    expected = features.extract(network, images, **SETTINGS)
    found = features.take(network, images, cache=features.Store(tmp_path, network), **SETTINGS)
    for rows in (slice(2, 5), slice(8, 99), torch.tensor([7, 0, 7, 9]), torch.tensor([3])):
        assert torch.equal(found[rows], expected[rows])
    monkeypatch.setattr(features, "PIECE", 4)
    assert [len(rows) for rows in found.pieces()] == [4, 4, 2]


def test_a_file_of_the_store_is_numpys_and_can_be_mapped(tmp_path):
    network = Tiny()
    found = features.take(network, tiny_images(), cache=features.Store(tmp_path, network),
                          **SETTINGS)
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, found[:])


@pytest.mark.parametrize(
    "kinds", [(features.Cache, features.Store), (features.Store, features.Cache)], ids=str)
def test_a_store_and_a_cache_read_each_others_files(tmp_path, kinds):
    taken, network = [], Tiny()
    for kind in kinds:
        taken.append(features.take(network, tiny_images(), cache=kind(tmp_path, network),
                                   **SETTINGS)[:])
    assert torch.equal(*taken)
    assert network.passes == 3


def test_batches_are_written_as_they_come(tmp_path):
    """The file grows while the features are computed, under a name of its own until it is whole."""
    network, images, sizes = Tiny(), tiny_images(9000), []

    def look(module, inputs):
        files = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert not list(tmp_path.rglob("npz-*"))
        sizes.append(sum(p.stat().st_size for p in files))

    network.register_forward_pre_hook(look)
    features.take(network, images, cache=features.Store(tmp_path, network),
                  **SETTINGS | {"batch_size": 3000})
    assert sizes[0] == 0
    assert 60_000 - 8192 <= sizes[1] < sizes[2] <= 120_128


def test_a_full_disk_ends_the_store_with_one_line_and_leaves_no_file(tmp_path):
    network = Tiny()
    store = features.Store(tmp_path, network)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(utils.RunError, match=r"--feature-store: .*npy cannot be written"):
            features.take(network, tiny_images(500), cache=store, **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_store_that_cannot_be_written_to_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(utils.UserError, match=r"--feature-store .*file/store cannot be written to"):
        features.Store(tmp_path / "file/store", Tiny())


def test_images_that_cannot_be_read_are_no_fault_of_the_store(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("the images are gone")

    monkeypatch.setattr(data.Noise, "draw", fail)
    images = data.ImageSet("blobs", data.Noise("blobs", 8, 0), torch.zeros(10_000).long())
    network = Tiny()
    with pytest.raises(utils.RunError, match=r"^the images are gone$"):
        features.take(network, images, cache=features.Store(tmp_path, network), size=8,
                      batch_size=100)


def test_a_file_that_is_cut_while_it_is_read_ends_with_its_name(tmp_path):
    network = Tiny()
    found = features.take(network, tiny_images(), cache=features.Store(tmp_path, network),
                          **SETTINGS)
    with open(found.path, "r+b") as file:
        file.truncate(128 + 4 * 5 * 6)
    assert found[:6].shape == (6, 5)
    with pytest.raises(OSError, match="npy ends before its row 10"):
        found[:]
