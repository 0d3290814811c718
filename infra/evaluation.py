"""What the evaluations share: flags, checkpoint to network, image sets, a source of features.

    source = open_network(args)                          # the flags of add_arguments
    source.train, source.test, source.outliers           # data.ImageSets
    x = source.features(source.test)                     # [N, D], computed or from the cache

eval_ssd.py and eval_ssdk.py differ in how they score. Features in a file are a source too
(report/exchange.py), with the same attributes.
"""

import argparse
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
import detection
import features
import models
import trainers
import utils
from features import FeatureCache, FeatureSettings, FeatureStore
from infra import checkpoints, distributed, storage
from utils import UserError, number

DEFAULT_OOD = ("cifar10", "cifar100", "svhn", "texture", "blobs")


# --- the command line -----------------------------------------------------------------------------


def add_arguments(p):
    """Add the flags of both evaluations to a utils.Parser."""
    add = p.add_argument_group("run").add_argument
    add("--exp-name", type=utils.experiment, default="temp_eval_ssd", help="of the result files")
    add("--results-dir", "--results_dir", default="./eval_results", help="where results go")
    add("--seed", type=number(int, 0, 2**31 - 1), default=12345,
        help="of k-means, noise sets, known outliers and augmentation")
    add("--scores", metavar="FILE.csv", help="write the score of every image")
    add("--plot", action="store_true",
        help="draw figures beside the results: score histograms, ROC and precision-recall curves, "
        "the most and least outlying images")
    add("--gpu", help="does nothing; CUDA_VISIBLE_DEVICES chooses the GPU")

    add_network_arguments(p)
    add = p.add_argument_group("images").add_argument
    add("--dataset", metavar="SET",
        help=f"in-distribution: {', '.join(data.TRAINABLE)}; folder:PATH and npz:PATH say where "
        "(default: the checkpoint's, else cifar10)")
    add("--data-dir",
        help="where image sets are and are downloaded to; for folder and npz without PATH, their "
        "place (default: the checkpoint's, else ./datasets)")
    add("--no-download", action="store_true", help="never fetch a missing set")
    add("--in-classes", type=utils.class_list, metavar="LIST",
        help="in-distribution classes, as 0-5 or 0,3,7 (default: the checkpoint's)")
    add("--ood", nargs="+", metavar="SET",
        help=f"outlier sets: {', '.join(data.DATASETS)}, folder:PATH, npz:PATH, and rest (the "
        f"classes that --in-classes leaves out) (default: {' '.join(DEFAULT_OOD)}, less the "
        "in-distribution set)")
    add("--workers", type=number(int, 0, 1024), metavar="N",
        help="images of folder, imagenet and texture that are decoded at a time, as they are "
        "needed; 0 decodes all into memory first (default: 0; where imagenet is in-distribution, "
        f"the processor's cores, {data.MAX_WORKERS} at most)")
    add("--data-mode", choices=["org", "base", "ssl"], default="base",
        help="augmentation of the training images whose features are taken, none in base; test "
        "images and outliers never have any")
    add("--batch-size", type=number(int, 1),
        help="images a pass (default: 256 on a GPU; on a CPU 32 for each thread, 256 at most)")
    add("--precision", choices=features.PRECISIONS, default="fp32",
        help="of the network; features and all that follows stay as they are")
    add("--cache-dir", metavar="DIR", help="keep features here and take them from here")
    add("--feature-store", metavar="DIR",
        help="the same, for features that do not fit into memory: they are written as they are "
        "computed and read a chunk at a time; files are never removed")


def add_network_arguments(p):
    """Add the flags that say which network makes the features; detect.py has them too."""
    add = p.add_argument_group("network", "what a checkpoint of train.py knows of itself need not "
                               "be said here").add_argument
    add("--ckpt", metavar="FILE", help="the trained network")
    add("--encoder", metavar="NAME",
        help=f"in its place, one that was pretrained on ImageNet: {models.ENCODERS}")
    add("--training-mode", choices=list(trainers.TRAINING_MODES),
        help="how it was trained (default: the checkpoint's)")
    add("--arch", choices=list(models.ARCHITECTURES), help="default: checkpoint's, else resnet50")
    add("--classes", type=number(int, 1),
        help="outputs of a SupCE classifier (default: the checkpoint's)")
    add("--size", type=number(int, 8, 4096),
        help="side that images are brought to, in pixels (default: the checkpoint's, else 32; of "
        "an --encoder its own transform's)")
    add("--normalize", action=argparse.BooleanOptionalAction, default=None,
        help="normalise colours with the in-distribution set's constants (default: the "
        "checkpoint's, else off)")


