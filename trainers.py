"""How a network is trained: the modes, a step, an epoch, the schedule, and the monitor.

    step = Step(network, optimizer, images, TRAINING_MODES["SimCLR"], size=32, mean=MEAN, std=STD)
    with Epoch(step, 0, batch_size=512) as epoch:
        for number, batch in epoch:  # batch -> augment -> models -> losses, once
            epoch.add(number, step(batch, 0, number, *schedule(...)))
"""

import math
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import augment
import data
import features
import models
import utils
from infra import distributed, image_files
from infra.image_files import ImageFiles
from losses import SupConLoss
from utils import RunError, UserError

WARMUP_EPOCHS = 10
LR_START, LR_END = 0.01, 1e-4  # at the first step of the warm-up; where the cosine would arrive
MOMENTUM_START, MOMENTUM_END = 0.9, 0.8  # over the warm-up, with cycling
# Of sets of some hundred pictures (recipe_for); what was tried is in docs/detect.md.
SMALL_SIZES, SMALL_EPOCHS = (64, 48, 32, 24), 20
SMALL_BATCH, SMALL_LR, SMALL_TEMPERATURE = 32, 0.004, 0.2
CPU_BF16 = ("avx512_bf16", "amx_tile")  # what processors that multiply bfloat16 have


@dataclass(frozen=True)
class TrainingMode:
    """What tells the training modes apart; all other code asks here."""

    augmentation: str  # "ssl" or "org"
    views: int  # of each image in a batch
    head: str  # key of models.HEADS
    contrastive: bool  # SupConLoss, else cross-entropy
    needs_labels: bool  # whether the loss looks at the classes
    monitor: str  # what is watched, in words
    label_clusters: bool = False  # whether several clusters of the detection are the classes


TRAINING_MODES = {
    "SimCLR": TrainingMode("ssl", 2, "projection", True, False, "20-NN accuracy"),
    "SupCon": TrainingMode("ssl", 2, "projection", True, True, "20-NN accuracy"),
    "SupCE": TrainingMode("org", 1, "classifier", False, True, "top-1 accuracy", True),
}


# --- before the first step ------------------------------------------------------------------------


def check_batches(mode, images, batch_size, size, sync_bn=False):
    """Raise UserError if a batch is too small for the processes, the loss or batch norm.

    Args: images: how many train. batch_size: images a step, of all processes. sync_bn: whether
        batch norm sees them all.
    """
    given = f"--batch-size {batch_size} with {images} training images"
    processes = distributed.world_size()
    if min(images, batch_size) < processes:
        raise UserError(f"{given}: {processes} processes need at least an image each a step")
    if mode.contrastive and min(images, batch_size) < 2:
        raise UserError(f"{given}: a contrastive loss needs at least 2 images a step")
    # At 8 pixels the last stage has one pixel an image, so one image is one value for batch norm.
    last = images % batch_size or batch_size
    smallest = last if sync_bn else min(batch_size, last) // processes
    if mode.views == 1 and size == 8 and smallest <= 1:
        share = f" for one of {processes} processes" if processes > 1 else ""
        raise UserError(f"--batch-size {batch_size} leaves a step of 1 image of {images}{share}, "
                        "too few for batch norm at --size 8; choose another")


class Speed(NamedTuple):
    """Speed that costs only last digits: the flags of the same names, resolved."""

    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False


def fast_speed(device):
    """Return the Speed that --fast means on a device."""
    if device.type == "cuda":
        return Speed("bf16", True, True)
    # On CPUs channels-last was measured to pay at 32 pixels, bfloat16 where the processor
    # multiplies it (elsewhere it is emulated, and slow), torch.compile not at all.
    bf16 = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in CPU_BF16)
    return Speed("bf16" if bf16 else "fp32", True, False)


