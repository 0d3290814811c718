"""Schedule, views, monitors and epochs of training."""

import copy
import multiprocessing

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from epochs import run_epoch
from PIL import Image

import data
import models
import trainers
import utils
from features import FeatureSettings


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
    network = models.build_model("resnet18", "projection")
    settings = FeatureSettings(size=8, batch_size=8)
    unlabelled = data.ImageSet("x", tiny_images().pixels, torch.zeros(12, dtype=torch.int64))
    one_class = tiny_images(classes=1)
    mode = trainers.TRAINING_MODES["SimCLR"]
    assert trainers.monitor(network, None, mode, settings) is None
    assert trainers.monitor(network, unlabelled, mode, settings) is None
    assert trainers.monitor(network, one_class, mode, settings) is None
    assert trainers.monitor(network, tiny_images(), mode, settings) is not None


def test_the_monitor_of_a_classifier_is_its_top_1_accuracy():
    network = models.build_model("resnet18", "classifier", 3).eval()
    images = tiny_images()
    settings = FeatureSettings(8, 5, (0.5,) * 3, (0.2,) * 3)
    ours = trainers.monitor(network, images, trainers.TRAINING_MODES["SupCE"], settings)
    with torch.no_grad():
        logits = network((images.pixels.float() / 255 - 0.5) / 0.2)
    assert ours == pytest.approx((logits.argmax(1) == images.labels).double().mean().item())


@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_views_are_a_function_of_seed_epoch_and_step(name):
    images, mode = tiny_images(), trainers.TRAINING_MODES[name]

    def views(seed, epoch, step):
        torch.manual_seed(step)  # the global stream must not matter
        made = trainers.Step(None, None, images, mode, size=8, seed=seed)
        return made.views(trainers.Batch(torch.arange(12)), epoch, step)

    first = views(1, 2, 3)
    assert first.shape == (mode.views * 12, 3, 8, 8)
    assert torch.equal(first, views(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first, views(*other))
    if mode.views == 2:
        assert not torch.equal(first[:12], first[12:])


def make_step(name, images, device="cpu", seed=7, lr=0.05, **settings):
    """A Step of a small network with weights that are always the same."""
    mode = trainers.TRAINING_MODES[name]
    network = models.build_model("resnet18", mode.head, 3, torch.Generator().manual_seed(1))
    network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    return trainers.Step(network, optimizer, images, mode, size=8, seed=seed, **settings)


def train(name, images, seed=7, epochs=2, settings=None, **changes):
    """Train a small network for two epochs; returns it, its losses and its reports."""
    step = make_step(name, images, seed=seed, **(settings or {}))
    reports = []
    losses = [run_epoch(step, epoch, reports=reports, **changes) for epoch in range(epochs)]
    return step.network, losses, reports


def assert_equal_states(first, second):
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_the_same_seed_trains_to_the_same_weights_and_another_does_not(name):
    images = tiny_images()
    first, losses, reports = train(name, images)
    torch.manual_seed(99)
    second, again, _ = train(name, images)
    other, _, _ = train(name, images, seed=8)
    assert losses == again
    assert_equal_states(first, second)
    assert not torch.equal(
        first.state_dict()["encoder.conv1.weight"], other.state_dict()["encoder.conv1.weight"]
    )
    # 12 images in steps of 5, 5, 2: the partial batch is kept, the reports come at 2 and at the end
    assert [r[:2] for r in reports] == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_an_epoch_is_the_plain_loop_written_out(name):
    images = tiny_images()
    ours, losses, _ = train(name, images)
    by_hand = make_step(name, images, lr=0.02)
    network, optimizer = by_hand.network, by_hand.optimizer
    means = []
    for epoch in range(2):
        total = 0.0
        for step, index in enumerate(data.epoch_order(12, 7, epoch).split(5)):
            x = by_hand.views(trainers.Batch(index), epoch, step)
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
@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_the_first_steps_on_the_gpu_are_those_of_the_cpu(name):
    images = tiny_images()
    losses = {}
    for device in ("cpu", "cuda"):
        reports = []
        step = make_step(name, data.to(images, device), device)
        run_epoch(step, lr=1e-4, batch_size=2, print_freq=1, reports=reports)
        assert trainers.monitor(step.network, images, step.mode, FeatureSettings(8, 2)) is not None
        losses[device] = [loss for _, _, loss in reports]
    assert losses["cuda"][:3] == pytest.approx(losses["cpu"][:3], rel=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_no_step_waits_for_the_gpu(name):
    step = make_step(name, data.to(tiny_images(), "cuda"), "cuda")
    batch = trainers.Batch(torch.arange(6, device="cuda"))
    step(batch, 0, 0, 0.02, 0.9)  # the first call may set things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, 0, 1, 0.02, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_goes_on(name, images, broken_off):
    """Train one epoch, and again from a step of it: the same weights, losses and reports."""
    whole, rest = make_step(name, images), make_step(name, images)
    reports, again, states = [], [], []

    def keep(epoch, step, batches):
        weights = {k: v.clone() for k, v in whole.network.state_dict().items()}
        states.append((weights, copy.deepcopy(whole.optimizer.state_dict()), batches.losses()))

    expected = run_epoch(whole, reports=reports, after_step=keep)
    weights, optimizer, losses = states[broken_off - 1]
    rest.network.load_state_dict(weights)
    rest.optimizer.load_state_dict(optimizer)
    assert run_epoch(rest, reports=again, first=broken_off, losses=losses) == expected
    assert_equal_states(whole.network, rest.network)
    assert again == [r for r in reports if r[1] >= broken_off]


@pytest.mark.parametrize(("name", "broken_off"), [("SimCLR", 1), ("SupCon", 2), ("SupCE", 3)])
def test_an_epoch_resumed_in_the_middle_ends_as_the_unbroken_one(name, broken_off):
    assert_goes_on(name, tiny_images(), broken_off)


# --- images in files ------------------------------------------------------------------------------


@pytest.fixture
def in_files(tmp_path):
    """Function (workers, shapes) -> 12 pictures of 3 classes in files, for 8 pixels."""
    rng = np.random.default_rng(0)

    def write(workers, shapes=((20, 11), (9, 14), (8, 8))):
        for i in range(12):
            pixels = rng.integers(0, 256, (*shapes[i % len(shapes)], 3), dtype=np.uint8)
            path = tmp_path / f"train/{i % 3}/{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                Image.fromarray(pixels).save(path)
        return data.load("folder", "train", data_dir=tmp_path, size=8, crops=True, workers=workers)

    return write


@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_weights_do_not_depend_on_how_many_workers_decode(name, in_files):
    first, losses, _ = train(name, in_files(1))
    other, again, _ = train(name, in_files(3))
    assert losses == again
    assert_equal_states(first, other)


@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_views_of_files_are_those_of_memory_but_for_the_rounding_of_crops(name, in_files):
    squares = ((8, 8),)  # which are the same in memory, and so are the draws
    resident = make_step(name, in_files(0, squares))
    streamed = make_step(name, in_files(2, squares))
    with trainers.Epoch(streamed, 0, 5) as batches:
        for step, batch in batches:
            views = resident.views(trainers.Batch(batch.index), 0, step)
            difference = (streamed.views(batch, 0, step) - views).abs()
            if name == "SupCE":  # shifts by whole pixels
                assert difference.max() == 0
            else:  # PIL's two roundings to 8 bits, which colour operations may stretch
                assert difference.mean() < 1 / 255


@pytest.mark.parametrize("name", ["SimCLR", "SupCE"])
def test_an_epoch_of_files_resumed_in_the_middle_ends_as_the_unbroken_one(name, in_files):
    assert_goes_on(name, in_files(2), 1)


def test_workers_are_gone_when_a_step_fails(in_files):
    def fail(*_):
        raise RuntimeError("nobody foresaw this")

    with pytest.raises(RuntimeError, match="foresaw") as caught:
        train("SimCLR", in_files(2), after_step=fail)
    assert caught.tb is not None  # it holds the frame of the epoch
    assert not multiprocessing.active_children()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(trainers.TRAINING_MODES))
def test_files_train_on_the_gpu_as_on_the_cpu(name, in_files):
    losses = {}
    for device in ("cpu", "cuda"):
        reports = []
        run_epoch(make_step(name, data.to(in_files(2), device), device), lr=1e-4, print_freq=1,
                  reports=reports)
        losses[device] = [loss for _, _, loss in reports]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-2)