# --- the trained network --------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A network as it was trained, and what it was trained on, by its checkpoint and the flags."""

    encoder: torch.nn.Module  # [B, 3, S, S] -> [B, D]
    training_mode: str
    arch: str
    dataset: str
    data_dir: str
    in_classes: tuple | None
    size: int
    normalize: bool
    constants: tuple | None  # (mean, std) that a checkpoint of ours or an --encoder holds
    path: str | None  # of the checkpoint
    sha256: str  # hex digest of the checkpoint; of the weights where there is none
    interpolation: str = "bilinear"  # by which images are brought to `size`


# How a checkpoint that does not say so is taken to have been trained; each key is a flag.
FOREIGN = {"training_mode": None, "arch": "resnet50", "dataset": "cifar10",
           "data_dir": "./datasets", "in_classes": None, "size": 32, "normalize": False}


def _is_constant(low):
    """A test: is it None, or three numbers from `low` to 1?"""
    return lambda x: x is None or (isinstance(x, list) and len(x) == 3 and all(
        type(v) in (int, float) and low <= v <= 1 for v in x))


# What train.py writes into a checkpoint, which may come from anywhere: a test of each value.
WRITTEN = {
    "training_mode": lambda x: x in [*trainers.TRAINING_MODES],
    "arch": lambda x: x in [*models.ARCHITECTURES],
    "dataset": lambda x: isinstance(x, str) and utils.is_name(x),
    "data_dir": lambda x: isinstance(x, str) and utils.is_name(x),
    "in_classes": lambda x: x is None or (isinstance(x, list) and all(
        type(c) is int and 0 <= c < utils.MAX_CLASSES for c in x)),
    "num_classes": lambda x: type(x) is int,
    "size": lambda x: type(x) is int and 8 <= x <= 4096,
    "normalize": lambda x: isinstance(x, bool),
    "mean": _is_constant(0), "std": _is_constant(1e-9)}


def open_trained(args):
    """Open the Trained network that the flags of add_network_arguments name.

    Raises: UserError: a flag that contradicts the checkpoint or the encoder, a network that does
        not fit it; as load_checkpoint and models.pretrained.
    """
    # detect.py has some of the flags only.
    given = {key: getattr(args, key, None) for key in ("classes", *FOREIGN)}
    if args.ckpt is not None:
        return _restore(args.ckpt, given)
    return _use_pretrained(models.EMBEDDED if args.encoder is None else args.encoder, given)


def _restore(path, given):
    """The Trained network of a checkpoint of any dialect; flags are given, or None."""
    state, rest = checkpoints.load_checkpoint(path)
    known = rest.get("config")
    if isinstance(known, dict) and WRITTEN.keys() <= known.keys():
        for key, is_possible in WRITTEN.items():
            if not is_possible(known[key]):
                raise UserError(f"--ckpt {path}: its config has {key} = "
                                f"{reprlib.repr(known[key])}, which train.py never writes")
    else:
        arch = rest.get("arch")  # all that the original's own checkpoints say
        known = {"arch": arch} if arch in list(models.ARCHITECTURES) else {}
        if given["normalize"] is None:
            utils.note(f"{path} does not say whether colours were normalised in training; taken as "
                       "not. The published networks need --normalize")
    settings = {}
    for key, foreign in FOREIGN.items():
        value = known.get(key, foreign)
        value = tuple(value) if isinstance(value, list) else value
        if key in known and key != "data_dir":
            _check_agreement(path, key, given[key], value)
        settings[key] = value if given[key] is None else given[key]
    if settings["training_mode"] is None:
        raise UserError(f"--training-mode is needed: the checkpoint {path} does not say how it was "
                        f"trained ({', '.join(trainers.TRAINING_MODES)})")
    head = trainers.TRAINING_MODES[settings["training_mode"]].head
    if head == "classifier" and "num_classes" in known:
        _check_agreement(path, "classes", given["classes"], known["num_classes"])
    weight = state.get("head.weight")
    classes = given["classes"] or (len(weight) if weight is not None and weight.dim() == 2 else 10)
    network = models.build_model(settings["arch"], head, classes)
    if not any(key.startswith("head.") for key in state):  # features are taken before it
        state |= {k: v for k, v in network.state_dict().items() if k.startswith("head.")}
    try:
        models.restore(network, state)
    except ValueError as error:
        raise UserError(f"--ckpt {path} does not fit --arch {settings['arch']} --training-mode "
                        f"{settings['training_mode']} --classes {classes}: {error}") from None
    constants = (known.get("mean"), known.get("std")) if settings["normalize"] else (None, None)
    return Trained(network.encoder.to(utils.device()), path=str(path), **settings,
                   constants=None if None in constants else constants,
                   sha256=storage.file_hash(path))