def recipe_for(n, minutes, size, device):
    """Choose how SimCLR learns most from a small set in a given time, by a measurement.

    Args: n: training images. minutes: of training on the device. size: S, None to choose: the
        largest of SMALL_SIZES at which there is time for enough epochs.
    Returns: dict of flags of train.py and their values.
    """
    measured, batch_size = size or SMALL_SIZES[-1], min(n, SMALL_BATCH)
    network = models.build_model("resnet18", "projection").to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)
    pixels = torch.zeros(batch_size, 3, 2 * measured, 2 * measured, dtype=torch.uint8)
    images = data.ImageSet("measured", pixels, torch.zeros(batch_size, dtype=torch.int64))
    speed = fast_speed(device)._replace(compile=False)  # which takes minutes of those
    step = Step(network, optimizer, data.to(images, device), TRAINING_MODES["SimCLR"],
                size=measured, speed=speed)
    batch, seconds = Batch(torch.arange(batch_size, device=device)), []
    for i in range(6):
        began = time.perf_counter()
        float(step(batch, 0, i, 1e-6, 0.9))  # waits for the device
        seconds.append(time.perf_counter() - began)

    def epochs(side):  # a step takes as long as it has pixels
        one = math.ceil(n / batch_size) * statistics.median(seconds[1:]) * (side / measured) ** 2
        return max(1, int(60 * minutes / one))

    size = size or next((s for s in SMALL_SIZES if epochs(s) >= SMALL_EPOCHS), measured)
    return {"arch": "resnet18", "size": size, "normalize": True, "batch-size": batch_size,
            "epochs": epochs(size), "lr": SMALL_LR, "temperature": SMALL_TEMPERATURE,
            "precision": speed.precision, "channels-last": speed.channels_last}


# --- one step -------------------------------------------------------------------------------------


def schedule(step, steps_per_epoch, epochs, lr, momentum, warmup=False, cycle_momentum=True):
    """Return (learning rate, momentum) of a step.

    Args:
        step: 0, 1, ... over the whole run, warm-up included.
        epochs, lr, momentum: after the warm-up.
        warmup: whether lr rises linearly from 0.01 in 10 epochs before.
        cycle_momentum: with warm-up, let momentum fall from 0.9 to 0.8 and stay there.
    Source: same as the original, whose momentum falls because CyclicLR's default lets it, and
    stays low because nothing raises it again.
    """
    warmup_steps = WARMUP_EPOCHS * steps_per_epoch if warmup else 0
    if warmup and cycle_momentum:
        momentum = MOMENTUM_START + (MOMENTUM_END - MOMENTUM_START) * min(step / warmup_steps, 1)
    if step < warmup_steps:
        return LR_START + (lr - LR_START) * step / warmup_steps, momentum
    angle = math.pi * (step - warmup_steps) / (epochs * steps_per_epoch)
    return LR_END + (lr - LR_END) * (1 + math.cos(angle)) / 2, momentum


class Batch(NamedTuple):
    """A batch of all processes."""

    index: torch.Tensor  # int64 [B], on the device of the labels
    prefetched: tuple | None = None  # what worker processes made of images in files


