"""What the two evaluations share: flags, the trained network, the image sets, the reports.

eval_ssd.py and eval_ssdk.py differ in how they score; how a checkpoint becomes a network, which
images are looked at and how results are written is the same, and stands here.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import detection
import exchange
import features
import figures
import models
import utils
from utils import UserError, number

MODES = ("SimCLR", "SupCon", "SupCE")
SHEET = 20  # images on either end of a contact sheet
DEFAULT_OOD = ("cifar10", "cifar100", "svhn", "texture", "blobs")


# --- the command line -----------------------------------------------------------------------------


def add_arguments(p, needs_network=True):
    """Add the flags of both evaluations to a utils.Parser, grouped; --ckpt is required or not."""
    group = p.add_argument_group("run")
    group.add_argument("--exp-name", type=utils.experiment, default="temp_eval_ssd",
                       help="name of the result files")
    group.add_argument("--results-dir", "--results_dir", default="./eval_results",
                       help="where results are written")
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=12345,
                       help="of k-means, noise sets, known outliers and augmentation")
    group.add_argument("--again", action="store_true",
                       help="measure and record what is recorded already")
    group.add_argument("--scores", metavar="FILE.csv", help="write the score of every image")
    group.add_argument("--plot", action="store_true",
                       help="draw figures beside the results: score histograms, ROC and "
                       "precision-recall curves, the most and least outlying images")
    group.add_argument("--gpu", help="does nothing; CUDA_VISIBLE_DEVICES chooses the GPU")

    group = p.add_argument_group(
        "network", "what a checkpoint of train.py knows of itself need not be said here")
    group.add_argument("--ckpt", required=needs_network, metavar="FILE", help="the trained network")
    group.add_argument("--training-mode", choices=MODES,
                       help="how it was trained (default: the checkpoint's)")
    group.add_argument("--arch", choices=list(models.ARCHITECTURES),
                       help="default: the checkpoint's, else resnet50")
    group.add_argument("--classes", type=number(int, 1),
                       help="outputs of a SupCE classifier (default: the checkpoint's)")

    group = p.add_argument_group("images")
    group.add_argument("--dataset", metavar="SET",
                       help=f"in-distribution: {', '.join(data.TRAINABLE)}; folder:PATH and "
                       "npz:PATH say where (default: the checkpoint's, else cifar10)")
    group.add_argument("--data-dir",
                       help="where image sets are and are downloaded to; for folder and npz "
                       "without PATH, their place (default: the checkpoint's, else ./datasets)")
    group.add_argument("--no-download", action="store_true", help="never fetch a missing set")
    group.add_argument("--in-classes", type=utils.class_list, metavar="LIST",
                       help="in-distribution classes, as 0-5 or 0,3,7 (default: the checkpoint's)")
    group.add_argument("--ood", nargs="+", metavar="SET",
                       help=f"outlier sets: {', '.join(data.SETS)}, folder:PATH, npz:PATH, and "
                       "rest (the classes that --in-classes leaves out) (default: "
                       f"{' '.join(DEFAULT_OOD)}, less the in-distribution set)")
    group.add_argument("--size", type=number(int, 8, 4096),
                       help="side of images in pixels (default: the checkpoint's, else 32)")
    group.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None,
                       help="normalise colours with the in-distribution set's constants (default: "
                       "the checkpoint's, else off)")
    group.add_argument("--workers", type=number(int, 0, 1024), metavar="N",
                       help="images of folder, imagenet and texture that are decoded at a time, as "
                       "they are needed; 0 decodes all into memory first (default: 0; where "
                       "imagenet is in-distribution, the processor's cores, "
                       f"{data.MOST_WORKERS} at most)")
    group.add_argument("--data-mode", choices=["org", "base", "ssl"], default="base",
                       help="augmentation of the training images whose features are taken, none "
                       "in base; test images and outliers never have any")
    group.add_argument("--batch-size", type=number(int, 1),
                       help="images a pass (default: 256 on a GPU; on a CPU 32 for each thread, "
                       "256 at most)")
    group.add_argument("--precision", choices=features.PRECISIONS, default="fp32",
                       help="of the network; features and all that follows stay as they are")
    group.add_argument("--cache-dir", metavar="DIR",
                       help="keep features here and take them from here")
    group.add_argument("--feature-store", metavar="DIR",
                       help="the same, for features that do not fit into memory: they are written "
                       "as they are computed and read a piece at a time; files are never removed")


# --- the trained network --------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A network as it was trained, and what it was trained on.

    Attributes:
        encoder: module on the device, [B, 3, S, S] -> [B, D].
        training_mode, arch, dataset, data_dir, in_classes, size, normalize: as resolved from the
            flags and the checkpoint; in_classes is a tuple or None.
        constants: (mean, std) that a checkpoint of ours holds, else None.
        path: of the checkpoint. sha256: hex digest of the file.
        device: where the encoder is.
    """

    encoder: torch.nn.Module
    training_mode: str
    arch: str
    dataset: str
    data_dir: str
    in_classes: tuple | None
    size: int
    normalize: bool
    constants: tuple | None
    path: str
    sha256: str
    device: torch.device


