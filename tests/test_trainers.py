"""Schedule, views, monitors and epochs of training."""

import numpy as np
import pytest
import torch

import data
import models
import trainers
import utils


@pytest.mark.parametrize("case", ["warm", "cold", "warm_lr01"])
def test_lr_and_momentum_of_each_step_are_those_of_the_original(golden, case):
    known = golden("schedule.json")[case]
    keys = ("steps_per_epoch", "epochs", "lr", "momentum", "warmup")
    kwargs = {k: known[k] for k in keys}
    expected = known["lr_and_momentum_at_each_step"]
    ours = [trainers.schedule(step, **kwargs) for step in range(len(expected))]
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=0)


def test_without_cycling_the_momentum_is_the_one_given():
    rates = [
        trainers.schedule(s, 5, 6, 0.5, 0.7, warmup=True, cycle_momentum=False) for s in range(80)
    ]
    assert {momentum for _, momentum in rates} == {0.7}
    assert rates[0][0] == 0.01
    assert rates[50][0] == 0.5


@pytest.mark.parametrize("kind", ["separable", "noise", "few"])
def test_knn_accuracy_equals_scikit_learns(kind):
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(3)
    n, classes = (60, 3) if kind == "few" else (400, 7)
    labels = rng.integers(0, classes, n)
    centres = rng.normal(size=(classes, 16)) * {"separable": 1.0, "noise": 0.1, "few": 0.5}[kind]
    outputs = (centres[labels] + rng.normal(size=(n, 16))).astype(np.float32)
    expected = cross_val_score(
        KNeighborsClassifier(20, metric="cosine"), outputs, labels, cv=5
    ).mean()
    ours = trainers.knn_accuracy(torch.from_numpy(outputs), torch.from_numpy(labels))
    assert ours == pytest.approx(expected, abs=1e-12)
    assert 0.1 < ours < 1


def test_knn_ties_go_to_the_smaller_class():
    # Two folds of two: each asked image sees one neighbour of each class, both at distance 0.
    outputs = torch.ones(8, 2)
    labels = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0])
    assert trainers.knn_accuracy(outputs, labels, k=20, folds=2) == 0.5


def test_knn_takes_fewer_neighbours_and_folds_than_asked_where_images_are_few():
    outputs = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert trainers.knn_accuracy(outputs, labels, k=20, folds=5) == 0.5  # one of each class: ties
    assert trainers.knn_accuracy(outputs, labels, k=1, folds=5) == 1.0


def tiny_images(n=12, classes=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=generator).to(torch.uint8)
    names = tuple(str(c) for c in range(classes))
    return data.ImageSet("tiny", pixels, torch.arange(n) % classes, names)


def test_the_monitor_says_nothing_without_classes_to_tell_apart():
    network = models.build_model("resnet18", "SimCLR")
    kwargs = dict(batch_size=8, size=8, mean=None, std=None)
    unlabelled = data.ImageSet("x", tiny_images().pixels, torch.zeros(12, dtype=torch.int64))
    one_class = tiny_images(classes=1)
    mode = trainers.MODES["SimCLR"]
    assert trainers.monitor(network, unlabelled, mode, **kwargs) is None
    assert trainers.monitor(network, one_class, mode, **kwargs) is None
    assert trainers.monitor(network, tiny_images(), mode, **kwargs) is not None


def test_the_monitor_of_a_classifier_is_its_top_1_accuracy():
    network = models.build_model("resnet18", "SupCE", 3).eval()
    images = tiny_images()
    kwargs = dict(size=8, mean=[0.5] * 3, std=[0.2] * 3)
    ours = trainers.monitor(network, images, trainers.MODES["SupCE"], batch_size=5, **kwargs)
    with torch.no_grad():
        logits = network((images.pixels.float() / 255 - 0.5) / 0.2)
    assert ours == pytest.approx((logits.argmax(1) == images.labels).double().mean().item())