class Step:
    """One step of training: views of a batch, network, loss, gradients, update.

    Nothing in it waits for the device (but torch does for `sync_bn`). Of several processes each
    makes the views of its shard of the batch and takes their part of the loss, over all other views
    of the batch: the parts, and their gradients, add up to those of one process. Without `sync_bn`
    the statistics of batch norm are of the shard, as in the original.

    Args:
        network, optimizer: of models.build_model and torch.optim.SGD; changed by every call.
        images: data.ImageSet, on the device of the network unless its pixels are in files.
        mode: TrainingMode. size: S in pixels. mean, std: normalisation constants or None.
        temperature: of the loss. seed: with the place in the run, decides every random draw.
        speed: Speed. In bf16, weights, batch statistics, normalisation and loss stay in float32.
        sync_bn: whether `network` went through distributed.sync_batch_norm.
    """

    def __init__(self, network, optimizer, images, mode, *, size, mean=None, std=None,
                 temperature=0.5, seed=0, speed=Speed(), sync_bn=False):  # noqa: B008 (immutable)
        self.network, self.optimizer, self.images, self.mode = network, optimizer, images, mode
        self.size, self.seed, self.device = size, seed, images.labels.device
        self.in_files = isinstance(images.pixels, ImageFiles)
        self._criterion = SupConLoss(temperature) if mode.contrastive else None
        self._mean, self._std = (  # copied to the device once, not at every step
            v and torch.tensor(v, device=self.device) for v in (mean, std))
        self._speed, self._sync_bn = speed, sync_bn
        made = augment.AFTER_WORKERS if self.in_files else augment.AUGMENTATIONS
        self._forward, self._augment = distributed.parallel(network), made[mode.augmentation]
        if speed.compile:
            self._forward = torch.compile(self._forward, dynamic=False)
            self._augment = torch.compile(self._augment, dynamic=False)

    def __call__(self, batch, epoch, step, lr, momentum):
        """Train on a Batch at a place in the run, of which the draws are a function.

        Returns the loss before the update, a float scalar on the device; of several processes the
        part of this one, and the sum of all is the loss.
        """
        mine, rows = distributed.shard(len(batch.index)), self.rows(len(batch.index))
        images = mine.stop - mine.start
        x = self.views(batch, epoch, step)  # [views * b, 3, S, S]

        # torch's SyncBatchNorm tells the others of an empty batch in the type of the batch
        with utils.autocast(self.device, self._speed.precision if images else "fp32"):
            out = self._forward(x)  # [views * b, 128 or classes]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        # An image that only stood in for an empty shard has no part in the loss.
        out = out.unflatten(0, (self.mode.views, rows.stop - rows.start))[:, :images]
        loss = self._loss(out, batch.index, mine)

        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over the processes; the mean is the sum of the parts after this.
        (loss * distributed.world_size()).backward()
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        self.optimizer.step()
        return loss.detach()

    def rows(self, n):
        """Return the rows of a batch of n images of which this process makes the views: a slice."""
        mine = distributed.shard(n)
        # In an empty shard an image stands in, since gradients are exchanged by all processes.
        return mine if mine.stop > mine.start or self._sync_bn else slice(0, 1)

    def views(self, batch, epoch, step):
        """Make the views of this process's rows of a Batch: float32 [views * b, 3, S, S]."""
        if batch.prefetched is None:
            rows = self.rows(len(batch.index))
            pixels = self.images.pixels[batch.index[rows]]  # uint8 [b, 3, H, W]
            # The draws depend on the place in the global batch alone: neither a resume nor another
            # number of processes changes which crop an image gets.
            params = augment.sample_views(
                self.mode.augmentation, self.mode.views, len(batch.index), rows, *pixels.shape[2:],
                utils.generator(self.seed, "augment", epoch, step))
            pixels = pixels.repeat(self.mode.views, 1, 1, 1)  # [views * b, 3, H, W]
        else:
            pixels, params = batch.prefetched
            pixels = pixels.to(self.device, non_blocking=True)
        x = self._augment(pixels, augment.to(params, self.device), self.size, self._mean, self._std)
        channels_last = self._speed.channels_last
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def _loss(self, out, index, mine):
        """The part of the loss that the outputs [views, b, ...] of this process have."""
        labels = self.images.labels[index] if self.mode.needs_labels else None
        if self.mode.contrastive:
            # Every view of the whole batch is a negative, whichever process made it.
            z = distributed.gather(out.transpose(0, 1), len(index))  # [B, views, 128]
            return self._criterion(z, labels, mine)
        return F.cross_entropy(out[0], labels[mine], reduction="sum") / len(index)


# --- one epoch ------------------------------------------------------------------------------------


class Epoch:
    """A context in which iterating yields (step, Batch) of one epoch; it keeps the losses.

    Args:
        train_step: Step. name: of the epoch, in the progress bar and in errors.
        epoch: 0, 1, ... over the whole run, warm-up included; with the seed it decides the order.
        batch_size: images a step, of all processes; the last step takes what is left.
        first, losses: the steps that are done of an epoch that was broken off, and their losses.
        epochs: of the whole run, which the progress bar shows.
    """

    def __init__(self, train_step, epoch, batch_size, name="", first=0, losses=None, epochs=1):
        self._step, self._epoch, self._first, self._name = train_step, epoch, first, name
        order = data.epoch_order(len(train_step.images), train_step.seed, epoch)
        self._order = order.split(batch_size)  # int64 [B] each
        self._losses = torch.zeros(len(self._order), device=train_step.device)
        if losses is not None and distributed.is_main_process():  # the others add nothing to them
            self._losses[:first] = losses.to(train_step.device)
        self._done, self._views, self._ended, self._epochs = first, 0, None, epochs

    def __len__(self):
        return len(self._order)

    def __enter__(self):
        self._step.network.train()
        steps, quiet = range(self._first, len(self)), not distributed.is_main_process()
        self._bar = tqdm(steps, desc=self._name, leave=False, disable=quiet or None,
                         initial=self._epoch * len(self) + self._first,
                         total=max(self._epochs, self._epoch + 1) * len(self))
        self._prefetched, self._began = self._prefetch(), time.perf_counter()
        return self

    def __exit__(self, *error):
        self._ended = time.perf_counter()  # what comes after the epoch does not count as training
        self._bar.close()
        self._prefetched.close()  # ends the workers, also where the run stops in the middle

    def __iter__(self):
        # The whole order is copied at once: a copy at each step would make the host wait.
        index = torch.cat(self._order).to(self._step.device).split(len(self._order[0]))
        for step in self._bar:
            yield step, Batch(index[step], next(self._prefetched, None))

    def _prefetch(self):
        """Yield what worker processes make of each batch; nothing for images in memory."""
        run = self._step
        if run.in_files:
            yield from image_files.training_batches(
                run.images.pixels, run.mode.augmentation, self._order, run.rows,
                views=run.mode.views, size=run.size, seed=run.seed, epoch=self._epoch,
                first=self._first, pin=run.device.type == "cuda")

    def add(self, step, loss):
        """Keep the loss of a step, this process's part of it, without waiting for the device."""
        self._losses[step] = loss
        self._done = step + 1
        self._views += self._step.mode.views * len(self._order[step])

    def losses(self):
        """Wait for the losses of the steps so far, float [steps]; RunError if one is not finite."""
        losses = distributed.all_reduce_sum(self._losses[: self._done])
        if bad := (~losses.isfinite()).nonzero().squeeze(1).tolist():
            raise RunError(f"the loss is {float(losses[bad[0]])} at {self._name}, step {bad[0]}; "
                           "stopped, the checkpoints before this epoch are untouched; a lower --lr "
                           "or --warmup may help")
        self._bar.set_postfix_str(f"loss {losses[-1]:.4f} {self.views_per_second():.0f} views/s")
        return losses

    def mean_loss(self):
        """Return the mean loss of the epoch's images, a float."""
        losses = distributed.all_reduce_sum(self._losses)
        sizes = torch.tensor([*map(len, self._order)], device=losses.device)
        return float((losses * sizes).sum() / sizes.sum())

    def views_per_second(self):
        """Return how many views were trained on a second, of all processes."""
        return self._views / ((self._ended or time.perf_counter()) - self._began)


