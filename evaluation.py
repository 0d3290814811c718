"""What the evaluations share: flags, checkpoint to network, image sets, a source of features.

    source = open_network(args.ckpt, args.ood, seed=args.seed, ...)
    source.train, source.test, source.outliers           # data.ImageSets
    x = source.features(source.test)                     # [N, D], computed or from the cache

eval_ssd.py and eval_ssdk.py differ in how they score. Features in a file are a source too
(report/exchange.py), with the same attributes.
"""

import argparse
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


def add_arguments(p, needs_network=True):
    """Add the flags of both evaluations to a utils.Parser; --ckpt is required or not."""
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

    add = p.add_argument_group(
        "network", "what a checkpoint of train.py knows of itself need not be said here"
    ).add_argument
    add("--ckpt", required=needs_network, metavar="FILE", help="the trained network")
    add("--training-mode", choices=list(trainers.TRAINING_MODES),
        help="how it was trained (default: the checkpoint's)")
    add("--arch", choices=list(models.ARCHITECTURES), help="default: checkpoint's, else resnet50")
    add("--classes", type=number(int, 1),
        help="outputs of a SupCE classifier (default: the checkpoint's)")

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
    add("--size", type=number(int, 8, 4096),
        help="side of images in pixels (default: the checkpoint's, else 32)")
    add("--normalize", action=argparse.BooleanOptionalAction, default=None,
        help="normalise colours with the in-distribution set's constants (default: the "
        "checkpoint's, else off)")
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
    constants: tuple | None  # (mean, std) that a checkpoint of ours holds
    path: str
    sha256: str  # hex digest of the checkpoint
    device: torch.device


# How a checkpoint that does not say so is taken to have been trained.
FOREIGN = {"training_mode": None, "arch": "resnet50", "dataset": "cifar10",
           "data_dir": "./datasets", "in_classes": None, "size": 32, "normalize": False}


def restore(path, device, given, classes=None):
    """Load a checkpoint into the network that it was saved from; returns Trained.

    Args:
        path: the checkpoint, of any dialect. device: where the network goes.
        given: dict of the keys of FOREIGN, None where the checkpoint or FOREIGN says it.
        classes: outputs of a SupCE classifier, None for the checkpoint's.

    Raises: UserError: a flag that contradicts the checkpoint, a network that does not fit it.
    """
    state, rest = checkpoints.load_checkpoint(path)
    known = rest.get("config")
    if not _is_ours(known):
        arch = rest.get("arch")  # all that the original's own checkpoints say
        known = {"arch": arch} if arch in list(models.ARCHITECTURES) else {}
        if given["normalize"] is None:
            utils.note(f"{path} does not say whether colours were normalised in training; taken as "
                       "not. The published networks need --normalize")
    modes = trainers.TRAINING_MODES
    for key, allowed in (("arch", models.ARCHITECTURES), ("training_mode", modes)):
        if key in known and known[key] not in allowed:
            raise UserError(f"--ckpt {path} was trained with --{key.replace('_', '-')} "
                            f"{known[key]}; known are {', '.join(allowed)}")
    settings = {}
    for key, foreign in FOREIGN.items():
        value = known.get(key, foreign)
        value = tuple(value) if isinstance(value, list) else value
        if key in known and key != "data_dir":
            _check_agreement(path, key, given[key], value)
        settings[key] = value if given[key] is None else given[key]
    if settings["training_mode"] is None:
        raise UserError(f"--training-mode is needed: the checkpoint {path} does not say how it was "
                        f"trained ({', '.join(modes)})")
    head = modes[settings["training_mode"]].head
    if head == "classifier" and "num_classes" in known:
        _check_agreement(path, "classes", classes, known["num_classes"])
    weight = state.get("head.weight")
    classes = classes or (len(weight) if weight is not None and weight.dim() == 2 else 10)
    network = models.build_model(settings["arch"], head, classes)
    try:
        models.restore(network, state)
    except ValueError as error:
        raise UserError(f"--ckpt {path} does not fit --arch {settings['arch']} --training-mode "
                        f"{settings['training_mode']} --classes {classes}: {error}") from None
    constants = (known["mean"], known["std"]) if settings["normalize"] and "mean" in known else None
    return Trained(network.encoder.to(device), constants=constants, path=str(path),
                   sha256=storage.file_hash(path), device=device, **settings)