def _use_pretrained(name, given):
    """The Trained network of an encoder that others trained; "SupCE" makes classes its clusters."""
    for flag in ("arch", "normalize", "classes"):
        if given[flag] is not None:
            raise UserError(f"--{flag} does not go with --encoder {name}, which has its own")
    encoder = models.pretrained(name, given["size"]).to(utils.device())
    settings = {k: foreign if given[k] is None else given[k] for k, foreign in FOREIGN.items()}
    return Trained(
        encoder, **settings | {"arch": name, "size": encoder.size, "normalize": True},
        constants=(encoder.mean, encoder.std), path=None, sha256=features.weights_hash(encoder),
        interpolation=encoder.interpolation)


def _check_agreement(path, key, given, trained):
    """Stop if a flag contradicts the checkpoint; a set may have moved, so its name alone counts."""
    one, other = given, trained
    if key == "dataset" and given is not None:
        one, other = (str(spec).partition(":")[0] for spec in (given, trained))
    if given is not None and one != other:
        flag = f"--{key.replace('_', '-')}"
        raise UserError(f"{flag} {_as_typed(given)} contradicts the checkpoint {path}, which was "
                        f"trained with {flag} {_as_typed(trained)}")


def _as_typed(value):
    if value is None or isinstance(value, bool):
        return "on" if value else "off" if value is False else "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


# --- the image sets -------------------------------------------------------------------------------


def _load_images(trained, args):
    """All image sets of an evaluation: (train, test, list of outlier sets), data.ImageSets."""
    name, _ = data.parse_spec(trained.dataset)
    ood = [o for o in DEFAULT_OOD if o != name] if args.ood is None else args.ood
    workers = data.default_workers(trained.dataset) if args.workers is None else args.workers
    where = dict(data_dir=trained.data_dir, size=trained.size, seed=args.seed, workers=workers,
                 download=not args.no_download, interpolation=trained.interpolation)
    _check_outliers(ood, trained)
    train = data.load(trained.dataset, "train", **where)
    # Without this a folder with other folders beside train/ would be taken for a set of classes.
    if name == "folder" and not data.has_split(trained.dataset, "test", data_dir=trained.data_dir):
        raise UserError(f"--dataset {trained.dataset} has no folder test/ with images in it")
    test = all_classes = data.load(trained.dataset, "test", **where)
    if trained.in_classes:
        train, test = (data.restrict(s, trained.in_classes) for s in (train, test))
    outliers = []
    for spec in ood:
        if spec == "rest":
            left = [c for c in range(len(all_classes.class_names)) if c not in trained.in_classes]
            if not left:
                raise UserError(f"--ood rest: --in-classes leaves no class of {name} out")
            outliers.append(replace(data.restrict(all_classes, left), name="rest"))
        else:
            outliers.append(data.load(spec, "test", **where))
    return train, test, outliers