# --- the state of a training ----------------------------------------------------------------------


@dataclass
class Progress:
    """How far a training has come; its checkpoint holds it, and a resumed run goes on from it."""

    epoch: int = 0  # epochs that are done, warm-up included
    step: int = 0  # steps of the next one that are done
    losses: torch.Tensor | None = None  # of these steps
    best: float = -math.inf  # the highest score of the monitor


def checkpoint_state(network, optimizer, config, progress):
    """Describe the state of a training for a checkpoint, or RunError if weights are not finite.

    Returns a dict of tensors and plain types, whose first five entries are the original's.
    """
    # The loss of the last step was computed before its update and cannot tell.
    values = [v for v in network.state_dict().values() if v.is_floating_point()]
    if not torch.stack([v.isfinite().all() for v in values]).all():
        raise RunError(f"weights are not finite after {progress.epoch} epochs and {progress.step} "
                       "steps; stopped, the checkpoints of earlier steps are untouched")
    return {
        "epoch": max(progress.epoch - WARMUP_EPOCHS * config["warmup"], 0),  # after the warm-up
        "arch": config["arch"],
        "state_dict": network.state_dict(),
        "best_prec1": 100 * max(progress.best, 0.0),  # per cent; without an accuracy there is none
        "optimizer": optimizer.state_dict(),
        "config": config,
        "progress": {**vars(progress), "device": values[0].device.type,
                     "processes": distributed.world_size()},
    }


def fits(network, optimizer, state):
    """Tell whether a state is one that `checkpoint_state` made of this training.

    Of a state that is strange in other ways Python raises a TypeError, LookupError or the like.
    """
    config, progress = state["config"], state["progress"]
    epoch, step, losses, best, end = (
        progress[key] for key in ("epoch", "step", "losses", "best", "log_bytes"))
    (group,), (own,) = state["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"]
    kept = {i: k["momentum_buffer"] for i, k in state["optimizer"]["state"].items()}  # or None
    return (
        all(type(n) is int and n >= 0 for n in (epoch, step, end)) and type(best) is float
        and epoch <= config["epochs"] + WARMUP_EPOCHS * config["warmup"]
        and step == (0 if losses is None else losses.numel())
        and {k: v.shape for k, v in state["state_dict"].items()} == {
            k: v.shape for k, v in network.state_dict().items()}
        and all(group[key] == own[key] for key in ("params", "weight_decay", "nesterov"))
        and [*kept] in ([], own["params"])
        and all(value is None or value.shape == parameter.shape
                for value, parameter in zip(kept.values(), network.parameters(), strict=False)))


