"""Features are what the network gives, whatever the batch; the cache gives them back to the bit."""

import contextlib
import json
import os
import resource
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import sample_ssl

import augment
import data
import features
import utils
from features import DiskFeatures, FeatureCache, FeatureSettings, FeatureStore
from infra import checkpoints, distributed, storage

SETTINGS = FeatureSettings(size=8, batch_size=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


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
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (SETTINGS.mean, SETTINGS.std))
    expected = network((images.pixels.float() / 255 - mean) / std).detach()
    found = features.extract(network, images, SETTINGS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_copies_are_augmented_from_the_resized_images_one_after_the_other():
    images, network = tiny_images(), Tiny()
    x = images.pixels.float() / 255  # 8 pixels already
    mean, std = (torch.tensor(v) for v in (SETTINGS.mean, SETTINGS.std))
    draws = (utils.generator(0, "ssl", "npz", copy) for copy in range(3))
    copies = (augment.apply_ssl(x, sample_ssl(10, 8, 8, g), 8, mean, std) for g in draws)
    expected = torch.cat([network(copy).detach() for copy in copies])
    found = features.extract(network, images, replace(SETTINGS, copies=3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[:10], found[10:20])


@pytest.mark.parametrize("kind", ["blobs", "gaussian"])
@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_every_image_of_a_noise_set_is_drawn_for_its_own_row(kind, batch_size):
    noise = data.Noise(kind, 8, seed=3)[torch.arange(80, 130)]
    images = data.ImageSet(kind, noise, torch.zeros(50, dtype=torch.int64))
    network = Tiny()
    expected = network(noise.load()).detach()
    found = features.extract(network, images, FeatureSettings(8, batch_size))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def unreadable_images(monkeypatch):
    """A set whose images fail to load."""
    def fail(self):
        raise utils.UserError("cannot decode the image 7.png")

    monkeypatch.setattr(data.Noise, "load", fail)
    return data.ImageSet("blobs", data.Noise("blobs", 8, 0), torch.zeros(10_000).long())


@pytest.mark.parametrize("mode", ["base", "ssl"])
def test_bf16_rounds_in_the_network_only_and_gives_float32(mode):
    network, images, seen = Tiny(), tiny_images(), []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    full, half = (
        features.extract(network, images, replace(SETTINGS, mode=mode, precision=p, batch_size=10))
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


def in_processes(n, function, folder):
    """Call function(folder) in n forks of this process, which cost no new interpreter."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, (n, port, function, folder), n, start_method="fork")


def _process(rank, n, port, function, folder):
    torch.set_num_threads(1)  # the threads of the parent are not in a fork
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.cuda.is_available = lambda: False  # a fork cannot use the CUDA of its parent
    distributed.start()
    function(folder)
    distributed.shutdown()


CASES = [replace(SETTINGS, mode=mode) for mode in ("base", "org", "ssl")]
CASES += [replace(SETTINGS, copies=2), replace(SETTINGS, batch_size=100)]


def share_everything(folder):
    network = Tiny().train()
    found = [features.extract(network, tiny_images(18), case) for case in CASES]
    assert network.training
    passes = distributed.all_gather_object(network.passes)
    main = distributed.is_main_process()
    if main:
        torch.save((found, passes), folder / "extracted")
    else:
        assert found == [None] * len(CASES)

    # Two sets, of which the first is asked for twice.
    network, sets = Tiny(), [tiny_images(seed=s) for s in (1, 0, 1)]
    features.check_same_inputs(network, sets)
    cache = FeatureStore(folder / "cache", network) if main else None
    found = [features.extract(network, images, SETTINGS, cache) for images in sets]
    passes = distributed.all_gather_object(network.passes)
    if main:
        torch.save(([x[:] for x in found], passes), folder / "stored")
    else:
        assert found == [None] * 3

    for broken in ((network, [tiny_images(seed=distributed.rank())]),
                   (Tiny(seed=distributed.rank()), sets)):
        with pytest.raises(utils.UserError) as error:
            features.check_same_inputs(*broken)
        distributed.all_gather_object(None)
        name = "the network" if broken[1] is sets else "npz:here/tiny.npz"
        assert str(error.value).startswith(f"{name} is ")
        assert f"in process {distributed.rank()}" in str(error.value)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_features_are_those_of_one_to_the_last_bit(
    tmp_path, processes
):
    in_processes(processes, share_everything, tmp_path)
    found, passes = torch.load(tmp_path / "extracted")
    for x, case in zip(found, CASES, strict=True):
        assert torch.equal(x, features.extract(Tiny(), tiny_images(18), case))
    # 18 images are 5 batches of 4, in each of 3 modes and of 2 copies; or 1 of 100
    assert passes == {2: [16, 10], 3: [11, 10, 5]}[processes]
    found, passes = torch.load(tmp_path / "stored")
    for x, seed in zip(found, (1, 0, 1), strict=True):
        assert torch.equal(x, features.extract(Tiny(), tiny_images(seed=seed), SETTINGS))
    assert passes == {2: [4, 2], 3: [2, 2, 2]}[processes]  # 3 batches of each of two sets


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [None, 3])
def test_the_second_time_features_come_from_the_cache_without_a_pass(tmp_path, capsys, copies):
    images, settings = tiny_images(), replace(SETTINGS, copies=copies)
    first, second = Tiny(), Tiny()
    found = [features.extract(network, images, settings, FeatureCache(tmp_path, network))
             for network in (first, second)]
    assert first.passes == 3 * (copies or 1)
    assert second.passes == 0
    assert torch.equal(*found)
    assert torch.equal(found[0], features.extract(Tiny(), images, settings))
    assert notes(capsys) == ["features of npz:here/tiny.npz: from the cache"]


def key(network=None, images=None, **settings):
    cache = FeatureCache("nowhere", network or Tiny())
    return cache.key(images or tiny_images(), replace(SETTINGS, **settings))


def changed(pixels, labels):
    images = tiny_images()
    images.pixels[3, 1, 2, 2] += pixels
    images.labels[3] += labels
    return images


@pytest.mark.parametrize(
    "other",
    [
        {"network": Tiny(seed=1)}, {"images": changed(1, 0)}, {"images": changed(0, 1)},
        {"images": tiny_images(9)}, {"size": 9}, {"batch_size": 5}, {"mean": (0.5, 0.4, 0.31)},
        {"std": None, "mean": None}, {"mode": "org"}, {"mode": "ssl"}, {"precision": "bf16"},
        {"copies": 1}, {"copies": 2},
    ],
    ids=lambda other: " ".join(other),
)
def test_what_changes_a_feature_changes_the_key(other):
    cache = FeatureCache("cache", Tiny())
    first, second = (cache.path(tiny_images(), k) for k in (key(), key(**other)))
    assert first != second


@pytest.mark.parametrize("augmented", [{"mode": "ssl"}, {"mode": "org"}, {"copies": 2}], ids=str)
@pytest.mark.parametrize("other", [{"seed": 1}, {"images": tiny_images(name="digits")}], ids=str)
def test_what_an_augmentation_is_drawn_from_is_part_of_the_key(augmented, other):
    assert key(**augmented) != key(**augmented, **other)
    assert key() == key(**other)  # without an augmentation nothing is drawn


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
    before = key()
    assert before["machine"].startswith("cpu ")
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert key() != before


@pytest.mark.parametrize(
    "images",
    [tiny_images(name="npz:/elsewhere/tiny.npz"), replace(tiny_images(), class_names=None),
     replace(tiny_images(), paths=tuple("abcdefghij"))],
    ids=["place", "class names", "paths"],
)
def test_what_changes_no_feature_does_not_change_the_key(images):
    assert key(images=images) == key()


def test_a_checkpoint_that_is_saved_again_in_another_dialect_hits(tmp_path):
    network = Tiny()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    state = {f"module.{k}": v for k, v in reversed(network.state_dict().items())}
    torch.save({"model": state, "epoch": 3}, tmp_path / "b.pth")
    hashes = set()
    for name in ("a.pth", "b.pth"):
        again = Tiny(seed=9)
        again.load_state_dict(checkpoints.load_checkpoint(tmp_path / name)[0])
        hashes.add(features.weights_hash(again))
    assert hashes == {features.weights_hash(network)}


def cut(path, other):
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path, other):
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # among the features: the header is 128 bytes
    path.write_bytes(content)


def shift(path, other):
    """A sound file with all features changed, which its .json does not say."""
    np.save(path, np.load(path) + 1)


def confuse(path, other):
    for suffix in (".npy", ".json"):
        path.with_suffix(suffix).write_bytes(other.with_suffix(suffix).read_bytes())


def empty(path, other):
    path.write_bytes(b"")


def widen(path, other):
    np.save(path, np.load(path).astype(np.float64))


def garble(path, other):
    path.with_suffix(".json").write_bytes(b"\xff no JSON")


@pytest.mark.parametrize("kind", [FeatureCache, FeatureStore])
@pytest.mark.parametrize("harm", [cut, flip_a_bit, shift, confuse, empty, widen, garble],
                         ids=lambda harm: harm.__name__)
def test_a_damaged_or_foreign_file_is_reported_computed_again_and_replaced(
    tmp_path, capsys, harm, kind
):
    images, network = tiny_images(), Tiny()
    cache = kind(tmp_path, network)

    def get_features(images):
        return features.extract(network, images, SETTINGS, cache)[:]

    expected = get_features(images)
    (path,) = tmp_path.rglob("*.npy")
    get_features(tiny_images(seed=5))
    (other,) = set(tmp_path.rglob("*.npy")) - {path}
    harm(path, other)
    capsys.readouterr()

    before = network.passes
    assert torch.equal(get_features(images), expected)
    assert network.passes == before + 3
    (said,) = notes(capsys)
    assert said.startswith(f"features of {images.name}: {path} cannot be used (")
    assert said.endswith("); computed again")
    assert torch.equal(get_features(images), expected)
    assert network.passes == before + 3
    assert notes(capsys) == [f"features of {images.name}: from the cache"]


def test_features_without_the_file_that_says_of_what_they_are_are_not_used(tmp_path):
    network, images = Tiny(), tiny_images()
    for passes in (3, 6):
        features.extract(network, images, SETTINGS, FeatureCache(tmp_path, network))
        assert network.passes == passes
        next(tmp_path.rglob("*.json")).unlink()


def test_a_place_that_cannot_be_written_to_costs_one_note(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    network = Tiny()
    cache = FeatureCache(tmp_path / "file/cache", network)
    for seed in (0, 1):
        x = features.extract(network, tiny_images(seed=seed), SETTINGS, cache)
        assert x.shape == (10, 5)
    (said,) = notes(capsys)
    assert said.startswith("--cache-dir: ")
    assert said.endswith("cannot be written (Not a directory); features are not kept")


@contextlib.contextmanager
def full_disk():
    """Let no file grow beyond 2,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_costs_one_note_and_leaves_no_file(tmp_path, capsys):
    network, images = Tiny(), tiny_images(500)
    cache = FeatureCache(tmp_path, network)
    with full_disk():
        x = features.extract(network, images, SETTINGS, cache)
    assert torch.equal(x, features.extract(network, images, SETTINGS))
    (said,) = notes(capsys)
    assert "File too large" in said
    assert not files_in(tmp_path)


# --- the store ------------------------------------------------------------------------------------


def store_features(folder, images=None, network=None, **settings):
    """DiskFeatures of images, from a store."""
    network = network or Tiny()
    return features.extract(network, images or tiny_images(), replace(SETTINGS, **settings),
                            FeatureStore(folder, network))


@pytest.mark.parametrize("copies", [None, 3])
def test_features_in_a_store_are_those_in_memory_to_the_last_bit(tmp_path, copies):
    network, images = Tiny(), tiny_images()
    expected = features.extract(Tiny(), images, replace(SETTINGS, copies=copies))
    for _ in range(2):  # as they are written, then as they are found
        found = store_features(tmp_path, images, network, copies=copies)
        assert isinstance(found, DiskFeatures)
        assert found.shape == tuple(expected.shape)
        assert torch.equal(found[:], expected)
        np.testing.assert_array_equal(found.numpy(), expected)
    assert network.passes == 3 * (copies or 1)


def test_any_rows_can_be_read_from_a_store(tmp_path):
    expected = features.extract(Tiny(), tiny_images(), SETTINGS)
    found = store_features(tmp_path)
    for rows in (slice(2, 5), slice(8, 99), torch.tensor([7, 0, 7, 9]), torch.tensor([3])):
        assert torch.equal(found[rows], expected[rows])


def test_a_file_of_the_store_is_numpys_with_a_json_that_says_of_what(tmp_path):
    found, network = store_features(tmp_path), Tiny()
    about, path = sorted(files_in(tmp_path))
    assert path.name.startswith("npz-")
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, found[:])
    said = json.loads(about.read_text())
    assert said["weights"] == features.weights_hash(network)
    assert said.keys() - FeatureCache(tmp_path, network).key(tiny_images(), SETTINGS).keys() == {
        "sha256"}
    assert (said["size"], said["mode"], said["mean"]) == (8, "base", [0.5, 0.4, 0.3])


@pytest.mark.parametrize("kinds", [(FeatureCache, FeatureStore), (FeatureStore, FeatureCache)],
                         ids=str)
def test_a_store_and_a_cache_read_each_others_files(tmp_path, kinds):
    network = Tiny()
    found = [features.extract(network, tiny_images(), SETTINGS, kind(tmp_path, network))[:]
             for kind in kinds]
    assert torch.equal(*found)
    assert network.passes == 3


def test_batches_are_written_as_they_come(tmp_path):
    """The file grows while the features are computed, under a name of its own until it is whole."""
    network, sizes = Tiny(), []

    def look(module, inputs):
        assert not list(tmp_path.rglob("npz-*"))
        sizes.append(sum(path.stat().st_size for path in files_in(tmp_path)))

    network.register_forward_pre_hook(look)
    store_features(tmp_path, tiny_images(9000), network, batch_size=3000)
    assert sizes[0] == 0
    assert 60_000 - 8192 <= sizes[1] < sizes[2] <= 120_128


def test_a_full_disk_ends_the_store_with_one_line_and_leaves_no_file(tmp_path):
    with (full_disk(),
          pytest.raises(utils.RunError, match=r"^--feature-store: .*npy cannot be written")):
        store_features(tmp_path, tiny_images(500))
    assert not files_in(tmp_path)


def test_what_killed_evaluations_of_other_networks_left_is_swept_with_the_next_write(tmp_path):
    left = tmp_path / f"0123456789abcdef/{storage.PARTIAL}0"
    left.parent.mkdir()
    left.write_bytes(b"half")
    store_features(tmp_path)
    assert not left.exists()


def test_a_store_that_cannot_be_written_to_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(utils.UserError, match=r"--feature-store .*file/store cannot be written to"):
        FeatureStore(tmp_path / "file/store", Tiny())


def test_images_that_cannot_be_read_are_no_fault_of_the_store(tmp_path, monkeypatch):
    images = unreadable_images(monkeypatch)
    for get in (lambda: features.extract(Tiny(), images, SETTINGS),
                lambda: store_features(tmp_path, images)):
        with pytest.raises(utils.UserError, match=r"^cannot decode the image 7.png$"):
            get()
    assert not files_in(tmp_path)


def test_a_file_that_is_cut_while_it_is_read_ends_with_its_name(tmp_path):
    found = store_features(tmp_path)
    with open(found.path, "r+b") as file:
        file.truncate(128 + 4 * 5 * 6)
    with pytest.raises(OSError, match=r"npz-.*npy cannot be read"):
        found[:6]