def _check_outliers(ood, trained):
    """Stop if an outlier set is named twice or is the in-distribution one, however it is spelt."""
    def place(spec):
        name, path = data.parse_spec(spec)
        return name, (path or Path(trained.data_dir)).resolve() if name in data.WITH_PATH else None

    name, inside = place(trained.dataset)
    own = {(name, inside), *((name, inside / split) for split in ("train", "test") if inside)}
    seen = set()
    for spec in ood:
        if spec == "rest" and not trained.in_classes:
            raise UserError("--ood rest is what --in-classes leaves out; that was not given")
        where = "rest" if spec == "rest" else place(spec)
        if where in own:
            raise UserError(f"--ood {spec} is the in-distribution set itself; a set can't be its "
                            "own outlier (for classes of it: --in-classes and --ood rest)")
        if where in seen:
            raise UserError(f"--ood names {spec} twice")
        seen.add(where)


# --- the source of features -----------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkSource:
    """The features of an evaluation, computed by a network."""

    trained: Trained
    train: data.ImageSet
    test: data.ImageSet
    outliers: list  # of data.ImageSets
    settings: FeatureSettings  # of images without augmentation
    cache: FeatureCache | None

    @property
    def facts(self):
        """What every record says of the network and of the settings of its features."""
        said = ("sha256", "arch", "training_mode", "size", "normalize", "dataset", "in_classes")
        return {"checkpoint": self.trained.path,
                **utils.to_json_types({key: getattr(self.trained, key) for key in said}),
                "precision": self.settings.precision, "batch_size": self.settings.batch_size}

    @property
    def inputs(self):
        """What this was read from, as of storage.check_outputs."""
        sets = {"--dataset": [self.train, self.test], "--ood": self.outliers}
        return {"--ckpt": self.trained.path, **{
            flag: [data.place(images, self.trained.data_dir) for images in each]
            for flag, each in sets.items()}}

    def features(self, images, mode="base", copies=None):
        """Return the features of a data.ImageSet, float [N, D]; None on all but the main process.

        Raises: UserError, they are not finite: the network overflows.
        """
        settings = replace(self.settings, mode=mode, copies=copies)
        x = features.extract(self.trained.encoder, images, settings, self.cache)
        if not distributed.is_main_process():
            return None
        path, arch = self.trained.path, self.trained.arch
        network = f"--ckpt {path}" if path else f"--encoder {arch}"
        return detection.checked(x, f"{network}: the features of {images.name}")


def settings_of(trained, train=None, batch_size=None, **others):
    """Return the FeatureSettings of a Trained network, a batch_size of None being what is fast.

    Args: train: data.ImageSet to measure normalisation constants on, where nothing says them.
    """
    mean = std = None
    if trained.normalize:
        # The constants of training: a checkpoint of ours remembers them.
        mean, std = trained.constants or data.normalisation(trained.dataset, train)
    return FeatureSettings(
        trained.size, batch_size or features.default_batch_size(utils.device()),
        mean and tuple(mean), std and tuple(std), interpolation=trained.interpolation, **others)


def open_network(args):
    """Open the network and all image sets that the flags of add_arguments name: a NetworkSource.

    Raises: UserError: as open_trained, data.load and FeatureStore; a set that is named twice or is
        the in-distribution one; flags that exclude each other.
    """
    if args.cache_dir is not None and args.feature_store is not None:
        raise UserError("--cache-dir and --feature-store: one of them is enough, their files are "
                        "the same")
    if (args.ckpt is None) == (args.encoder is None):
        raise UserError(
            "expected --ckpt FILE, the trained network, or --encoder NAME"
            + (", not both" if args.ckpt else ", or of eval_ssd.py --features FILE.npz"))
    trained = open_trained(args)
    with distributed.main_process_first():  # which may have to download
        train, test, outliers = _load_images(trained, args)
    settings = settings_of(trained, train, args.batch_size, seed=args.seed,
                           precision=args.precision)
    cache = None
    if args.feature_store is not None:
        cache = FeatureStore(args.feature_store, trained.encoder)
    elif args.cache_dir is not None:
        cache = FeatureCache(args.cache_dir, trained.encoder)
    features.check_same_inputs(trained.encoder, [train, test, *outliers])
    return NetworkSource(trained, train, test, outliers, settings, cache)