def restore_training(saved, network, optimizer, device):
    """Put the state of `checkpoint_state`, None for a new run, back; returns its Progress."""
    if saved is None:
        return Progress()
    network.load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["optimizer"])
    before = saved["progress"]
    for key, now in (("device", device.type), ("processes", distributed.world_size())):
        if (then := before.get(key, now)) != now:
            utils.note(f"the run was trained with {key} {then} so far and goes on with {now}")
    return Progress(*(before[name] for name in ("epoch", "step", "losses", "best")))


def describe_epoch(record, warmup_epochs):
    """Return the lines of an epoch in setup.log from its record: the original's one, and ours."""
    epoch, line = record["epoch"], ""
    title = (f"Epoch {epoch}" if epoch >= 0 else
             f"Warm-up epoch {epoch + warmup_epochs + 1} of {warmup_epochs}")
    if "accuracy" in record["monitor_name"]:
        line = (f"{title}, validation accuracy {100 * record['monitor']}, "
                f"best_prec {100 * record['best']}\n")
    return (f"{line}{title}: loss {record['loss']:.4f}, lr {record['lr']:.6f}, "
            f"{record['views_per_s']:.0f} views/s")


# --- monitors: they look at test images, as the original's do -------------------------------------


def validate(network, images, mode, settings, loss):
    """Return how good a network is, larger is better, and by what measure: (score, its name).

    Args: as for `monitor`. loss: of the epoch, where the test images allow no accuracy.
    """
    score = monitor(network, images, mode, settings)
    if score is None:
        return -loss, "minus the training loss (the test images have no classes to tell apart)"
    return score, f"{mode.monitor} on the test images"


def monitor(network, images, mode, settings):
    """Measure how well the classes of test images are told apart; all processes share the work.

    Args: images: data.ImageSet of the test images, None where there are none. mode: TrainingMode.
        settings: features.FeatureSettings.
    Returns: float in 0..1: top-1 accuracy of a classifier, else `knn_accuracy` of the head's
        outputs; None where that means nothing: no classes, one, or none with two images.
    """
    if images is None or images.class_names is None:
        return None
    counts = images.labels.bincount()
    if (counts > 0).sum() < 2 or (mode.contrastive and counts.max() < 2):
        return None
    distributed.broadcast_buffers(network)  # all measure the main process's batch norm
    outputs = features.extract(network, images, settings)
    accuracy = None
    if distributed.is_main_process():
        device = next(network.parameters()).device
        outputs, labels = outputs.to(device), images.labels.to(device)
        accuracy = knn_accuracy(outputs, labels) if mode.contrastive else float(
            (outputs.argmax(dim=1) == labels).double().mean())
    return distributed.broadcast_object(accuracy)


def knn_accuracy(outputs, labels, k=20, folds=5):
    """Measure the cross-validated accuracy, a float in 0..1, of a nearest-neighbour classifier.

    Cosine similarity, majority vote of the k nearest, ties to the smaller class; stratified folds
    in data order, of whose accuracies it is the mean.

    Args: outputs: float [N, D]. labels: int64 [N] on the same device. k: neighbours, or as many as
        a fold leaves. folds: or as many as the largest class has members.
    Source: same as the original's KNeighborsClassifier(20, metric="cosine") in cross_val_score.
    """
    from sklearn.model_selection import StratifiedKFold

    z = F.normalize(outputs.float(), dim=1)
    y, sizes = labels.cpu().numpy(), labels.bincount()  # images of each class
    folds = min(folds, int(sizes.max()))
    accuracies = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes smaller than the number of folds
        for known, asked in StratifiedKFold(folds).split(y, y):
            known = torch.from_numpy(known).to(z.device)
            right = 0
            for rows in torch.from_numpy(asked).to(z.device).split(1024):
                choice = nearest_class(z[rows], z[known], labels[known], k, len(sizes))
                right += (choice == labels[rows]).sum()
            accuracies.append(float(right) / len(asked))
    return sum(accuracies) / folds


def nearest_class(asked, known, labels, k, classes):
    """Classify rows of unit length [n, D] by the k nearest of known ones [N, D]: int64 [n].

    Args: labels: int64 [N] of `known`, below `classes`; of equal votes the smaller class wins.
    """
    near = (asked @ known.T).topk(min(k, len(known)), dim=1).indices  # [n, k]
    votes = F.one_hot(labels[near], classes).sum(dim=1)  # [n, classes]
    # argmax promises nothing on ties: make the smaller class win by less than a vote
    return (votes * classes - torch.arange(classes, device=votes.device)).argmax(dim=1)
