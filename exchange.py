"""Features and scores in a file that any program can write and read: a plain .npz.

    np.savez("mine.npz", train=a, test=b, ood_svhn=c)       # features of any network, [N, D] each
    python eval_ssd.py --features mine.npz                  # scores them
    python eval_ssd.py --ckpt network.pth.tar --export theirs.npz

README, "Features from elsewhere", has the table of arrays. Nothing is pickled: reading a file never
runs code from it.
"""

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import detection
import utils
from utils import UserError

FORMAT = 1
MOST_CLASSES = utils.MOST_CLASSES
LABELS = "_labels"  # ends the name of an array of labels; what is before it is the features'
# What a record says of a network and its images, so that a record of the same features says it too
FACTS = ("checkpoint", "sha256", "arch", "training_mode", "size", "normalize", "dataset",
         "in_classes", "data_mode", "precision", "batch_size")
SETTINGS = {"in": str, "names": dict, "class_names": dict, "images": dict, "record": dict}


@dataclass(frozen=True)
class FeatureSet:
    """The features of one set of images; what the reports ask of a data.ImageSet, it has.

    Attributes:
        name: as it appears in logs and records.
        features: float [N, D], as the network gave them.
        labels: int64 [N]; all 0 where the images have no classes.
        class_names: by label; None where the images have no classes.
        fingerprint: of the images where the file says it, else of the features.
        pixels, paths: None: the images are not here.
    """

    name: str
    features: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...] | None = None
    fingerprint: str = ""
    pixels: None = None
    paths: None = None

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        train, test: FeatureSet. outliers: list of them.
        training_mode: "SimCLR", "SupCon", "SupCE", or None where the file does not say.
        facts: dict, what records say of the network and of this file.
    """

    train: FeatureSet
    test: FeatureSet
    outliers: list[FeatureSet]
    training_mode: str | None
    facts: dict


def fingerprint(images):
    """Return the sha256 (hex) of a data.ImageSet; of a FeatureSet what it says."""
    if images.pixels is None:
        return images.fingerprint
    return data.fingerprint(images.pixels, images.labels)


def plain_name(name, used):
    """Return a set's name in letters, digits, dots, hyphens and underscores.

    Args:
        name: of the set; of "KIND:PATH" the last part of the path counts.
        used: {plain name: name} of the sets so far; this one is added, no other gets the same.
    """
    kind, colon, path = name.partition(":")
    short = f"{kind}_{Path(path).name}" if colon else kind
    plain = re.sub(r"[^\w.-]+", "_", short, flags=re.ASCII)[:80]
    while plain.endswith(LABELS) or used.setdefault(plain, name) != name:
        plain += "_"
    return plain


# --- writing --------------------------------------------------------------------------------------


class Export:
    """Collect features and scores, and write them as one file at the end.

    Args:
        path: of the file, or None: then nothing is kept or written.

    Raises:
        UserError: a place that can't be written to.
    """

    def __init__(self, path):
        self._path, self._arrays, self._used = path, {}, {}
        self._settings = {"names": {}, "class_names": {}, "images": {}}
        if path is None:
            return
        if Path(path).is_dir():
            raise UserError(f"--export {path} is a folder; the name of a file is needed")
        utils.make_folder(Path(path).parent, "--export")

    def add(self, images, features, scores=None, key=None):
        """Keep the features and scores of a set.

        Args:
            images: data.ImageSet or FeatureSet of N images.
            features: float [N, D], a tensor on the CPU or features.Stored, which stays in its
                file.
            scores: {number of clusters: float64 [N]}.
            key: "train" or "test"; None for an outlier set.
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
        self._arrays |= {f"scores_m{m}_{key}": values for m, values in (scores or {}).items()}

    def close(self, inside, common):
        """Write the file.

        Args:
            inside: name of the in-distribution set. common: dict that stands in every record.

        Returns:
            list of str: the path, if one was wanted.
        """
        if self._path is None:
            return []
        record = {k: common.get(k) for k in FACTS}
        settings = json.dumps({"in": inside, **self._settings, "record": record})
        with utils.whole_file(self._path) as file:
            np.savez(file, format=np.int64(FORMAT), settings=np.array(settings), **self._arrays)
        return [str(self._path)]


# --- reading --------------------------------------------------------------------------------------


def read(path):
    """Read features that someone extracted, with whatever network.

    Args:
        path: of an .npz file, see the table of the README. Its scores, if it has any, are not read.

    Returns:
        Content.

    Raises:
        UserError: names the file and the array, what was found, and what is allowed.
    """
    arrays = _arrays(path)
    version = arrays.pop("format", np.int64(FORMAT))
    if version.shape != () or version.dtype.kind not in "iu" or version != FORMAT:
        raise UserError(f"--features {path}: its format is {version!s:.20}, not {FORMAT}")
    settings = _settings(path, arrays.pop("settings", None))
    keys = _feature_keys(path, list(arrays))
    names = _names(path, keys, settings)
    sets, width = [], None
    for key, name in zip(keys, names, strict=True):
        x = _features(path, key, arrays[key], width)
        width = x.shape[1]
        classes = settings.get("class_names", {}).get(key)
        labels, classes = _labels(path, key + LABELS, arrays.get(key + LABELS), len(x), classes)
        known = settings.get("images", {}).get(key) or data.fingerprint(x, labels)
        sets.append(FeatureSet(name, x, labels, classes, known))
    facts = {k: settings.get("record", {}).get(k) for k in FACTS}
    facts |= {"features": str(path), "features_sha256": utils.file_hash(path)}
    return Content(sets[0], sets[1], sets[2:], facts["training_mode"], facts)


