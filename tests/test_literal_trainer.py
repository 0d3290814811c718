"""train.py's weights are those of a plain trainer, with every hyper-parameter off its default."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from tiny import draws, sample_org, sample_ssl, tiny_network, write_images

import augment

SEED, EPOCHS, BATCH, LR, MOMENTUM, DECAY, T = 7, 2, 4, 0.03, 0.6, 0.03, 0.3
MEAN, STD = (0.5, 0.4, 0.45), (0.2, 0.3, 0.25)
WARMUP = 10  # epochs
IMAGES, CLASSES = 10, 4  # two batches of 4 and a rest of 2

pytestmark = pytest.mark.usefixtures("tiny_arch")


def per_channel(values):
    return torch.tensor(values).view(3, 1, 1)


def contrastive_loss(z, labels):
    """The loss of SSD paper's section 3 for z [2, B, 128], a pair of views at a time."""
    views = [(v, i) for v in range(2) for i in range(len(labels))]
    total = 0.0
    for a in views:
        others = [b for b in views if b != a]
        similar = {b: (z[a] * z[b]).sum() / T for b in others}
        log_sum = torch.log(sum(torch.exp(s) for s in similar.values()))
        positives = [b for b in others if labels[b[1]] == labels[a[1]]]
        total = total - sum(similar[p] - log_sum for p in positives) / len(positives)
    return T / 0.07 * total / len(views)


def views_of(pixels, mode, epoch, step):
    """The views of a batch, normalised: 2 of each image, view after view; 1 for SupCE."""
    generator = draws(SEED, "augment", epoch, step)
    if mode == "SupCE":
        x = augment.apply_org(pixels, sample_org(len(pixels), generator), 8)
    else:
        params = sample_ssl(2 * len(pixels), 8, 8, generator)
        x = augment.apply_ssl(torch.cat([pixels, pixels]), params, 8)
    return (x - per_channel(MEAN)) / per_channel(STD)


def rates(step, steps, cycle):
    """Learning rate and momentum of a step: ten epochs rise, the others follow a cosine."""
    warm = WARMUP * steps
    momentum = 0.9 - 0.1 * min(step / warm, 1) if cycle else MOMENTUM
    if step < warm:
        return 0.01 + (LR - 0.01) * step / warm, momentum
    done = (step - warm) / (EPOCHS * steps)
    return 1e-4 + (LR - 1e-4) / 2 * (1 + math.cos(math.pi * done)), momentum


def train_literally(images, labels, mode, cycle=True):
    """Train by the letter of the method: (network, mean loss of each epoch)."""
    network = tiny_network("classifier" if mode == "SupCE" else "projection", CLASSES, SEED)
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    steps, means = math.ceil(len(images) / BATCH), []
    for epoch in range(WARMUP + EPOCHS):
        order, total = torch.randperm(len(images), generator=draws(SEED, "order", epoch)), 0.0
        for step in range(steps):
            index = order[step * BATCH : (step + 1) * BATCH]
            out = network(views_of(images[index], mode, epoch, step))
            if mode == "SupCE":
                share = torch.exp(out) / torch.exp(out).sum(dim=1, keepdim=True)
                loss = -sum(torch.log(share[i, labels[j]]) for i, j in enumerate(index))
                loss = loss / len(index)
            else:
                classes = labels[index] if mode == "SupCon" else torch.arange(len(index))
                loss = contrastive_loss(out.view(2, len(index), -1), classes.tolist())
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            lr, momentum = rates(epoch * steps + step, steps, cycle)
            with torch.no_grad():
                for p, v, g in zip(network.parameters(), velocity, gradients, strict=True):
                    v.mul_(momentum).add_(g + DECAY * p)
                    p.sub_(lr * v)
            total += loss.item() * len(index)
        means.append(total / len(images))
    return network, means


def accuracy_of(network, images, labels, mode):
    """The monitor: scikit-learn's 20 nearest neighbours of the head's outputs; SupCE's top 1."""
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - per_channel(MEAN)) / per_channel(STD)
    with torch.no_grad():
        out = network.eval()(x).numpy()
    if mode == "SupCE":
        return np.mean(out.argmax(axis=1) == labels)
    classifier = KNeighborsClassifier(20, metric="cosine")
    return cross_val_score(classifier, out, labels, cv=5).mean()


@pytest.mark.parametrize(
    ("mode", "flags"),
    [("SimCLR", []), ("SupCon", []), ("SupCE", []), ("SupCE", ["--no-cycle-momentum"])])
def test_a_training_ends_with_the_weights_of_the_literal_one(call, tmp_path, mode, flags):
    arrays = np.load(write_images(tmp_path / "tiny.npz", IMAGES))
    done = call(
        "train.py", "--dataset", "npz:tiny.npz", "--training-mode", mode, "--arch", "tiny",
        "--size", 8, "--seed", SEED, "--epochs", EPOCHS, "--batch-size", BATCH, "--lr", LR,
        "--momentum", MOMENTUM, "--weight-decay", DECAY, "--temperature", T, "--warmup",
        "--normalize", "--mean", *MEAN, "--std", *STD, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results/temp/latest_exp"
    saved = torch.load(run / "checkpoint/checkpoint.pth.tar", weights_only=True)
    epochs = [r for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())
              if r["event"] == "epoch"]

    pixels, labels = (torch.from_numpy(arrays[f"train_{k}"]) for k in ("images", "labels"))
    pixels = pixels.permute(0, 3, 1, 2)
    network, losses = train_literally(pixels, labels, mode, cycle=not flags)
    expected = network.state_dict()
    assert saved["state_dict"].keys() == expected.keys()
    for name, value in saved["state_dict"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert [r["loss"] for r in epochs] == pytest.approx(losses, rel=1e-5)
    assert [r["monitor"] for r in epochs[:WARMUP]] == [None] * WARMUP
    accuracy = accuracy_of(network, arrays["test_images"], arrays["test_labels"], mode)
    assert epochs[-1]["monitor"] == pytest.approx(accuracy, abs=1e-12)
