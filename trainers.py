"""One epoch of each training mode, the schedule, and what says how good the network is.

    step = Step(network, optimizer, images, MODES["SimCLR"], size=32, mean=MEAN, std=STD)
    loss, speed = train_epoch(step, epoch=0, ...)
    accuracy = knn_accuracy(outputs, labels)
"""

import contextlib
import copy
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

import augment
import data
import distributed
import features
import stream
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


class Step:
    """One step of training: views of a batch, network, loss, gradients, update.

    Neither it nor anything it calls waits for the device, but for `sync_bn`, in which torch does: a
    GPU is never idle because of it.

    Of several processes each makes the views of its share of the batch and sees to the i of them in
    the loss, over all other views of the whole batch: the parts, and their gradients, add up to
    those of one process. But for batch norm: without `sync_bn` its statistics are of the share, as
    in the original.

    Args:
        network: what models.build_model returned, on its device. Changed by every call.
        optimizer: torch.optim.SGD of its parameters. Changed by every call.
        images: data.ImageSet; its labels and its pixels, unless those are in files, on the device
            of the network.
        mode: a value of MODES.
        size: S in pixels. mean, std: normalisation constants or None. temperature: of the loss.
        seed: with the place in the run, decides every random draw.
        precision: "fp32", or "bf16": convolutions and matrix products of the network in bfloat16,
            weights, batch statistics, normalisation and loss in float32.
        channels_last: lay images out as the network's weights are, channels innermost.
        compile: let torch.compile make kernels of network and augmentation, for the two shapes
            there are: that of a batch, and of the partial last one.
        sync_bn: whether `network` went through distributed.sync_batch_norm.
    """

    def __init__(
        self, network, optimizer, images, mode, *, size, mean=None, std=None, temperature=0.5,
        seed=0, precision="fp32", channels_last=False, compile=False, sync_bn=False,
    ):
        self.network, self.optimizer, self.images, self.mode = network, optimizer, images, mode
        self._criterion = SupConLoss(temperature) if mode.contrastive else None
        self._size, self._seed, self._device = size, seed, images.labels.device
        self._mean, self._std = (  # on the device once, not at every step
            v if v is None else torch.tensor(v, device=self._device) for v in (mean, std)
        )
        self._precision, self._channels_last = precision, channels_last
        self._empty_share = sync_bn  # whether the network takes a batch of no images
        self._forward = distributed.parallel(network)
        self._in_files = isinstance(images.pixels, data.Files)
        self._apply = (AFTER_WORKERS if self._in_files else AUGMENTATIONS)[mode.augmentation]
        if compile:
            self._forward = torch.compile(self._forward, dynamic=False)
            self._apply = torch.compile(self._apply, dynamic=False)

    def ahead(self, order, epoch, first):
        """Yield for each step of an epoch what of its batch is made before it.

        Args:
            order: sequence of int64 [B] on the CPU, the images of each batch.
            epoch: as for a call. first: step to begin with.

        Yields:
            what stream.batches does where images are in files, else None.
        """
        if not self._in_files:
            yield from [None] * (len(order) - first)
        else:
            yield from stream.batches(
                self.images.pixels, self.mode.augmentation, order, self._rows,
                views=self.mode.views, size=self._size, seed=self._seed, epoch=epoch, first=first,
                pin=self._device.type == "cuda",
            )

    def __call__(self, index, epoch, step, lr, momentum, made=None):
        """Train on a batch.

        Args:
            index: int64 [B] on the device, which images, of the batch of all processes.
            epoch, step: the place in the run, of which the draws are a function.
            lr, momentum: of the update.
            made: what `ahead` yielded for the step.

        Returns:
            float scalar on the device, the loss before the update; of several processes the part of
            this one, and the sum of all is the loss.

        Raises:
            utils.RunError: out of GPU memory; says how many images a step would fit.
        """
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        try:
            loss = self._backward(index, epoch, step, made)
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        else:
            self.optimizer.step()
            return loss
        fits = self._what_fits(index)  # after the exception, which holds what the step had made
        raise utils.RunError(f"out of GPU memory in a step of {len(index)} images ({reason}); "
                             f"{f'--batch-size {fits} fits' if fits else 'one image does not fit'}")

    def _rows(self, n):
        """The rows of a batch of n of which this process makes the views."""
        mine = distributed.share(n)
        # Where it has none, an image stands in: its views are computed and do not count
        return mine if mine.stop > mine.start or self._empty_share else slice(0, 1)

    def _backward(self, index, epoch, step, made):
        """The loss of a batch, its gradients left in the parameters."""
        mine, seen = distributed.share(len(index)), self._rows(len(index))
        images = mine.stop - mine.start
        if made is None:
            x = self.views(self.images.pixels[index[seen]], epoch, step, seen, len(index))
        else:
            x = self.finish(*made)
        # torch's SyncBatchNorm tells the others of an empty batch in the type of the batch
        with utils.autocast(self._device, self._precision if images else "fp32"):
            out = self._forward(x)  # [views * b, 128 or classes]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        out = out.unflatten(0, (self.mode.views, seen.stop - seen.start))[:, :images]
        loss = self._loss(out, index, mine)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * distributed.world()).backward()  # the mean over processes is then the sum of parts
        return loss.detach()

    def _what_fits(self, index):
        """The largest half, quarter, ... of a batch whose step this process has the memory for."""
        mine = distributed.share(len(index))
        images = mine.stop - mine.start
        while images := images // 2:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                # A copy that asks no other process for anything, neither gradients nor statistics
                network = copy.deepcopy(self.network).eval()
                pixels = data.pixels_at(self.images.pixels, index[:images].cpu())
                x = self.views(pixels.to(self._device), 0, 0)
                with utils.autocast(self._device, self._precision):
                    out = network(x)
                out.float().square().sum().backward()
                return images * distributed.world()
        return 0

    def _loss(self, out, index, mine):
        """The part of the loss that the outputs [views, b, ...] of this process see to."""
        labels = self.images.labels[index] if self.mode.labels else None
        if self.mode.contrastive:
            z = distributed.gather(out.transpose(0, 1), len(index))  # [B, views, 128]
            return self._criterion(z, labels, mine)
        return F.cross_entropy(out[0], labels[mine], reduction="sum") / len(index)

    def views(self, pixels, epoch, step, rows=None, batch=None):
        """Make the augmented views of images [b, 3, H, W]: float32 [views * b, 3, S, S].

        Args:
            pixels: uint8, on the device.
            epoch, step: the place in the run; with seed and the position in the batch they decide
                the draws.
            rows: slice of the batch that the images are; None is all of it.
            batch: images of the batch; None is as many as there are.
        """
        batch = len(pixels) if batch is None else batch
        generator = utils.generator(self._seed, "augment", epoch, step)
        shape, rows = (self.mode.views, batch), slice(None) if rows is None else rows
        if self.mode.augmentation == "ssl":
            u = augment.uniform_ssl(math.prod(shape), generator)  # of all: the rest is of its own
            u = u.unflatten(0, shape)[:, rows].flatten(0, 1)
            draws = augment.ssl_draws(u, augment.ssl_boxes(u, *pixels.shape[2:]))
        else:
            mine = torch.arange(math.prod(shape)).view(shape)[:, rows].flatten()
            draws = augment.take(augment.draw_org(math.prod(shape), generator), mine)
        return self.finish(pixels.repeat(self.mode.views, 1, 1, 1), draws)

    def finish(self, pixels, draws):
        """Bring images and their draws to the device and apply there what is left of these.

        Args:
            pixels, draws: what `ahead` yielded for a step.

        Returns:
            float32 [views * b, 3, S, S].
        """
        draws = augment.to(draws, self._device)
        pixels = pixels.to(self._device, non_blocking=True)
        x = self._apply(pixels, draws, self._size, self._mean, self._std)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x