FOREIGN = {"training_mode": None, "arch": "resnet50", "dataset": "cifar10",
           "data_dir": "./datasets", "in_classes": None, "size": 32, "normalize": False}


def restore(path, device, *, classes=None, **given):
    """Load a checkpoint into the network that it was saved from.

    Args:
        path: the checkpoint, of any dialect. device: where the network goes.
        classes: outputs of a SupCE classifier, None for the checkpoint's.
        given: training_mode, arch, dataset, data_dir, in_classes, size, normalize; None where the
            user said nothing. A checkpoint of ours fills these in; a foreign one gets FOREIGN.

    Returns:
        Trained.

    Raises:
        UserError: a flag that contradicts the checkpoint, a network that does not fit it.
    """
    state, rest = utils.load_checkpoint(path)
    known = rest.get("config")
    if not _is_ours(known):
        arch = rest.get("arch")  # all that the original's own checkpoints say
        known = {"arch": arch} if arch in list(models.ARCHITECTURES) else {}
        if given["normalize"] is None:
            utils.note(f"{path} does not say whether colours were normalised in training; taken as "
                       "not. The published networks need --normalize")
    for key, allowed in (("arch", models.ARCHITECTURES), ("training_mode", MODES)):
        if key in known and known[key] not in allowed:
            raise UserError(f"--ckpt {path} was trained with --{key.replace('_', '-')} "
                            f"{known[key]}; known are {', '.join(allowed)}")
    if known.get("training_mode") == "SupCE":
        _agree(path, "classes", classes, known.get("num_classes", classes))
    settings = {}
    for key, foreign in FOREIGN.items():
        value = known.get(key, foreign)
        value = tuple(value) if isinstance(value, list) else value
        if key in known and key != "data_dir":
            _agree(path, key, given[key], value)
        settings[key] = value if given[key] is None else given[key]
    if settings["training_mode"] is None:
        raise UserError(f"--training-mode is needed: the checkpoint {path} does not say how it was "
                        "trained (SimCLR, SupCon or SupCE)")
    head = state.get("head.weight")
    classes = classes or (len(head) if head is not None and head.dim() == 2 else 10)
    network = models.build_model(settings["arch"], settings["training_mode"], classes)
    try:
        models.restore(network, state)
    except ValueError as error:
        raise UserError(f"--ckpt {path} does not fit --arch {settings['arch']} --training-mode "
                        f"{settings['training_mode']} --classes {classes}: {error}") from None
    constants = (known["mean"], known["std"]) if settings["normalize"] and "mean" in known else None
    return Trained(network.encoder.to(device), constants=constants, path=str(path),
                   sha256=utils.file_hash(path), device=device, **settings)


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


def _agree(path, key, given, trained):
    """Stop if a flag contradicts the checkpoint; a set may have moved, so its name alone counts."""
    one, other = given, trained
    if key == "dataset" and given is not None:
        one, other = (str(spec).partition(":")[0] for spec in (given, trained))
    if given is not None and one != other:
        flag = f"--{key.replace('_', '-')}"
        raise UserError(f"{flag} {_shown(given)} contradicts the checkpoint {path}, which was "
                        f"trained with {flag} {_shown(trained)}")


def _shown(value):
    if value is None or isinstance(value, bool):
        return "on" if value else "off" if value is False else "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


# --- the image sets -------------------------------------------------------------------------------


