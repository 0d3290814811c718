"""The networks: CIFAR-style ResNets, and the two heads that training puts on them.

    network = build_model("resnet18", "projection", generator=torch.Generator().manual_seed(0))
    network.encoder(images)   # [B, 512] features, on which outliers are detected
    network(images)           # [B, 128] unit vectors, on which the loss is taken

Parameter names and shapes are those of the original, so its checkpoints load as they are.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Add two 3x3 convolutions to their input (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """Add a 1x1, 3x3, 1x1 stack to its input (ResNet-50 and -101); the 3x3 carries the stride."""

    expansion = 4

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.shortcut = _shortcut(in_planes, planes * self.expansion, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


def _shortcut(in_planes, out_planes, stride):
    """Project the input where its shape differs from the output's; else pass it through."""
    if stride == 1 and in_planes == out_planes:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False),
                         nn.BatchNorm2d(out_planes))


class ResNet(nn.Module):
    """Map images to features with a ResNet whose stem keeps the resolution.

    A 3x3 stride-1 stem and no max-pool, whatever the input size, then four stages of 64, 128,
    256 and 512 planes with strides 1, 2, 2, 2 and a global average pool.

    Args: block: BasicBlock or Bottleneck. depths: number of blocks of each of the four stages.
    Shape: float [B, 3, S, S], S >= 8 -> float [B, width], `width` = 512 * block.expansion.
    """

    def __init__(self, block, depths):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stages, in_planes = [], 64
        for planes, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
            blocks = []
            for i in range(depth):
                blocks.append(block(in_planes, planes, stride if i == 0 else 1))
                in_planes = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.width = in_planes

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))  # [B, 64, S, S]
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))  # [B, width, S/8, S/8]
        return self.avgpool(out).flatten(1)  # [B, width]


ARCHITECTURES = {  # functions () -> encoder of 512, 512, 2,048 and 2,048 features
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
}


class SSLResNet(nn.Module):
    """Put the projection head of contrastive training on a ResNet (SimCLR and SupCon).

    Shape: float [B, 3, S, S] -> float [B, dim], each row of unit length.
    """

    def __init__(self, encoder, dim=128):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(encoder.width, encoder.width), nn.ReLU(), nn.Linear(encoder.width, dim)
        )

    def forward(self, x):
        z = self.head(self.encoder(x))
        # float32 under autocast too: unit length in bfloat16 is good to 1 in 256
        return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


class SupResNet(nn.Module):
    """Put a linear classifier on a ResNet (SupCE).

    Shape: float [B, 3, S, S] -> float [B, num_classes], logits.
    """

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, num_classes)

    def forward(self, x):
        return self.head(self.encoder(x))


HEADS = {"projection": lambda encoder, num_classes: SSLResNet(encoder), "classifier": SupResNet}


def build_model(arch, head, num_classes=10, generator=None):
    """Build a network with fresh weights.

    Args:
        arch: a key of ARCHITECTURES. head: a key of HEADS: "projection" (SimCLR, SupCon) or
            "classifier" (SupCE). num_classes: width of the classifier.
        generator: torch.Generator on the CPU, of the weights; None is torch's global one.

    Returns: SSLResNet or SupResNet, in training mode, float32, on the CPU.

    Source: same architecture and distributions as the original (convolutions Kaiming-normal
    fan-out, batch norm 1 and 0, linear layers torch's default); not the same draws.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw once when they are made
        network = HEADS[head](ARCHITECTURES[arch](), num_classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                    generator=generator)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5  # what nn.Linear draws from, for weight and bias
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
    return network


def restore(network, state):
    """Copy a state dict into a network, every key and shape matching. Changes `network`.

    Args:
        network: what build_model returned. state: {name: tensor}, as of load_checkpoint.

    Raises: ValueError: names the first keys that differ; `network` is then untouched.
    """
    expected, found = ({k: list(v.shape) for k, v in s.items()}
                       for s in (network.state_dict(), state))
    faults = {"missing": [k for k in expected if k not in found],
              "unknown": [k for k in found if k not in expected],
              "of other shape": [f"{k} is {found[k]}, not {shape}" for k, shape in expected.items()
                                 if found.get(k, shape) != shape]}
    texts = [f"{title}: {', '.join(names[:2])}" + f" and {len(names) - 2} more" * (len(names) > 2)
             for title, names in faults.items() if names]
    if texts:
        raise ValueError("; ".join(texts))
    network.load_state_dict(state)