AUGMENTATIONS = {"ssl": augment.apply_ssl, "org": augment.apply_org}
AFTER_WORKERS = {"ssl": augment.apply_colors, "org": augment.apply_org}  # that decoded and cropped


def fast_settings(device):
    """Return what --fast means on a device: {precision, channels_last, compile}.

    A GPU takes all three. On CPUs channels-last was measured to pay at 32 pixels, bfloat16 where
    the processor multiplies it (elsewhere it is emulated, and slow), torch.compile not at all.
    """
    if device.type == "cuda":
        return {"precision": "bf16", "channels_last": True, "compile": True}
    can = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    bf16 = any(getattr(torch.cpu, name, lambda: False)() for name in can)
    return {"precision": "bf16" if bf16 else "fp32", "channels_last": True, "compile": False}


def train_epoch(
    train_step, *, epoch, draws, rates, batch_size, seed, print_freq, report, after_step=None,
    first=0, losses=None,
):
    """Train for one epoch, or for what is left of one.

    Args:
        train_step: Step.
        epoch: as logs count it. draws: 0, 1, ... over the whole run; with `seed` this decides
            every random draw of the epoch.
        rates: function (epoch, step of it) -> (lr, momentum).
        batch_size: images a step; the last step takes what is left.
        print_freq: steps between two reports; the host waits for the device only then.
        report: function (epoch, step, loss, views per second) called at them.
        after_step: function (epoch, step, losses so far) called after each step; of several
            processes each has its parts of the losses.
        first, losses: where an epoch was broken off: the steps that are done, and their losses,
            which rank 0 goes on with.

    All processes call it with the same arguments.

    Returns:
        (mean loss of the epoch, views per second).

    Raises:
        utils.RunError: a loss that is not finite; names the first such step and its rates.
    """
    train_step.network.train()
    images, views = train_step.images, train_step.mode.views
    device = images.labels.device
    order = data.epoch_order(len(images), seed, draws)
    batches = order.to(device).split(batch_size)
    every = torch.zeros(len(batches), device=device)
    if losses is not None and distributed.is_lead():
        every[:first] = losses.to(device)
    seen, began = 0, time.perf_counter()
    left = range(first, len(batches))
    with tqdm(left, desc=f"epoch {epoch}", leave=False, initial=first, total=len(batches),
              disable=None if distributed.is_lead() else True) as bar, \
            contextlib.closing(train_step.ahead(order.split(batch_size), draws, first)) as ahead:
        for step, made in zip(bar, ahead, strict=True):
            every[step] = train_step(batches[step], draws, step, *rates(epoch, step), made)
            seen += views * len(batches[step])
            if (step + 1) % print_freq == 0 or step + 1 == len(batches):
                whole = distributed.total(every[: step + 1])
                stop_if_not_finite(whole, epoch, rates)
                speed = seen / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {whole[step]:.4f} {speed:.0f} views/s")
                report(epoch, step, float(whole[step]), speed)
            if after_step is not None:
                after_step(epoch, step, every[: step + 1])
    sizes = torch.tensor([len(b) for b in batches], device=device)
    mean = float((distributed.total(every) * sizes).sum() / sizes.sum())
    return mean, seen / (time.perf_counter() - began)