def _feature_keys(path, found):
    """Names of the arrays of features: train, test, then the outlier sets in their order."""
    outside = [k for k in found if k.startswith("ood_") and not k.endswith(LABELS) and k != "ood_"]
    for key, there in (("train", "train" in found), ("test", "test" in found),
                       ("ood_NAME", outside)):
        if not there:
            raise UserError(f"--features {path} has no array '{key}', only "
                            f"{', '.join(found) or 'nothing'}")
    keys = ["train", "test", *outside]
    for key in found:
        if key.removesuffix(LABELS) not in keys:
            raise UserError(f"--features {path}: array '{key}' is not known; known are train, "
                            f"test and ood_NAME, each also with {LABELS}, format, settings, and "
                            "scores_..., which are not read")
    return keys


def _names(path, keys, settings):
    """Names of the sets under `keys`; only train and test, of one set, may have the same."""
    inside = settings.get("in", Path(path).stem)
    given = settings.get("names", {})
    names = [inside, inside, *(given.get(k, k.removeprefix("ood_")) for k in keys[2:])]
    for name in names[2:]:
        if names[1:].count(name) > 1:
            raise UserError(f"--features {path}: two of its sets are called '{name}'; its "
                            "settings can rename them ('in' and 'names')")
    return names


def _arrays(path):
    """{name: array} of the file, but for the scores."""
    if not Path(path).is_file():
        raise UserError(f"--features {path}: no such file")
    if not zipfile.is_zipfile(path):  # of a text file numpy would say that it is pickled
        raise UserError(f"--features {path} cannot be read as an .npz file: it is no zip "
                        "archive; np.savez makes one, np.save does not")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files if not k.startswith("scores_")}
    except MemoryError:
        raise
    except Exception as error:  # numpy, zipfile and zlib share no base of their errors
        raise UserError(f"--features {path} cannot be read as an .npz file: {error}") from None
    foreign = [k for k, v in arrays.items() if not isinstance(v, np.ndarray)]
    if foreign:
        raise UserError(f"--features {path}: '{foreign[0]}' in it is no array")
    return arrays


def _settings(path, array):
    """The content of the settings, which a file need not have."""
    if array is None:
        return {}
    try:
        if array.dtype.kind != "U" or array.shape != ():
            raise ValueError(f"{array.dtype} {list(array.shape)}")
        settings = json.loads(str(array))
    except ValueError as error:
        raise UserError(f"--features {path}: its settings are no JSON text: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--features {path}: its settings are no JSON object: {settings!r:.60}")
    for key, value in settings.items():
        if not isinstance(value, SETTINGS.get(key, ())):
            known = ", ".join(f"{k} ({kind.__name__})" for k, kind in SETTINGS.items())
            raise UserError(f"--features {path}: its settings have {key} = {value!r:.40}; known "
                            f"are {known}")
    for kind in ("names", "images"):
        for key, value in settings.get(kind, {}).items():
            if not isinstance(value, str):
                raise UserError(f"--features {path}: {kind} of its settings has {key} = "
                                f"{value!r:.40}; a text is needed")
    return settings


def _features(path, key, array, width):
    """A checked array of features, as a tensor [N, width]."""
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise UserError(f"--features {path}: {key} is {array.dtype}; float16, float32 or float64 "
                        "is needed")
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    try:
        return detection.checked(native, f"its {key} features", width)
    except detection.FeatureError as error:
        raise UserError(f"--features {path}: {error}") from None


def _labels(path, key, array, n, names):
    """(int64 [n], class names or None) of an array of labels, which a set need not have."""
    if array is None:
        return torch.zeros(n, dtype=torch.int64), None
    if array.dtype.kind not in "iu" or array.shape != (n,):
        raise UserError(f"--features {path}: {key} is {array.dtype} {list(array.shape)}; one whole "
                        f"number for each of the {n} rows of features is needed")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= MOST_CLASSES:
        raise UserError(f"--features {path}: {key} goes from {low} to {high}; classes are "
                        f"0-{MOST_CLASSES - 1}")
    if names is None:
        names = [str(c) for c in range(high + 1)]
    if not isinstance(names, list) or len(names) <= high or any(type(n) is not str for n in names):
        raise UserError(f"--features {path}: its settings must name the {high + 1} classes of "
                        f"{key}, found {names!r:.60}")
    return torch.from_numpy(array.astype(np.int64)), tuple(names)
