"""A detector of odd pictures in a file: encoder, fitted score, calibration, pictures to compare.

    PictureDetector(encoder, "crossval", fitted, calibration, names, units).save("detector.ssd")
    PictureDetector.load("detector.ssd").score(paths, work)

The file holds tensors and plain types only, so that reading it runs no code of it, and needs
neither the good pictures nor the package that the encoder's weights came in.
"""

import argparse
from dataclasses import dataclass, fields, is_dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import detection
import features
import models
import utils
from features import FeatureSettings, FeatureStore
from infra import checkpoints, image_files, storage
from utils import UserError

FORMAT = 1
COMPARED = 10_000  # good pictures that are kept, to show what a picture is like
SETTINGS = ("size", "mean", "std", "interpolation")  # of features.FeatureSettings, in the file
THREADS = 4  # pictures decoded at a time, while the network computes
TYPES = {cls.__name__: cls for cls in (
    detection.Standardizer, detection.Gaussian, *detection.SCORES.values())}


class Encoder(NamedTuple):
    """A network that makes features of pictures, and how it wants them."""

    name: str  # key of models.ARCHITECTURES, or see models.ENCODERS
    network: torch.nn.Module  # [B, 3, S, S] -> [B, D]
    settings: FeatureSettings

    def features(self, paths, name, work):
        """Compute the features of pictures.

        Args: name: of the pictures, in progress bars. work: folder for the features.
        Returns: paths of those that can be read, their features (float32 [n, D], on disk), and
            {path: UserError} of the others.
        """
        failed = {}
        pixels = image_files.ImageFiles(
            "", paths, self.settings.size, THREADS, upright=True,
            interpolation=self.settings.interpolation, failed=failed)
        images = data.ImageSet(name, pixels, torch.zeros(len(paths), dtype=torch.int64))
        x = features.extract(self.network, images, self.settings, FeatureStore(work, self.network))
        read = [i for i, path in enumerate(paths) if path not in failed]
        rows = detection.select(x, torch.tensor(read, dtype=torch.int64))
        return [paths[i] for i in read], rows, failed


@dataclass(frozen=True)
class PictureDetector:
    """A score fitted to the features of good pictures, which decides by others of them."""

    encoder: Encoder
    score: str  # key of detection.SCORES
    detector: detection.Detector
    calibration: np.ndarray  # float64 [n], scores of good pictures outside the fit; may be empty
    names: list  # of good pictures, for a page to show those that are like an odd one
    units: torch.Tensor  # float16 [len(names), D], their features, of unit length

    @classmethod
    def of(cls, encoder, score, detector, calibration, paths, x):
        """Make one that keeps the features x [N, D] of good pictures, of COMPARED at most."""
        index = torch.arange(0, len(paths), -(-len(paths) // COMPARED))
        units = torch.cat([F.normalize(x[rows].float()).half() for rows in index.split(1024)])
        return cls(encoder, score, detector, calibration, [paths[i] for i in index.tolist()], units)

    def save(self, path):
        """Write all of it to a file, whole or not at all."""
        network, settings = self.encoder.network, self.encoder.settings
        content = {
            "format": FORMAT, "encoder": self.encoder.name,
            "crop": int(getattr(network, "crop", settings.size)),
            "settings": {key: getattr(settings, key) for key in SETTINGS},
            "weights": network.state_dict(), "score": self.score, "detector": _pack(self.detector),
            "calibration": torch.from_numpy(self.calibration), "names": self.names,
            "units": self.units}
        with storage.atomic_write(path) as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path, device):
        """Read what `save` wrote, onto a device; a UserError says why a file can't be one."""
        content = checkpoints.read_checkpoint(path, "--detector ")
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise UserError(f"--detector {path}: expected format {FORMAT}, found {found!r:.20}")
        try:
            return cls._of(content, device)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError,
                argparse.ArgumentTypeError, UserError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"--detector {path} is damaged: {reason:.200}") from None

    @classmethod
    def _of(cls, content, device):
        given, name = {key: content["settings"][key] for key in SETTINGS}, content["encoder"]
        given["size"] = size = utils.number(int, 8, 4096)(given["size"])
        settings = FeatureSettings(batch_size=features.default_batch_size(device), **given)
        if name in models.ARCHITECTURES:
            network = models.ARCHITECTURES[name]()
        else:
            crop = utils.number(int, 8, size)(content["crop"])
            network = models.Pretrained(name, size, crop, settings.mean, settings.std,
                                        settings.interpolation)
        network.load_state_dict(content["weights"])
        network.to(device).eval().requires_grad_(False)
        detector = _unpack(content["detector"], device)
        calibration = content["calibration"].double().sort().values.numpy()
        names, units = list(content["names"]), content["units"]
        if len(names) != len(units) or not all(isinstance(name, str) for name in names):
            raise ValueError("names and features of good pictures differ in number")
        if type(detector) is not detection.SCORES[content["score"]]:
            raise ValueError(f"it has no {content['score']}")
        # A picture must go through all of it: widths agree, and constants are numbers.
        x = features.extract(network, data.ImageSet(
            "test", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1)), settings)
        detector.score(x)
        (x.half() @ units.T).shape  # noqa: B018
        return cls(Encoder(name, network, settings), content["score"], detector, calibration,
                   names, units)

    def nearest(self, x, n, leave_out):
        """Find the good pictures whose features are most like those of others, float [M, D].

        Args: leave_out: for each row the name that is not meant, as of the picture itself.
        Returns: a list of up to n names for each row, the nearest first.
        """
        cosine = F.normalize(x.float()) @ self.units.T.float()
        order = cosine.topk(min(n + 1, len(self.names)), dim=1).indices
        return [[self.names[i] for i in row if self.names[i] != own][:n]
                for row, own in zip(order.tolist(), leave_out, strict=True)]


def _pack(value):
    """A dataclass of TYPES as dicts and lists of tensors and plain types."""
    if is_dataclass(value):
        return {"type": type(value).__name__,
                **{f.name: _pack(getattr(value, f.name)) for f in fields(value)}}
    return [_pack(v) for v in value] if isinstance(value, tuple) else value


def _unpack(value, device):
    """What _pack was given, its tensors on a device."""
    if isinstance(value, dict):
        return TYPES[value["type"]](
            **{k: _unpack(v, device) for k, v in value.items() if k != "type"})
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(_unpack(v, device) for v in value) if isinstance(value, list) else value