@pytest.mark.parametrize("name", list(trainers.MODES))
def test_views_are_a_function_of_seed_epoch_and_step(name):
    pixels, mode = tiny_images().pixels, trainers.MODES[name]

    def views(*key):
        torch.manual_seed(len(key))  # the global stream must not matter
        return trainers.make_views(pixels, mode, 8, None, None, *key)

    first = views(1, 2, 3)
    assert first.shape == (mode.views * 12, 3, 8, 8)
    assert torch.equal(first, views(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first, views(*other))
    if mode.views == 2:
        assert not torch.equal(first[:12], first[12:])


def train(name, images, **changes):
    """Train a small network for two epochs; returns it, its losses and its reports."""
    mode = trainers.MODES[name]
    network = models.build_model("resnet18", name, 3, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    reports, losses = [], []
    kwargs = dict(
        rates=lambda epoch, step: (0.02, 0.9), batch_size=5, size=8, mean=None, std=None, seed=7,
        temperature=0.5, print_freq=2, report=lambda *r: reports.append(r),
    ) | changes
    for epoch in range(2):
        loss, speed = trainers.train_epoch(
            network, optimizer, images, mode, epoch=epoch, draws=epoch, **kwargs
        )
        losses.append(loss)
        assert speed > 0
    return network, losses, reports


@pytest.mark.parametrize("name", list(trainers.MODES))
def test_the_same_seed_trains_to_the_same_weights_and_another_does_not(name):
    images = tiny_images()
    first, losses, reports = train(name, images)
    torch.manual_seed(99)
    second, again, _ = train(name, images)
    other, _, _ = train(name, images, seed=8)
    assert losses == again
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert not torch.equal(
        first.state_dict()["encoder.conv1.weight"], other.state_dict()["encoder.conv1.weight"]
    )
    # 12 images in steps of 5, 5, 2: the partial batch is kept, the reports come at 2 and at the end
    assert [r[:2] for r in reports] == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("name", list(trainers.MODES))
def test_an_epoch_is_the_plain_loop_written_out(name):
    images, mode = tiny_images(), trainers.MODES[name]
    ours, losses, _ = train(name, images)
    network = models.build_model("resnet18", name, 3, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    means = []
    for epoch in range(2):
        total = 0.0
        for step, index in enumerate(data.epoch_order(12, 7, epoch).split(5)):
            x = trainers.make_views(images.pixels[index], mode, 8, None, None, 7, epoch, step)
            out, y = network(x), images.labels[index]
            if name == "SupCE":
                loss = torch.nn.functional.cross_entropy(out, y)
            else:
                pairs = torch.stack(out.chunk(2), dim=1)
                loss = trainers.SupConLoss(0.5)(pairs, y if name == "SupCon" else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        means.append(total / 12)
    assert losses == pytest.approx(means, rel=1e-6)
    weight = "encoder.layer1.0.conv1.weight"
    torch.testing.assert_close(ours.state_dict()[weight], network.state_dict()[weight])


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(trainers.MODES))
def test_the_first_steps_on_the_gpu_are_those_of_the_cpu(name):
    images, kwargs = tiny_images(), dict(batch_size=2, size=8, mean=None, std=None)
    losses = {}
    for device in ("cpu", "cuda"):
        seen = losses.setdefault(device, [])
        network = models.build_model("resnet18", name, 3, torch.Generator().manual_seed(1))
        network.to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
        trainers.train_epoch(
            network, optimizer, data.to(images, device), trainers.MODES[name], epoch=0, draws=0,
            rates=lambda epoch, step: (1e-4, 0.9), seed=7, temperature=0.5, print_freq=1,
            report=lambda epoch, step, loss, speed, seen=seen: seen.append(loss), **kwargs,
        )
        assert trainers.monitor(network, images, trainers.MODES[name], **kwargs) is not None
    assert losses["cuda"][:3] == pytest.approx(losses["cpu"][:3], rel=2e-2)


def test_a_loss_that_is_not_finite_stops_with_step_and_rates():
    with pytest.raises(utils.RunError, match=r"loss is nan at epoch 0, step [12] \(lr 1e\+30"):
        train("SimCLR", tiny_images(), rates=lambda epoch, step: (1e30, 0.9))