def is_finite(network):
    """Tell whether all floating-point weights and statistics of a network are finite."""
    values = [v for v in network.state_dict().values() if v.is_floating_point()]
    return bool(torch.stack([v.isfinite().all() for v in values]).all())


def stop_if_not_finite(losses, epoch, rates):
    """Raise RunError if one of an epoch's losses [steps] is not finite; names the first."""
    bad = (~losses.isfinite()).nonzero().squeeze(1).tolist()
    if bad:
        lr, momentum = rates(epoch, bad[0])
        raise utils.RunError(
            f"the loss is {float(losses[bad[0]])} at epoch {epoch}, step {bad[0]} (lr {lr:.6g}, "
            f"momentum {momentum:.4g}); stopped, the checkpoints before this epoch are untouched; "
            "a lower --lr or --warmup may help"
        )


# --- monitors: they look at test images, as the original's do -------------------------------------


def monitor(network, images, mode, *, batch_size, size, mean, std, precision="fp32"):
    """Measure how well the classes of test images can be told, as a share in 0..1.

    Args:
        network: on its device; of several processes that of rank 0 is measured, and the others get
            its statistics of batch norm.
        images: data.ImageSet of the test images.
        mode: a value of MODES; the others as for Step.

    Returns:
        float: top-1 accuracy of a classifier; else `knn_accuracy` of the head's outputs. None
        where that says nothing: no classes, a single one, or none with two images. The same in all
        processes, which share the work and have to call it together.
    """
    counts = images.labels.bincount()
    if images.class_names is None or (counts > 0).sum() < 2:
        return None
    if mode.contrastive and counts.max() < 2:
        return None
    distributed.share_buffers(network)
    outputs = features.extract(network, images, batch_size=batch_size, size=size, mean=mean,
                               std=std, precision=precision, spread=True)
    accuracy = None
    if distributed.is_lead():
        device = next(network.parameters()).device
        measure = knn_accuracy if mode.contrastive else top_1
        accuracy = measure(outputs.to(device), images.labels.to(device))
    return distributed.from_lead(accuracy)


def top_1(outputs, labels):
    """Measure the share of rows of outputs [N, classes] whose largest is that of the label [N]."""
    return float((outputs.argmax(dim=1) == labels).double().mean())


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