def _is_ours(config):
    """Whether a checkpoint's "config" is one that train.py wrote."""
    kinds = {"training_mode": str, "arch": str, "dataset": str, "data_dir": str, "size": int,
             "normalize": bool, "in_classes": list | None, "num_classes": int,
             "mean": list | None, "std": list | None}
    return (
        isinstance(config, dict)
        and all(k in config and isinstance(config[k], kind) for k, kind in kinds.items())
        and all(config[k] is None or len(config[k]) == 3 for k in ("mean", "std"))
    )


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


def load_images(trained, ood, *, seed, download, workers=None):
    """Read all image sets of an evaluation: (train, test, list of outlier sets), data.ImageSets.

    Args: trained: Trained. ood: names of outlier sets, None for the default ones. seed, download:
        as for data.load. workers: also, or None for the set's own default.
    Raises: UserError, a set that is unknown, missing, named twice, or the in-distribution one.
    """
    name, _ = data.parse_spec(trained.dataset)
    ood = [o for o in DEFAULT_OOD if o != name] if ood is None else ood
    workers = data.default_workers(trained.dataset) if workers is None else workers
    where = dict(data_dir=trained.data_dir, size=trained.size, seed=seed, download=download,
                 workers=workers)
    _check_outliers(ood, trained)
    train = data.load(trained.dataset, "train", **where)
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
    own = {(name, inside)} | ({(name, inside / s) for s in ("train", "test")} if inside else set())
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
    def training_mode(self):
        """How the network was trained: a key of trainers.TRAINING_MODES."""
        return self.trained.training_mode

    @property
    def facts(self):
        """What every record says of the network and of the settings of its features."""
        said = ("sha256", "arch", "training_mode", "size", "normalize", "dataset", "in_classes")
        return {"checkpoint": self.trained.path,
                **utils.to_json_types({key: getattr(self.trained, key) for key in said}),
                "precision": self.settings.precision, "batch_size": self.settings.batch_size}

    def features(self, images, mode="base", copies=None):
        """Return the features of a data.ImageSet, float [N, D]; None on all but the main process.

        Args: mode, copies: of the augmentation, see FeatureSettings.
        Raises: UserError, they are not finite: the network overflows.
        """
        settings = replace(self.settings, mode=mode, copies=copies)
        x = features.get_features(self.trained.encoder, images, settings, self.cache)
        if not distributed.is_main_process():
            return None
        try:
            return detection.checked(x, f"the features of {images.name}")
        except detection.FeatureError as error:
            raise UserError(f"--ckpt {self.trained.path}: {error}") from None


def open_network(path, given, classes, ood, *, seed, download=True, workers=None, batch_size=None,
                 precision="fp32", cache_dir=None, feature_store=None):
    """Restore a network and read all image sets of its evaluation; returns a NetworkSource.

    Args:
        path, given, classes: as for `restore`. ood, download, workers: as for `load_images`.
        seed: of noise sets and augmentation. precision: see FeatureSettings.
        batch_size: images a pass, None for what is fast.
        cache_dir, feature_store: folder of a FeatureCache or FeatureStore, or None.
    Raises: UserError, as these; both folders, or a store that cannot be written to.
    """
    if cache_dir is not None and feature_store is not None:
        raise UserError("--cache-dir and --feature-store: one of them is enough, their files are "
                        "the same")
    trained = restore(path, utils.device(), given, classes)
    with distributed.main_process_first():  # which may have to download
        train, test, outliers = load_images(trained, ood, seed=seed, download=download,
                                            workers=workers)
    mean = std = None
    if trained.normalize:
        # The constants of training: a checkpoint of ours remembers them.
        mean, std = trained.constants or data.normalisation(trained.dataset, train)
    settings = FeatureSettings(
        trained.size, batch_size or features.default_batch_size(trained.device),
        mean and tuple(mean), std and tuple(std), seed=seed, precision=precision)
    cache = None
    if feature_store is not None:
        cache = FeatureStore(feature_store, trained.encoder)
    elif cache_dir is not None:
        cache = FeatureCache(cache_dir, trained.encoder)
    features.check_same_inputs(trained.encoder, [train, test, *outliers])
    return NetworkSource(trained, train, test, outliers, settings, cache)