def load_images(trained, ood, *, seed, download, workers=None):
    """Read all image sets of an evaluation, so that none is found missing after an hour.

    Args:
        trained: Trained. ood: names of outlier sets, None for the default ones.
        seed: of the noise sets. download: whether missing sets may be fetched.
        workers: as for data.load; None is what the in-distribution set asks for.

    Returns:
        (train, test, list of outlier sets): data.ImageSet each.

    Raises:
        UserError: a set that is unknown, missing, named twice, or the in-distribution one.
    """
    name, _ = data.parse_spec(trained.dataset)
    ood = [o for o in DEFAULT_OOD if o != name] if ood is None else ood
    workers = data.default_workers(trained.dataset) if workers is None else workers
    where = dict(data_dir=trained.data_dir, size=trained.size, seed=seed, download=download,
                 workers=workers)
    _check_outliers(ood, trained)
    train = data.load(trained.dataset, "train", **where)
    test = whole = data.load(trained.dataset, "test", **where)
    if trained.in_classes:
        train, test = (data.restrict(s, trained.in_classes) for s in (train, test))
    outliers = []
    for spec in ood:
        if spec == "rest":
            left = [c for c in range(len(whole.class_names)) if c not in trained.in_classes]
            if not left:
                raise UserError(f"--ood rest: --in-classes leaves no class of {name} out")
            outliers.append(data.rename(data.restrict(whole, left), "rest"))
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


def extraction(
    trained, train, *, batch_size, seed, precision="fp32", cache_dir=None, feature_store=None
):
    """Return the keyword arguments of features.take that all sets of an evaluation share.

    Args:
        trained: Trained. train: its training ImageSet, measured where constants are wanted that
            neither the checkpoint nor the table has.
        batch_size: images a pass, None for what is fast on the device.
        cache_dir, feature_store: folder of a features.Cache or features.Store, or None.

    Raises:
        UserError: both folders, or a store that cannot be written to.
    """
    if cache_dir is not None and feature_store is not None:
        raise UserError("--cache-dir and --feature-store: one of them is enough, their files are "
                        "the same")
    mean = std = None
    if trained.normalize:
        mean, std = trained.constants or data.normalisation(trained.dataset, train)
    return dict(
        size=trained.size, batch_size=batch_size or features.default_batch_size(trained.device),
        mean=mean, std=std, seed=seed, precision=precision,
        cache=_cache(trained, cache_dir, feature_store),
    )


def _cache(trained, cache_dir, feature_store):
    if feature_store is not None:
        return features.Store(feature_store, trained.encoder)
    return features.Cache(cache_dir, trained.encoder) if cache_dir is not None else None


def take_features(trained, images, **kwargs):
    """Return features.take of the encoder; they are finite.

    Raises:
        UserError: they are not: the network overflows.
    """
    x = features.take(trained.encoder, images, **kwargs)
    try:
        return detection.checked(x, f"the features of {images.name}")
    except detection.FeatureError as error:
        raise UserError(f"--ckpt {trained.path}: {error}") from None


def facts_of(trained, **more):
    """Return what every record says of its network and of the settings of its features."""
    return {
        "checkpoint": trained.path, "sha256": trained.sha256, "arch": trained.arch,
        "training_mode": trained.training_mode, "size": trained.size,
        "normalize": trained.normalize, "dataset": trained.dataset,
        "in_classes": trained.in_classes and list(trained.in_classes), **more,
    }


# --- the records ----------------------------------------------------------------------------------


def identity(facts):
    """Return what tells one evaluation of a pair of sets from another: a hex digest.

    It is of everything that is known before measuring: the checkpoint's content (not its place),
    the resolved options, the pixels and labels of all image sets, the versions. Of features from a
    file, their content counts.

    Args:
        facts: a record without its metrics and time.
    """
    places = ("checkpoint", "features")
    known = {key: value for key, value in facts.items() if key not in places}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def line_of(record):
    """Return the readable line of a record, of the form of the original's."""
    line = (f"In-data = {record['in']}, OOD = {record['ood']}, Clusters = {record['clusters']}, "
            f"FPR95 = {record['fpr95']}, AUROC = {record['auroc']}, AUPR = {record['aupr']}")
    return line.replace("\n", " ").replace("\r", " ")  # a path may hold them


