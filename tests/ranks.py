"""What test_distributed.py compares between 1, 2 and 3 processes; each of them runs this file.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks.py FOLDER

Rank 0 writes FOLDER/WORLD.pt: {case: {name: tensor}}, all in double precision. The images of a step
do not divide by 2 or 3, and the last step has 2 images, so that one of three processes has none.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file's folder is there

from epochs import run_epoch

import data
import losses
import models
import trainers
from features import FeatureSettings
from infra import distributed

IMAGES, BATCH, CLASSES = 22, 10, 3
STEPS, EPOCHS = 3, 2
BROKEN_AT = (1, 1)  # epoch and step after which two processes stop and three go on


class Network(nn.Module):
    """A ResNet in double precision: "plain" without batch norm, or "frozen"."""

    def __init__(self, mode, norm):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            encoder = models.ResNet(models.BasicBlock, (1, 1, 1, 1))
            network = (models.SupResNet(encoder, CLASSES) if mode == "SupCE"
                       else models.SSLResNet(encoder))
        self.network, self.frozen = network.double(), norm == "frozen"
        if norm == "plain":
            for parent in list(network.modules()):
                for name, layer in parent.named_children():
                    if isinstance(layer, nn.BatchNorm2d):
                        setattr(parent, name, nn.Identity())

    def forward(self, x):
        return self.network(x.double())

    def train(self, mode=True):
        return super().train(mode and not self.frozen)


class Broken(Exception):
    pass


def images():
    """Random images of 8 pixels in three classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 3, 8, 8), generator=generator).to(torch.uint8)
    names = tuple(str(c) for c in range(CLASSES))
    return data.ImageSet("random", pixels, torch.arange(IMAGES) % CLASSES, names)


def train(mode, norm, state=None, broken=False):
    """Train for two epochs, or for a part of them: {name: tensor}."""
    network = Network(mode, norm)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    progress = trainers.Progress()
    if state:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        progress = trainers.Progress(**state["progress"])
    step = trainers.Step(network, optimizer, images(), trainers.TRAINING_MODES[mode], size=8,
                         seed=7, mean=[0.5] * 3, std=[0.2] * 3)
    reports, means = [], []

    def break_off(epoch, number, batches):
        nonlocal progress
        if broken and (epoch, number + 1) == BROKEN_AT:
            progress = trainers.Progress(*BROKEN_AT, batches.losses())
            raise Broken

    try:
        for epoch in range(progress.epoch, EPOCHS):
            means.append(run_epoch(step, epoch, batch_size=BATCH, print_freq=1, reports=reports,
                                   first=progress.step, losses=progress.losses,
                                   after_step=break_off))
            progress = trainers.Progress(epoch + 1)
    except Broken:
        return {"network": network.state_dict(), "optimizer": optimizer.state_dict(),
                "progress": vars(progress)}
    return {"losses": torch.tensor([loss for _, _, loss in reports], dtype=torch.float64),
            "means": torch.tensor(means, dtype=torch.float64), **network.network.state_dict()}


def watch(mode):
    """What the monitor says of a network whose statistics differ between processes."""
    row = trainers.TRAINING_MODES[mode]
    network = models.build_model("resnet18", row.head, CLASSES, torch.Generator().manual_seed(2))
    network.encoder.bn1.running_mean += distributed.rank()
    score = trainers.monitor(network, images(), row, FeatureSettings(size=8, batch_size=4))
    return {"score": torch.tensor(score, dtype=torch.float64),
            "statistics": network.encoder.bn1.running_mean}


def contrast(n, labels):
    """Loss and gradient of n images, each process with its share: {name: tensor}."""
    generator = torch.Generator().manual_seed(n)
    whole = torch.randn(n, 2, 16, dtype=torch.float64, generator=generator)
    mine = distributed.shard(n)
    z = whole[mine].requires_grad_()
    every = distributed.gather(F.normalize(z, dim=2), n)
    y = torch.arange(n) % 3 if labels else None
    part = losses.SupConLoss(0.5)(every, y, mine)
    part.backward()
    return {"loss": distributed.all_reduce_sum(part.detach()),
            "gradient": distributed.gather(z.grad, n)}


def main(folder):
    distributed.start()
    world = distributed.world_size()
    results = {f"contrast of {n}, {'SupCon' if labels else 'SimCLR'}": contrast(n, labels)
               for n in (2, 11) for labels in (False, True)}
    results |= {f"monitor of {mode}": watch(mode) for mode in ("SimCLR", "SupCE")}
    for mode, norm in (("SimCLR", "frozen"), ("SupCon", "plain"), ("SupCE", "plain")):
        results[f"{mode}, {norm}"] = train(mode, norm)
    if world == 2:
        state = train("SimCLR", "frozen", broken=True)
        if distributed.is_main_process():
            torch.save(state, folder / "broken.pt")
    if world == 3:
        state = torch.load(folder / "broken.pt", weights_only=True)
        results["SimCLR, frozen, resumed"] = train("SimCLR", "frozen", state)
    if distributed.is_main_process():
        torch.save(results, folder / f"{world}.pt")
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
