"""One epoch of each training mode, the schedule, and what says how good the network is.

    loss, speed = train_epoch(network, optimizer, images, MODES["SimCLR"], epoch=0, ...)
    accuracy = knn_accuracy(outputs, labels)
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import augment
import data
import features
import utils
from losses import SupConLoss

WARMUP_EPOCHS = 10
LR_START, LR_END = 0.01, 1e-4  # at the first step of the warm-up; where the cosine would arrive
MOMENTUM_START, MOMENTUM_END = 0.9, 0.8  # over the warm-up, with cycling


@dataclass(frozen=True)
class Mode:
    """What tells the training modes apart."""

    augmentation: str  # "ssl" or "org"
    views: int  # of each image in a batch
    contrastive: bool  # SupConLoss, else cross-entropy
    labels: bool  # whether the loss looks at the classes


MODES = {
    "SimCLR": Mode("ssl", views=2, contrastive=True, labels=False),
    "SupCon": Mode("ssl", views=2, contrastive=True, labels=True),
    "SupCE": Mode("org", views=1, contrastive=False, labels=True),
}


def schedule(step, steps_per_epoch, epochs, lr, momentum, warmup=False, cycle_momentum=True):
    """Compute learning rate and momentum of a step.

    Args:
        step: 0, 1, ... over the whole run, warm-up included.
        steps_per_epoch, epochs: of the main part; the warm-up is 10 epochs before it.
        lr, momentum: of the main part.
        warmup: whether there is a warm-up: lr then rises linearly from 0.01.
        cycle_momentum: with warm-up, let momentum fall from 0.9 to 0.8 and stay there.

    Returns:
        (lr, momentum).

    Source: same as the original, whose momentum falls because CyclicLR's default lets it, and
    stays low because nothing raises it again.
    """
    warm = WARMUP_EPOCHS * steps_per_epoch if warmup else 0
    if warmup and cycle_momentum:
        share = min(step / warm, 1)
        momentum = MOMENTUM_START + (MOMENTUM_END - MOMENTUM_START) * share
    if step < warm:
        return LR_START + (lr - LR_START) * step / warm, momentum
    turn = math.pi * (step - warm) / (epochs * steps_per_epoch)
    return LR_END + (lr - LR_END) * (1 + math.cos(turn)) / 2, momentum


def train_epoch(
    network, optimizer, images, mode, *, epoch, draws, rates, batch_size, size, mean, std, seed,
    temperature, print_freq, report,
):
    """Train for one epoch. Changes `network` and `optimizer`.

    Args:
        network: what models.build_model returned, on its device.
        optimizer: torch.optim.SGD of its parameters.
        images: data.ImageSet; its pixels and labels on the device of the network.
        mode: a value of MODES.
        epoch: as logs count it. draws: 0, 1, ... over the whole run; with `seed` this decides
            every random draw of the epoch.
        rates: function (epoch, step of it) -> (lr, momentum).
        batch_size: images a step; the last step takes what is left.
        size: S in pixels. mean, std: normalisation constants or None. temperature: of the loss.
        print_freq: steps between two reports; the host waits for the device only then.
        report: function (epoch, step, loss, views per second) called at them.

    Returns:
        (mean loss of the epoch, views per second).

    Raises:
        utils.RunError: a loss that is not finite; names the first such step and its rates.
    """
    network.train()
    criterion = SupConLoss(temperature) if mode.contrastive else None
    device = images.labels.device
    order = data.epoch_order(len(images), seed, draws).to(device)
    batches = order.split(batch_size)
    losses = torch.zeros(len(batches), device=device)
    seen, began = 0, time.perf_counter()
    with tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=None) as bar:
        for step, index in enumerate(bar):
            lr, momentum = rates(epoch, step)
            for group in optimizer.param_groups:
                group["lr"], group["momentum"] = lr, momentum
            x = make_views(images.pixels[index], mode, size, mean, std, seed, draws, step)
            out = network(x)  # [views * B, 128 or classes]
            labels = images.labels[index] if mode.labels else None
            if mode.contrastive:
                by_image = out.unflatten(0, (mode.views, len(index))).transpose(0, 1)
                loss = criterion(by_image, labels)
            else:
                loss = F.cross_entropy(out, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            seen += mode.views * len(index)
            if (step + 1) % print_freq == 0 or step + 1 == len(batches):
                _stop_if_not_finite(losses[: step + 1], epoch, rates)
                speed = seen / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {losses[step]:.4f} lr {lr:.4f} {speed:.0f} views/s")
                report(epoch, step, float(losses[step]), speed)
    sizes = torch.tensor([len(b) for b in batches], device=device)
    return float((losses * sizes).sum() / sizes.sum()), seen / (time.perf_counter() - began)


def make_views(pixels, mode, size, mean, std, seed, epoch, step):
    """Make the augmented views of a batch [B, 3, H, W]: float32 [views * B, 3, S, S].

    The draws are a function of (seed, epoch, step) and the position in the batch.
    """
    generator = utils.generator(seed, "augment", epoch, step)
    pixels = pixels.repeat(mode.views, 1, 1, 1)
    if mode.augmentation == "ssl":
        draws = augment.draw_ssl(len(pixels), *pixels.shape[2:], generator)
        return augment.apply_ssl(pixels, draws, size, mean, std)
    return augment.apply_org(pixels, augment.draw_org(len(pixels), generator), size, mean, std)


def is_finite(network):
    """Tell whether all floating-point weights and statistics of a network are finite."""
    values = [v for v in network.state_dict().values() if v.is_floating_point()]
    return bool(torch.stack([v.isfinite().all() for v in values]).all())


def _stop_if_not_finite(losses, epoch, rates):
    bad = (~losses.isfinite()).nonzero().squeeze(1).tolist()
    if bad:
        lr, momentum = rates(epoch, bad[0])
        raise utils.RunError(
            f"the loss is {float(losses[bad[0]])} at epoch {epoch}, step {bad[0]} (lr {lr:.6g}, "
            f"momentum {momentum:.4g}); stopped, the checkpoints before this epoch are untouched; "
            "a lower --lr or --warmup may help"
        )


# --- monitors: they look at test images, as the original's do -------------------------------------


def monitor(network, images, mode, *, batch_size, size, mean, std):
    """Measure how well the classes of test images can be told, as a share in 0..1.

    Args:
        network: on its device. images: data.ImageSet of the test images.
        mode: a value of MODES; the others as for train_epoch.

    Returns:
        float: top-1 accuracy of a classifier; else `knn_accuracy` of the head's outputs. None
        where that says nothing: no classes, a single one, or none with two images.
    """
    if images.class_names is None or len(images.labels.unique()) < 2:
        return None
    kwargs = dict(batch_size=batch_size, size=size, mean=mean, std=std)
    device = next(network.parameters()).device
    outputs = features.extract(network, images, **kwargs).to(device)
    labels = images.labels.to(device)
    if not mode.contrastive:
        return float((outputs.argmax(dim=1) == labels).double().mean())
    if labels.bincount().max() < 2:
        return None
    return knn_accuracy(outputs, labels)


def knn_accuracy(outputs, labels, k=20, folds=5):
    """Measure the cross-validated accuracy of a nearest-neighbour classifier.

    Cosine similarity, majority vote of the k nearest, ties to the smaller class; stratified folds
    in data order; the mean of the folds' accuracies.

    Args:
        outputs: float [N, D]. labels: int64 [N] on the same device.
        k: neighbours, at most as many as a fold leaves. folds: at most as many as the largest
            class has members.

    Returns:
        float in 0..1.

    Source: same as the original's KNeighborsClassifier(20, metric="cosine") in cross_val_score.
    """
    import warnings

    from sklearn.model_selection import StratifiedKFold

    z = F.normalize(outputs.float(), dim=1)
    y = labels.cpu().numpy()
    classes = int(labels.max()) + 1
    folds = min(folds, int(labels.bincount().max()))
    accuracies = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes smaller than the number of folds
        for known, asked in StratifiedKFold(folds).split(y, y):
            known = torch.from_numpy(known).to(z.device)
            right = 0
            for rows in torch.from_numpy(asked).to(z.device).split(1024):
                near = (z[rows] @ z[known].T).topk(min(k, len(known)), dim=1).indices  # [n, k]
                votes = F.one_hot(labels[known][near], classes).sum(dim=1)  # [n, classes]
                # argmax promises nothing on ties: make the smaller class win by less than a vote
                choice = (votes * classes - torch.arange(classes, device=z.device)).argmax(dim=1)
                right += (choice == labels[rows]).sum()
            accuracies.append(float(right) / len(asked))
    return sum(accuracies) / folds
