"""Features and scores in a file that any program can write and read: a plain .npz.

    np.savez("mine.npz", train=a, test=b, ood_svhn=c)       # features of any network, [N, D] each
    python eval_ssd.py --features mine.npz                  # scores them
    python eval_ssd.py --ckpt network.pth.tar --export theirs.npz

docs/features.md has the table of arrays. Nothing is pickled: reading never runs code of a file.
"""

import json
import re
import reprlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import detection
import trainers
import utils
from infra import storage
from utils import UserError

FORMAT = 1
LABELS = "_labels"  # ends the name of an array of labels; what is before it is the features'
# What a file says of a network and its images, so that the records of its features say it too
FACTS = ("checkpoint", "sha256", "arch", "training_mode", "size", "normalize", "dataset",
         "in_classes", "data_mode", "precision", "batch_size")
SETTINGS = {"in": str, "names": dict, "class_names": dict, "images": dict, "record": dict}


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images, with what reports ask of a data.ImageSet."""

    name: str
    features: torch.Tensor  # float [N, D], as the network gave them
    labels: torch.Tensor  # int64 [N], without classes all 0
    class_names: tuple[str, ...] | None = None
    fingerprint: str = ""  # of the images where the file says it, else of the features
    pixels: None = None  # the images are not here
    paths: None = None

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class FileSource:
    """The features in a file, with the attributes of an evaluation.NetworkSource."""

    train: FeatureSet
    test: FeatureSet
    outliers: list[FeatureSet]
    facts: dict  # what every record says of the network and of this file
    inputs: dict  # what this was read from, as of storage.check_outputs

    def features(self, images, mode="base", copies=None):
        """Return the features of a set as they are in the file: float [N, D]."""
        return images.features


def fingerprint(images):
    """Return the sha256 (hex) of a data.ImageSet; of a FeatureSet what it says."""
    known = isinstance(images, FeatureSet)
    return images.fingerprint if known else data.fingerprint(images.pixels, images.labels)


def plain_name(name, used):
    """Return a set's name in letters, digits and ._-; unique, and added to used, {plain: name}.

    Of "KIND:PATH" the last part of the path counts.
    """
    kind, colon, path = name.partition(":")
    short = f"{kind}_{Path(path).name}" if colon else kind
    plain = re.sub(r"[^\w.-]+", "_", short, flags=re.ASCII)[:80]
    while plain.endswith(LABELS) or used.setdefault(plain, name) != name:
        plain += "_"
    return plain


class Export:
    """Collect features and scores and write them as one file; with the path None, do nothing."""

    def __init__(self, path):
        self._path, self._arrays, self._used = path, {}, {}
        self._settings = {"names": {}, "class_names": {}, "images": {}}

    def add(self, images, features, scores=None, key=None):
        """Keep the features and scores of a data.ImageSet or FeatureSet.

        Args: features: float [N, D], a tensor on the CPU or features.DiskFeatures, left on disk.
            scores: {Choice: float64 [N]}. key: "train", "test" or, for an outlier set, None.
        """
        if self._path is None:
            return
        if key is None:
            key = f"ood_{plain_name(images.name, self._used)}"
            self._settings["names"][key] = images.name
        self._arrays[key] = features.numpy()
        self._settings["images"][key] = fingerprint(images)
        if images.class_names is not None:
            self._arrays[key + LABELS] = images.labels.cpu().numpy()
            self._settings["class_names"][key] = list(images.class_names)
        for choice, values in (scores or {}).items():  # scores_m1_KEY, scores_knn_k50_KEY
            which = str(choice).replace(", ", "_").replace(" = ", "").removeprefix("ssd_")
            self._arrays[f"scores_{which}_{key}"] = values

    def close(self, inside, facts):
        """Write the file, with in-distribution name and facts; return [its path] or []."""
        if self._path is None:
            return []
        settings = json.dumps({"in": inside, **self._settings,
                               "record": {k: facts.get(k) for k in FACTS}})
        with storage.atomic_write(self._path) as file:
            np.savez(file, format=np.int64(FORMAT), settings=np.array(settings), **self._arrays)
        return [str(self._path)]


def read(path, training_mode=None):
    """Return the FileSource of features that someone extracted, with whatever network.

    Args: path: of an .npz file; scores in it are not read. training_mode: where the user says it.
    Raises: UserError: names the file and the array, what was found, and what is allowed.
    """
    try:
        arrays = _arrays(path)
        settings, sets = _settings(arrays), []
        for key, name in _set_names(arrays, settings, Path(path).stem).items():
            x = _features(key, arrays[key], sets[0].features.shape[1] if sets else None)
            labels, classes = _labels(key + LABELS, arrays.get(key + LABELS), len(x),
                                      settings["class_names"].get(key))
            known = settings["images"].get(key) or data.fingerprint(x, labels)
            sets.append(FeatureSet(name, x, labels, classes, known))
        mode = settings["record"].get("training_mode")
        allowed = list(trainers.TRAINING_MODES) if training_mode is None else [training_mode]
        if mode is not None and mode not in allowed:
            by = "known are" if training_mode is None else "--training-mode is"
            raise UserError(f"its settings have training_mode {mode}; {by} {', '.join(allowed)}")
    except UserError as error:
        raise UserError(f"--features {path}: {error}") from None
    facts = {k: settings["record"].get(k) for k in FACTS}
    facts |= {"training_mode": mode or training_mode, "features": str(path),
              "features_sha256": storage.file_hash(path)}
    return FileSource(sets[0], sets[1], sets[2:], facts, {"--features": facts["features"]})


def _arrays(path):
    """{name: array} of the file, but for the scores."""
    if not Path(path).is_file():
        raise UserError("no such file")
    if not zipfile.is_zipfile(path):  # of a text file numpy would say that it is pickled
        raise UserError("cannot be read as an .npz file: it is no zip archive; np.savez makes one, "
                        "np.save does not")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: np.asarray(file[k]) for k in file.files if not k.startswith("scores_")}
    except Exception as error:  # numpy, zipfile and zlib share no base; MemoryError says the shape
        raise UserError(f"cannot be read as an .npz file: {error}") from None


def _settings(arrays):
    """Take format and settings, which a file need not have, out of the arrays; return settings."""
    version = arrays.pop("format", np.int64(FORMAT))
    if version.shape != () or version.dtype.kind not in "iu" or version != FORMAT:
        raise UserError(f"its format is {version!s:.20}, not {FORMAT}")
    try:
        settings = json.loads(str(arrays.pop("settings", "{}")))
        # Names and classes go to files and streams, which take no surrogates but those of paths.
        json.dumps(settings, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except (ValueError, RecursionError) as error:
        raise UserError(f"its settings are no JSON text: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"its settings are no JSON object: {reprlib.repr(settings)}")
    for key, value in settings.items():
        if not isinstance(value, SETTINGS.get(key, ())):
            known = ", ".join(f"{k} ({kind.__name__})" for k, kind in SETTINGS.items())
            raise UserError(f"its settings have {key} = {reprlib.repr(value)}; known are {known}")
        for name, text in value.items() if key in ("names", "images") else ():
            if not isinstance(text, str):
                raise UserError(f"{key} of its settings has {name} = {text!r:.40}; expected text")
    return {key: settings.get(key, kind()) for key, kind in SETTINGS.items()}


def _set_names(arrays, settings, default):
    """{array: name of its set} of the features: train, test, then the outlier sets in order."""
    names = dict.fromkeys(("train", "test"), settings["in"] or default)
    names |= {k: settings["names"].get(k, k.removeprefix("ood_")) for k in arrays
              if k.startswith("ood_") and not k.endswith(LABELS) and k != "ood_"}
    for key in ("train", "test", *(["ood_NAME"] if len(names) == 2 else [])):
        if key not in arrays:
            raise UserError(f"has no array '{key}', only {', '.join(arrays) or 'nothing'}")
    for key in arrays:
        if key.removesuffix(LABELS) not in names:
            raise UserError(f"array '{key}' is not known; known are train, test and ood_NAME, each "
                            f"also with {LABELS}, format, settings and scores_... (not read)")
    _, *shown = names.values()  # train and test are one set
    for name in shown:
        if shown.count(name) > 1:
            raise UserError(f"two of its sets are called '{name}'; its settings can rename them "
                            "('in' and 'names')")
    return names


def _features(key, array, width):
    """A checked array of features, as a tensor [N, width]."""
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise UserError(f"{key} is {array.dtype}; expected float16, float32 or float64")
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return detection.checked(native, f"its {key} features", width)


def _labels(key, array, n, names):
    """(int64 [n], class names or None) of an array of labels, which a set need not have."""
    if array is None:
        return torch.zeros(n, dtype=torch.int64), None
    if array.dtype.kind not in "iu" or array.shape != (n,):
        raise UserError(f"{key} is {array.dtype} {list(array.shape)}; expected an integer for each "
                        f"of the {n} rows of features")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= utils.MAX_CLASSES:
        raise UserError(f"{key} goes from {low} to {high}; classes are 0-{utils.MAX_CLASSES - 1}")
    names = [str(c) for c in range(high + 1)] if names is None else names
    if not isinstance(names, list) or len(names) <= high or any(type(n) is not str for n in names):
        raise UserError(f"its settings must name the {high + 1} classes of {key}, found "
                        f"{reprlib.repr(names)}")
    return torch.from_numpy(array.astype(np.int64)), tuple(names)