def read_records(path):
    """Return the whole records of a file of JSON lines: dicts; what a crash cut is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                records += [record] if isinstance(record, dict) else []
    return records


class Records:
    """The two files of results, RESULTS/EXP_<kind>.jsonl and .txt: a record and a line each.

    The records are the truth; the lines are made from them, and lines that a crash kept from being
    written are added by the next program. Programs that write at once wait for each other; a line
    goes out in one write, and never joins one that a crash cut.

    Args:
        base: path of the files without suffix.
    """

    def __init__(self, base):
        self.path, self.text = Path(f"{base}.jsonl"), Path(f"{base}.txt")
        if self.path.exists():
            with self._locked():
                self._add_missing_lines()

    def read(self):
        """Return {identity: record}, the newest of each."""
        return {r["id"]: r for r in read_records(self.path) if "id" in r}

    def add(self, record, again):
        """Append a record and its line; without `again` only if its identity is new.

        Returns:
            whether it was appended.
        """
        with self._locked():
            if not again and record["id"] in self.read():
                return False
            utils.append_whole(self.path, json.dumps(record).encode() + b"\n", sync=True)
            self._add_missing_lines()
        return True

    @contextlib.contextmanager
    def _locked(self):
        # The file of records is its own lock: no other file is left behind.
        with open(self.path, "ab") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _add_missing_lines(self):
        measured = {"in", "ood", "clusters", "fpr95", "auroc", "aupr"}
        lines = [line_of(r) for r in read_records(self.path) if measured <= r.keys()]
        there = Counter()
        with contextlib.suppress(FileNotFoundError):
            there.update(self.text.read_bytes().split(b"\n"))
        for line in lines:
            there[_bytes(line)] -= 1
            if there[_bytes(line)] < 0:
                utils.append_whole(self.text, _bytes(line) + b"\n", sync=True)


def _bytes(line):
    return line.encode("utf-8", "surrogateescape")


# --- the reports ----------------------------------------------------------------------------------


class Report:
    """Write results as they come: lines, JSON records; scores and plots at the end.

    Args:
        results_dir, exp_name: RESULTS/EXP_<kind>.txt and .jsonl are appended to.
        kind: "ssd" or "ssdk".
        train: ImageSet or FeatureSet of the training images. seed: of the evaluation.
        common: dict that stands in every record, from `facts_of` or exchange.Content.
        scores: path of the CSV of all scores, or None.
        plot: whether to draw.
        again: record what is recorded already.

    Raises:
        UserError: a place that can't be written to.
    """

    def __init__(
        self, results_dir, exp_name, kind, *, train, seed, common, scores=None, plot=False,
        again=False,
    ):
        self.base = Path(results_dir) / f"{exp_name}_{kind}"
        utils.make_folder(self.base.parent, "--results-dir")
        if scores is not None:
            if Path(scores).is_dir():
                raise UserError(f"--scores {scores} is a folder; the name of a file is needed")
            utils.make_folder(Path(scores).parent, "--scores")
        self._scores, self._plot, self._again = scores, plot, again
        self._rows, self._panels, self._sweep = [], {}, {}
        self._pictures, self._names, self._fingerprints = {}, {}, {}
        self._common = {
            **common, "n_train": len(train), "seed": seed,
            "images": {"train": exchange.fingerprint(train)}, "versions": utils.versions(),
        }
        self.written = [f"{self.base}.txt", f"{self.base}.jsonl"]
        for path in self.written:
            try:
                if Path(path).exists():
                    open(path, "a").close()  # found out now, not after an hour
            except OSError as error:
                raise UserError(f"--results-dir: {path} cannot be written to: {error.strerror}"
                                ) from None
        self._records = Records(self.base)

    def todo(self, test, outliers, clusters, everything=False):
        """Find out what is not recorded yet; print the lines of what is.

        Args:
            test: data.ImageSet. outliers: list of them. clusters: numbers m.
            everything: leave nothing out, since scores of all sets are wanted.

        Returns:
            list of (outlier set, [m, ...]) to be measured: all with `again`, with `everything`,
            and for scores or plots; what is recorded is then not recorded twice.
        """
        pairs = [(ood, m) for ood in outliers for m in dict.fromkeys(clusters)]
        records = {} if self._again else self._records.read()
        found = [records.get(self._facts(test, *pair)["id"]) for pair in pairs]
        if any(found):
            utils.note(f"{len(found) - found.count(None)} of {len(pairs)} results stand in "
                       f"{self._records.path} already and are not recorded twice; --again does it")
        if everything or self._plot or self._scores is not None:
            found = [None] * len(pairs)
        left = {}
        for (ood, m), record in zip(pairs, found, strict=True):
            if record is None:
                left.setdefault(ood.name, (ood, []))[1].append(m)
            else:
                print(line_of(record), flush=True)
        return list(left.values())

    def _facts(self, test, ood, clusters):
        """All of a record that is known before measuring, with its identity."""
        for images in (test, ood):
            if images.name not in self._fingerprints:
                self._fingerprints[images.name] = exchange.fingerprint(images)
        images = {"in": self._fingerprints[test.name], "ood": self._fingerprints[ood.name]}
        facts = {"in": test.name, "ood": ood.name, "clusters": clusters, "n_in": len(test),
                 "n_ood": len(ood), **self._common, "images": self._common["images"] | images}
        return facts | {"id": identity(facts)}

    def add(
        self, test, test_scores, ood, ood_scores, *, clusters, panel, against="", **fields
    ):
        """Measure one pair of sets and write its line and record, unless they are there already.

        Args:
            test, ood: data.ImageSet. test_scores, ood_scores: float64 [N], [M].
            clusters: m. panel: title of the plot that the pair belongs to.
            against: the outlier set on which the scores rest, where they do (SSDk).
            fields: more for the record, found in measuring.

        Returns:
            dict of metrics.
        """
        measured = detection.metrics(test_scores, ood_scores)
        facts = self._facts(test, ood, clusters)
        first = {key: facts.pop(key) for key in ("in", "ood", "clusters")}
        record = {**first, **measured, **fields, **facts,
                  "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self._records.add(record, self._again)
        print(line_of(record), flush=True)
        _, _, shown = self._panels.setdefault(panel, (panel, test.name, {}))
        for images, values in ((test, test_scores), (ood, ood_scores)):
            if self._scores is not None and images.name not in shown:
                self._rows += _score_rows(images, values, clusters, against)
            shown[images.name] = values
            if images is ood or not against:
                self._sheet(images, values, panel.rpartition(", ")[2])
        self._sweep.setdefault(ood.name, []).append((clusters, measured["auroc"]))
        return measured

    def draw(self, name, function, *content):
        """Have `function(*content, path)` draw RESULTS/EXP_<kind>_<name>.png, if plots are wanted.

        Drawn by `close`.
        """
        if self._plot:
            self._pictures[name] = function, content

    def _sheet(self, images, scores, detector):
        """Keep the most and the least outlying images of a set for its contact sheet."""
        name = f"images_{exchange.plain_name(images.name, self._names)}"
        if not self._plot or images.pixels is None or name in self._pictures:
            return
        order = torch.from_numpy(scores).argsort(descending=True, stable=True)
        rows = []
        for end, index in (("most", order[:SHEET]), ("least", order.flip(0)[:SHEET])):
            title = f"{images.name}, the {end} outlying and their scores ({detector})"
            rows.append((title, data.pixels_at(images.pixels, index).cpu(), scores[index]))
        self.draw(name, figures.contact_sheet, rows)

    def close(self):
        """Write the scores and draw the plots; print where everything lies."""
        if self._scores is not None:
            with utils.whole_file(self._scores, "w", encoding="utf-8", newline="",
                                  errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(["set", "image", "label", "score", "clusters", "against"])
                writer.writerows(self._rows)
            self.written.append(str(self._scores))
        if self._plot:
            panels = list(self._panels.values())
            self.draw("histograms", figures.score_histograms, panels)
            self.draw("roc", figures.roc_curves, panels)
            self.draw("precision_recall", figures.precision_recall_curves, panels)
            if any(len(points) > 1 for points in self._sweep.values()):
                self.draw("clusters", figures.sweep, self._sweep, figures.SETTINGS["clusters"])
        for name, (function, content) in self._pictures.items():
            path = f"{self.base}_{name}.png"
            function(*content, path)
            self.written.append(path)
        print(f"written: {' '.join(self.written)}")


def _score_rows(images, scores, clusters, against):
    """CSV rows of one set in data order; the label is the class's name, empty without classes."""
    names = images.class_names
    return [
        (images.name, images.paths[i] if images.paths else i,
         names[label] if names else "", repr(float(score)), clusters, against)
        for i, (label, score) in enumerate(zip(images.labels.tolist(), scores, strict=True))
    ]