@pytest.mark.parametrize("speed", [
    trainers.Speed(channels_last=True), trainers.Speed("bf16", True),
])
def test_fast_settings_train_along_the_same_curve(speed):
    images, kwargs = tiny_images(), dict(epochs=1, batch_size=6, lr=1e-3)
    _, plain, _ = train("SimCLR", images, **kwargs)
    _, fast, _ = train("SimCLR", images, settings={"speed": speed}, **kwargs)
    assert fast == pytest.approx(plain, rel=1e-2)
    assert fast != plain or speed.precision == "fp32"


def test_compiling_makes_one_graph_a_shape_and_none_in_later_epochs(monkeypatch):
    # 12 images in steps of 5, 5, 2: two shapes, of the network and of the augmentation each.
    # Graphs are made and counted, kernels are not: that would take minutes here.
    counter, compile_ = torch._dynamo.testing.CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(
        f, backend=counter, fullgraph=True, **kwargs))
    images, settings = tiny_images(), {"mean": [0.5] * 3, "std": [0.2] * 3}
    _, plain, _ = train("SimCLR", images, settings=settings)
    step = make_step("SimCLR", images, speed=trainers.Speed(compile=True), **settings)
    losses = []
    for epoch in range(2):
        losses.append(run_epoch(step, epoch))
        assert counter.frame_count == 4
    assert losses == pytest.approx(plain, rel=1e-3)


def test_bf16_leaves_outputs_and_weights_in_float32():
    step, batch = make_step("SimCLR", tiny_images(), speed=trainers.Speed("bf16")), torch.arange(2)
    loss = step(trainers.Batch(batch), 0, 0, 0.02, 0.9)
    assert loss.dtype == torch.float32
    assert {v.dtype for v in step.network.parameters()} == {torch.float32}
    views = step.views(trainers.Batch(batch), 0, 0)
    with utils.autocast(views.device, "bf16"):
        out = step.network(views)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.detach().norm(dim=1), 1, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    with pytest.raises(utils.RunError, match=r"loss is nan at epoch 0, step [12];"):
        train("SimCLR", tiny_images(), lr=1e30)


@pytest.mark.parametrize(("n", "minutes", "size", "chosen"), [
    (4, 1e5, None, 64), (4, 1e-6, None, 24), (4, 1e-6, 8, 8)])
def test_a_recipe_takes_the_largest_pictures_for_which_there_is_time(n, minutes, size, chosen):
    recipe = trainers.recipe_for(n, minutes, size, torch.device("cpu"))
    assert recipe["size"] == chosen
    assert (recipe["epochs"] >= trainers.SMALL_EPOCHS) == (minutes > 1)
    assert recipe["batch-size"] == n
