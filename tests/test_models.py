"""The networks are the original's: names, shapes, outputs."""

import math
import zlib

import numpy as np
import pytest
import torch

import models


def fill_by_name(state):
    """Give every tensor of a state dict the values that its name alone decides (see golden)."""
    filled = {}
    for name, value in state.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        shape = tuple(value.shape)
        if name.endswith("num_batches_tracked"):
            drawn = np.zeros(shape)
        elif name.endswith("running_var"):
            drawn = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            drawn = rng.normal(0, 0.1, shape)
        elif len(shape) == 1 and name.endswith("weight"):
            drawn = rng.uniform(0.5, 1, shape)
        elif len(shape) == 1:
            drawn = rng.normal(0, 0.1, shape)
        else:
            drawn = rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
        filled[name] = torch.from_numpy(np.asarray(drawn)).to(value.dtype)
    return filled


HEAD = {"SSL": "projection", "Sup": "classifier"}


@pytest.mark.parametrize("kind", HEAD)
@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_parameter_names_and_shapes_are_those_of_the_original(golden, arch, kind):
    with torch.device("meta"):  # no value is needed
        network = models.build_model(arch, HEAD[kind])
    shapes = {k: list(v.shape) for k, v in network.state_dict().items()}
    assert shapes == golden("state_dict_shapes.json")[f"{arch}_{kind}"]


@pytest.mark.parametrize("kind", HEAD)
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_outputs_are_those_of_the_original_for_the_same_weights(golden, arch, kind):
    expected = golden("forward.npz")
    network = models.build_model(arch, HEAD[kind]).eval()
    models.restore(network, fill_by_name(network.state_dict()))
    images = torch.from_numpy(expected["images"])
    with torch.no_grad():
        for part, out in (("encoder", network.encoder(images)), ("output", network(images))):
            torch.testing.assert_close(
                out, torch.from_numpy(expected[f"{arch}_{kind}_{part}"]), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("block", [models.BasicBlock, models.Bottleneck])
def test_encoders_take_images_of_any_size_from_8(block):
    encoder = models.ResNet(block, (1, 1, 1, 1))
    with torch.no_grad():
        for size in (8, 9, 12, 33, 64):
            assert encoder(torch.zeros(2, 3, size, size)).shape == (2, encoder.width)


def test_the_projection_head_gives_rows_of_length_one():
    network = models.build_model("resnet18", "projection")
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x).norm(dim=1), torch.ones(3))


def test_weights_are_a_function_of_the_generator_and_of_nothing_else():
    def build(seed, world):
        torch.manual_seed(world)
        generator = torch.Generator().manual_seed(seed)
        return models.build_model("resnet18", "classifier", 7, generator).state_dict()

    first, same, other = build(1, 10), build(1, 20), build(2, 10)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_fresh_weights_have_the_spread_of_the_original():
    generator = torch.Generator().manual_seed(0)
    weights = models.build_model("resnet18", "projection", generator=generator).state_dict()
    fan_out = 512 * 9  # twice its fan-in
    spread = weights["encoder.layer4.0.conv1.weight"].std().item()
    assert spread == pytest.approx(math.sqrt(2 / fan_out), rel=0.01)
    assert weights["head.0.weight"].abs().max().item() == pytest.approx(512**-0.5, rel=1e-3)
    assert weights["head.0.weight"].std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.01)
    assert (weights["encoder.bn1.weight"] == 1).all()
    assert (weights["encoder.bn1.bias"] == 0).all()


def test_weights_that_do_not_fit_name_the_first_keys_and_change_nothing():
    network = models.build_model("resnet18", "projection")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    other = models.build_model("resnet18", "classifier", 4).state_dict()
    with pytest.raises(ValueError, match=r"missing: head\.0\.weight.*unknown: head\.weight"):
        models.restore(network, other)
    wide = models.build_model("resnet18", "classifier", 5)
    with pytest.raises(ValueError, match=r"head\.weight is \[4, 512\], not \[5, 512\]"):
        models.restore(wide, other)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
