"""No step of training or extraction waits for the device or leaves a tensor elsewhere.

Tensors of torch's "meta" device have no values: to read one, or to mix in a tensor of another
device, is an error there, as it would be a wait or an error on a GPU.
"""

import contextlib

import pytest
import torch

import data
import features
import models
import trainers
import utils

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """The meta device has none; off, as by default, it does nothing."""
    monkeypatch.setattr(utils, "autocast", lambda device, precision: contextlib.nullcontext())


@pytest.fixture
def images():
    pixels = torch.empty(12, 3, 10, 10, dtype=torch.uint8, device=META)
    labels = torch.empty(12, dtype=torch.int64, device=META)
    return data.ImageSet("meta", pixels, labels, ("a", "b"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_no_step_of_training_reads_a_value_or_leaves_the_device(images, name, channels_last):
    mode = trainers.TRAINING_MODES[name]
    layout = torch.channels_last if channels_last else torch.preserve_format
    with META:
        network = models.build_model("resnet18", mode.head, 2).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    step = trainers.Step(network, optimizer, images, mode, size=8, mean=MEAN, std=STD,
                         speed=trainers.Speed(channels_last=channels_last))
    with trainers.Epoch(step, 0, batch_size=8) as batches:  # the last step is of 4 images
        for number, batch in batches:
            loss = step(batch, 0, number, 0.1, 0.9)
            batches.add(number, loss)
            assert (loss.device, loss.shape) == (META, ())
    views = step.views(batch, 0, 0)
    assert (views.device, views.shape) == (META, (4 * mode.views, 3, 8, 8))
    assert views.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert {p.grad.device for p in network.parameters()} == {META}


@pytest.mark.parametrize("mode", ["base", "org", "ssl"])
def test_no_batch_of_an_extraction_reads_a_value_or_leaves_the_device(images, mode):
    with META:
        network = models.build_model("resnet18", "projection")
    settings = features.FeatureSettings(8, 5, MEAN, STD, mode=mode)
    batches = list(features._feature_batches(network.encoder, images, settings))
    assert [(b.device, b.shape) for b in batches] == [
        (META, (5, 512)), (META, (5, 512)), (META, (2, 512))]


def test_the_nearest_neighbours_of_the_monitor_read_no_value():
    known, asked = (torch.empty(n, 128, device=META) for n in (30, 7))
    labels = torch.empty(30, dtype=torch.int64, device=META)
    choice = trainers.nearest_class(asked, known, labels, k=20, classes=4)
    assert (choice.device, choice.shape) == (META, (7,))
