"""augment.py against torchvision: operations image by image, sampled parameters in distribution.

    pytest tests/test_augment.py -rP     # -rP shows the distance from 8-bit PIL

The reference is torchvision's functional operations, called once per image on float tensors
(antialias on) with the parameters that augment.py sampled; those are compared with get_params.
"""

import functools
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from tiny import sample_org, sample_ssl
from torchvision import transforms

import augment

TOLERANCE = 1e-4  # on the [0, 1] scale
MEAN, STD = (0.491, 0.482, 0.447), (0.202, 0.199, 0.201)
SAMPLES = 4000
P_MIN = 1e-3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads take longer to meet than these tensors to compute: three times faster with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, height, width, seed=0):
    return torch.rand(n, 3, height, width, generator=generator(seed))


def random_bytes(n, height, width, seed=0):
    return torch.randint(
        256, (n, 3, height, width), generator=generator(seed), dtype=torch.uint8
    )


def smooth_bytes(n, side, seed=0):
    """Images whose detail is as large as a photograph's: random colours, four to a side, blurred.

    What JPEG or a lens leaves of noise; 8-bit rounding hits it as it hits a real picture.
    """
    coarse = F.resize(random_images(n, 4, 4, seed), [side, side], antialias=True)
    return (coarse.mul(0.9).add(0.1 * random_images(n, side, side, seed + 1)) * 255).byte()


def close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# --- colour ---------------------------------------------------------------------------------------

REFERENCE = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
NAMES = ("brightness", "contrast", "saturation", "hue")


def painted(*colour):
    return torch.tensor(colour).view(3, 1, 1).expand(3, 4, 4).contiguous()


def operated(index, x, factors):
    """augment.py's operation of that index on images [B, 3, H, W], by a factor each."""
    if index == augment.HUE:
        return augment.adjust_hue(x, factors)
    every = torch.ones(len(x), dtype=torch.bool)
    kind = torch.full((len(x),), index)
    return augment.blend(x.clone(), *augment.blending(kind, factors, every))


PICTURES = {
    "random": random_images(1, 8, 8)[0],
    "another random": random_images(1, 5, 7, seed=1)[0],
    "random primaries": random_images(1, 8, 8, seed=2)[0].round(),
    "almost grey": 0.5 + 1e-3 * random_images(1, 8, 8, seed=3)[0],
    "grey levels": random_images(1, 8, 8, seed=4)[:, :1].expand(-1, 3, -1, -1)[0].contiguous(),
    "black": painted(0.0, 0.0, 0.0),
    "white": painted(1.0, 1.0, 1.0),
    "grey": painted(0.5, 0.5, 0.5),
    "red": painted(1.0, 0.0, 0.0),
    "green": painted(0.0, 1.0, 0.0),
    "blue": painted(0.0, 0.0, 1.0),
    "yellow": painted(1.0, 1.0, 0.0),
    "cyan": painted(0.0, 1.0, 1.0),
    "magenta": painted(1.0, 0.0, 1.0),
    "red and green equal, above blue": painted(0.7, 0.7, 0.2),
    "red and green equal, below blue": painted(0.2, 0.2, 0.7),
    "green and blue equal, above red": painted(0.3, 0.9, 0.9),
    "green and blue equal, below red": painted(0.9, 0.3, 0.3),
    "red and blue equal, above green": painted(0.6, 0.1, 0.6),
    "red and blue equal, below green": painted(0.1, 0.6, 0.1),
}


@pytest.mark.parametrize("index", range(4), ids=NAMES)
def test_a_colour_operation_equals_torchvisions_at_every_factor(index):
    factors = torch.linspace(-0.5, 0.5, 21) if NAMES[index] == "hue" else torch.linspace(0, 2, 21)
    for picture, x in PICTURES.items():
        found = operated(index, x.expand(len(factors), -1, -1, -1), factors)
        expected = torch.stack([REFERENCE[index](x, f.item()) for f in factors])
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE,
                                   msg=lambda text, picture=picture: f"{picture}: {text}")


@pytest.mark.parametrize("index", range(4), ids=NAMES)
def test_a_colour_operation_treats_every_image_by_its_own_factor(index):
    x = random_images(6, 8, 8)
    factors = torch.rand(6, generator=generator()) - 0.5 + (NAMES[index] != "hue")
    expected = [REFERENCE[index](*case) for case in zip(x, factors.tolist(), strict=True)]
    close(operated(index, x, factors), torch.stack(expected))


def test_blends_of_three_kinds_share_a_batch_and_images_that_are_not_due_pass_bit_by_bit():
    x = random_images(6, 8, 8) * (1 + 2**-23)  # a resampled 1 may be more by a rounding
    x[5] = 1 + 2**-23
    kind = torch.tensor([0, 1, 2, 0, 1, 2])
    due = torch.tensor([True, True, True, False, False, False])
    factors = torch.full((6,), 1.3)
    found = augment.blend(x.clone(), *augment.blending(kind, factors, due))
    close(found[:3], torch.stack([REFERENCE[i](x[i], 1.3) for i in range(3)]))
    assert torch.equal(found[3:], x[3:])


def test_turning_the_hue_leaves_its_input_as_it_was():
    x = random_images(6, 8, 8)
    before = x.clone()
    augment.adjust_hue(x, torch.full((6,), 0.1))
    assert torch.equal(x, before)


@pytest.mark.parametrize("index", range(4), ids=NAMES)
def test_the_neutral_factor_of_a_colour_operation_changes_nothing(index):
    x = random_images(2, 8, 8)
    neutral = torch.full((2,), 0.0 if NAMES[index] == "hue" else 1.0)
    close(operated(index, x, neutral), x, tolerance=1e-6)


def test_grey_is_the_weighted_sum_of_the_channels_that_torchvision_takes():
    x = random_images(3, 6, 5)
    assert augment.luma(x).shape == (3, 1, 6, 5)
    close(augment.luma(x), F.rgb_to_grayscale(x, num_output_channels=1), tolerance=1e-6)


def jittered(image, order, factor):
    for index in order.tolist():
        image = REFERENCE[index](image, factor[index].item())
    return image


ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def test_colour_jitter_takes_each_image_through_its_own_one_of_the_24_orders():
    x = random_images(24, 8, 8)
    factor = sample_ssl(24, 8, 8, generator(5)).factor
    expected = torch.stack([jittered(*case) for case in zip(x, ORDERS, factor, strict=True)])
    every = torch.ones(24, dtype=torch.bool)
    close(augment.color_jitter(x.clone(), every, ORDERS, factor), expected)


def test_colour_jitter_hands_images_without_jitter_back_bit_by_bit():
    x = random_images(24, 8, 8)
    chosen = torch.arange(24) % 3 != 0
    factor = sample_ssl(24, 8, 8, generator(6)).factor
    found = augment.color_jitter(x.clone(), chosen, ORDERS, factor)
    assert torch.equal(found[~chosen], x[~chosen])
    cases = zip(x[chosen], ORDERS[chosen], factor[chosen], strict=True)
    close(found[chosen], torch.stack([jittered(*case) for case in cases]))


def test_colour_jitter_of_no_image_at_all_is_the_batch_itself():
    x = random_images(4, 8, 8)
    none = torch.zeros(4, dtype=torch.bool)
    assert torch.equal(augment.color_jitter(x.clone(), none, ORDERS[:4], torch.ones(4, 4)), x)


# --- crop, resize, flip ---------------------------------------------------------------------------

SOURCES = {  # height, width, size
    "32 to 32": (32, 32, 32),
    "96 to 32": (96, 96, 32),
    "8 to 8": (8, 8, 8),
    "40 x 28 to 32": (40, 28, 32),
    "28 x 40 to 32": (28, 40, 32),
    "8 to 32": (8, 8, 32),
    "33 to 7": (33, 33, 7),
    "1 to 8": (1, 1, 8),
}


def boxes(kind, height, width, n=12):
    """Crops int64 [n, 4]: top, left, height, width."""
    g = generator(height * 1000 + width)
    if kind == "whole":
        return torch.tensor([[0, 0, height, width]])
    if kind == "drawn":
        return sample_ssl(n, height, width, g).box
    tallest, widest = (1, 1) if kind == "pixel" else (height, width)
    h = torch.randint(1, tallest + 1, (n,), generator=g)
    w = torch.randint(1, widest + 1, (n,), generator=g)
    top = (torch.rand(n, generator=g) * (height - h + 1)).long()
    left = (torch.rand(n, generator=g) * (width - w + 1)).long()
    top[0], left[0] = 0, 0  # the corners too
    top[1], left[1] = height - h[1], width - w[1]
    return torch.stack([top, left, h, w], dim=1)


def cropped(image, box, size):
    return F.resized_crop(image, *box.tolist(), [size, size], antialias=True)


def resampled(x, rows, columns):
    return torch.einsum("bih,bchw,bjw->bcij", rows, x, columns)


@pytest.mark.parametrize("source", SOURCES)
def test_two_resampling_matrices_are_torchvisions_resized_crop(source):
    height, width, size = SOURCES[source]
    box = torch.cat([boxes(kind, height, width) for kind in ("drawn", "any", "pixel", "whole")])
    x = random_images(len(box), height, width)
    rows = augment.resampling(box[:, 0], box[:, 2], size, height)
    columns = augment.resampling(box[:, 1], box[:, 3], size, width)
    assert rows.shape == (len(box), size, height)
    expected = torch.stack([cropped(*case, size) for case in zip(x, box, strict=True)])
    close(resampled(x, rows, columns), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_a_flip_in_the_resampling_is_torchvisions_flip_after_it(source):
    height, width, size = SOURCES[source]
    box = boxes("any", height, width)
    flip = torch.arange(len(box)) % 2 == 0
    x = random_images(len(box), height, width)
    rows = augment.resampling(box[:, 0], box[:, 2], size, height)
    columns = augment.resampling(box[:, 1], box[:, 3], size, width, flip)
    expected = torch.stack([cropped(*case, size) for case in zip(x, box, strict=True)])
    expected[flip] = F.horizontal_flip(expected[flip])
    close(resampled(x, rows, columns), expected)


@pytest.mark.parametrize("source", SOURCES)
def test_resampling_weights_are_shares_of_pixels_inside_the_window(source):
    height, _, size = SOURCES[source]
    box = boxes("any", height, height)
    weight = augment.resampling(box[:, 0], box[:, 2], size, height)
    pixel = torch.arange(height)
    outside = (pixel < box[:, :1]) | (pixel >= box[:, :1] + box[:, 2:3])
    assert weight.min() >= 0
    assert weight.transpose(1, 2)[outside].abs().sum() == 0
    close(weight.sum(dim=2), torch.ones(len(box), size), tolerance=1e-6)


@pytest.mark.parametrize(
    ("source", "size"), [(96, 32), (8, 32), (33, 32), (64, 7), (32, 32), (8, 8), (1, 4)]
)
def test_resize_of_a_square_is_torchvisions_resize_and_centre_crop(source, size):
    x = random_images(3, source, source)
    before = x.clone()
    expected = F.center_crop(F.resize(x, [size], antialias=True), [size, size])
    close(augment.resize(x, size), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("height", "width"), [(40, 28), (28, 40), (33, 8), (16, 25), (25, 16), (16, 9)]
)
def test_resize_of_an_oblong_is_the_resize_of_its_central_square(height, width):
    x = random_images(3, height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = x[:, :, top : top + side, left : left + side]
    close(augment.resize(x, 16), F.resize(square, [16], antialias=True))


# --- whole chains ---------------------------------------------------------------------------------


def reference_ssl(image, params, i, size):
    """Image i of a batch, float, by torchvision alone."""
    image = cropped(image, params.box[i], size)
    if params.flip[i]:
        image = F.horizontal_flip(image)
    if params.jitter[i]:
        image = jittered(image, params.order[i], params.factor[i])
    if params.gray[i]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    return image


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (96, 96, 32), (8, 8, 8), (40, 28, 32), (8, 8, 32)]
)
def test_the_ssl_augmentation_of_a_batch_is_torchvisions_image_by_image(height, width, size, dtype):
    n = 32
    pixels = random_bytes(n, height, width)
    x = pixels.float() / 255
    params = sample_ssl(n, height, width, generator(7))
    assert len(torch.stack([params.flip, params.jitter, params.gray]).unique(dim=1)[0]) >= 6
    given = pixels if dtype == torch.uint8 else x.to(dtype)
    found = augment.apply_ssl(given, params, size, MEAN, STD)
    expected = torch.stack([reference_ssl(x[i], params, i, size) for i in range(n)])
    assert found.dtype == torch.float32
    close(found, F.normalize(expected, MEAN, STD))


def test_the_ssl_augmentation_without_constants_stays_on_the_unit_scale():
    x = random_images(16, 32, 32)
    params = sample_ssl(16, 32, 32, generator(8))
    expected = torch.stack([reference_ssl(x[i], params, i, 32) for i in range(16)])
    close(augment.apply_ssl(x, params, 32), expected)


def test_the_images_of_a_batch_do_not_touch_each_other():
    pixels = random_bytes(12, 32, 32)
    params = sample_ssl(12, 32, 32, generator(9))
    whole = augment.apply_ssl(pixels, params, 32, MEAN, STD)
    part = torch.tensor([7, 2, 11])
    theirs = augment.SSLParams(*(d[part] for d in params))
    alone = augment.apply_ssl(pixels[part], theirs, 32, MEAN, STD)
    close(alone, whole[part], tolerance=1e-5)


def reference_org(x, params, size):
    """The whole batch, float, by torchvision alone."""
    x = F.pad(x, [4, 4, 4, 4])
    shifts = enumerate(params.shift.tolist())
    x = torch.stack([F.crop(x[i], top, left, size, size) for i, (top, left) in shifts])
    x[params.flip] = F.horizontal_flip(x[params.flip])
    return x


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_org_augmentation_is_a_padded_shifted_crop_and_flip_exactly(dtype):
    pixels = random_bytes(81, 32, 32)
    x = pixels.float() / 255
    shift = torch.tensor(list(itertools.product(range(9), range(9))))
    params = augment.OrgParams(shift=shift, flip=torch.arange(81) % 2 == 1)
    found = augment.apply_org(pixels if dtype == torch.uint8 else x, params, 32)
    assert torch.equal(found, reference_org(x, params, 32))


@pytest.mark.parametrize("source", [96, 8])
def test_the_org_augmentation_resizes_first_and_pads_the_result(source):
    pixels = random_bytes(24, source, source)
    params = sample_org(24, generator(10))
    expected = reference_org(F.resize(pixels.float() / 255, [32], antialias=True), params, 32)
    found = augment.apply_org(pixels, params, 32, MEAN, STD)
    close(found, F.normalize(expected, MEAN, STD))


@pytest.mark.parametrize(("source", "size"), [(32, 32), (96, 32), (8, 32)])
def test_what_evaluation_sees_is_resized_and_normalised_and_nothing_else(source, size):
    pixels = random_bytes(5, source, source)
    expected = F.resize(pixels.float() / 255, [size], antialias=True)
    close(augment.apply_base(pixels, size), expected)
    close(augment.apply_base(pixels, size, MEAN, STD), F.normalize(expected, MEAN, STD))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_colours_after_crops_are_the_ssl_augmentation_bit_by_bit(dtype):
    pixels = random_bytes(24, 16, 16)
    pixels = pixels if dtype == torch.uint8 else pixels.float() / 255
    params = sample_ssl(24, 16, 16, generator(23))
    uncropped = params._replace(
        box=torch.tensor([[0, 0, 16, 16]]).expand(24, -1), flip=torch.zeros(24, dtype=torch.bool)
    )
    before = pixels.clone()
    found = augment.apply_colors(pixels, params, 16, MEAN, STD)
    assert torch.equal(found, augment.apply_ssl(pixels, uncropped, 16, MEAN, STD))
    assert not torch.equal(found, augment.apply_base(pixels, 16, MEAN, STD))
    assert torch.equal(pixels, before)


CHAINS = {
    "ssl": lambda x, n: augment.apply_ssl(
        x, sample_ssl(n, *x.shape[2:], generator(11)), 16, MEAN, STD
    ),
    "org": lambda x, n: augment.apply_org(x, sample_org(n, generator(11)), 16, MEAN, STD),
    "base": lambda x, n: augment.apply_base(x, 16, MEAN, STD),
}


@pytest.mark.parametrize("source", [16, 24])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("chain", CHAINS)
def test_augmentation_leaves_its_input_as_it_was(chain, dtype, source):
    pixels = random_bytes(8, source, source)
    pixels = pixels if dtype == torch.uint8 else pixels.float() / 255
    before = pixels.clone()
    CHAINS[chain](pixels, 8)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("chain", CHAINS)
def test_8_bit_images_and_their_floats_give_the_same_result(chain):
    pixels = random_bytes(8, 24, 24)
    assert torch.equal(CHAINS[chain](pixels, 8), CHAINS[chain](pixels.float() / 255, 8))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("source", [32, 60])
@pytest.mark.parametrize("chain", ["ssl", "org"])
def test_a_batch_made_in_pieces_is_the_batch_made_at_once_bit_by_bit(
    chain, source, threads, monkeypatch
):
    pixels = random_bytes(11, source, source)
    at_once = CHAINS[chain](pixels, 11)
    torch.set_num_threads(threads)
    monkeypatch.setattr(augment, "CHUNK", 4 * 16**2 // threads)  # four images of these chains
    in_pieces = CHAINS[chain](pixels, 11)
    torch.set_num_threads(1)
    assert torch.equal(in_pieces, at_once)


@pytest.mark.parametrize("chain", CHAINS)
def test_constants_may_be_tensors_and_are_left_as_they_were(chain, monkeypatch):
    pixels = random_bytes(8, 24, 24)
    expected = CHAINS[chain](pixels, 8)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    monkeypatch.setitem(globals(), "MEAN", mean)
    monkeypatch.setitem(globals(), "STD", std)
    assert torch.equal(CHAINS[chain](pixels, 8), expected)
    assert mean.tolist() == pytest.approx([0.491, 0.482, 0.447])
    assert std.tolist() == pytest.approx([0.202, 0.199, 0.201])


# --- without waiting, and compiled ----------------------------------------------------------------


def given(chain, n, source, device):
    """Function that augments pixels on a device, with everything else there already."""
    mean, std = (torch.tensor(v, device=device) for v in (MEAN, STD))
    if chain == "base":
        return lambda x: augment.apply_base(x, 16, mean, std)
    params = {
        "ssl": lambda: sample_ssl(n, source, source, generator(11)),
        "org": lambda: sample_org(n, generator(11)),
    }[chain]()
    params = augment.to(params, device)
    apply = {"ssl": augment.apply_ssl, "org": augment.apply_org}[chain]
    return lambda x: apply(x, params, 16, mean, std)


@pytest.mark.parametrize("source", [16, 24])
@pytest.mark.parametrize("chain", CHAINS)
def test_no_shape_and_no_step_depends_on_a_value_so_no_device_is_waited_for(chain, source):
    # Tensors of the meta device have no values: what would read one fails there.
    pixels = torch.empty(6, 3, source, source, dtype=torch.uint8, device="meta")
    found = given(chain, 6, source, "meta")(pixels)
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.float32, (6, 3, 16, 16))


# The kernels of torch's default backend need a C++ compiler on a CPU, and are meant for GPUs.
@pytest.mark.parametrize(
    ("backend", "device"),
    [("aot_eager", "cpu"), pytest.param("inductor", "cuda", marks=pytest.mark.gpu)],
)
def test_the_ssl_augmentation_compiles_to_one_graph_of_the_same_values(backend, device):
    pixels = random_bytes(16, 16, 16)
    params = sample_ssl(16, 16, 16, generator(11))
    expected = augment.apply_ssl(pixels, params, 16, MEAN, STD)
    compiled = torch.compile(augment.apply_ssl, fullgraph=True, dynamic=False, backend=backend)
    params = augment.to(params, device)
    constants = (torch.tensor(v, device=device) for v in (MEAN, STD))
    found = compiled(pixels.to(device), params, 16, *constants).cpu()
    # A rounding of the hue, a number up to 6, is 5e-7; the blends after it multiply it by 1.4 each,
    # and the normalisation by 5.
    close(found, expected, tolerance=1e-5 if device == "cpu" else TOLERANCE)


# --- the original's 8-bit chain -------------------------------------------------------------------

# Mean absolute difference on the [0, 1] scale, twice what was measured. Half a level, 0.002, is the
# most that one rounding can cost; PIL's colour operations do not round but cut off.
PIL_BOUNDS = {"crops and flips": 0.0023, "the whole chain": 0.01}


@pytest.mark.parametrize("source", [32, 96])
@pytest.mark.parametrize("part", PIL_BOUNDS)
def test_the_8_bit_pil_chain_of_the_original_differs_by_rounding_alone(
    part, source, record_property
):
    n = 64
    pixels = smooth_bytes(n, source)
    params = sample_ssl(n, source, source, generator(12))
    if part == "crops and flips":
        never = torch.zeros(n, dtype=torch.bool)
        params = params._replace(jitter=never, gray=never)
    original = torch.stack([
        F.pil_to_tensor(reference_ssl(F.to_pil_image(pixels[i]), params, i, 32)) for i in range(n)
    ])
    difference = (augment.apply_ssl(pixels, params, 32) - original / 255).abs()
    mean, worst = difference.mean().item(), difference.mean(dim=(1, 2, 3)).max().item()
    record_property("mean_absolute_difference_from_pil", mean)
    print(f"PIL, {part}, {source} -> 32: mean difference {mean:.5f}, worst image {worst:.5f}")
    assert mean < PIL_BOUNDS[part]


# --- sampling -------------------------------------------------------------------------------------

SHAPES = [(32, 32), (96, 96), (8, 8), (20, 60), (60, 20), (15, 60)]
STATISTICS = {  # of a crop; columns top, left, height, width
    "top": lambda b, _: b[:, 0],
    "left": lambda b, _: b[:, 1],
    "height": lambda b, _: b[:, 2],
    "width": lambda b, _: b[:, 3],
    "below": lambda b, shape: shape[0] - b[:, 0] - b[:, 2],
    "right": lambda b, shape: shape[1] - b[:, 1] - b[:, 3],
    "area": lambda b, _: b[:, 2] * b[:, 3],
    "ratio": lambda b, _: b[:, 3] / b[:, 2],
}


@functools.cache
def sampled(shape=(32, 32)):
    return sample_ssl(SAMPLES, *shape, generator(13))


def seeded(draw, n=SAMPLES):
    """Call torchvision's get_params, which params from torch's global stream, n times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(14)
        return [draw() for _ in range(n)]


@functools.cache
def their_boxes(shape):
    crop = transforms.RandomResizedCrop(32, scale=(0.2, 1.0))
    image = torch.empty(3, *shape)
    return np.array(seeded(lambda: crop.get_params(image, crop.scale, crop.ratio)))


@functools.cache
def their_jitter():
    """Orders [n, 4] and factors [n, 4]."""
    j = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    drawn = seeded(lambda: j.get_params(j.brightness, j.contrast, j.saturation, j.hue))
    return np.array([d[0].tolist() for d in drawn]), np.array([d[1:] for d in drawn])


def same_shares(a, b):
    """p of the hypothesis that two samples of labels come from one distribution."""
    values = np.unique(np.concatenate([a, b]))
    return chi2_contingency([[np.sum(s == v) for v in values] for s in (a, b)]).pvalue


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} x {s[1]}")
def test_crops_are_distributed_as_torchvision_samples_them(shape):
    ours, theirs = sampled(shape).box.numpy(), their_boxes(shape)
    for name, of in STATISTICS.items():
        pvalue = ks_2samp(of(ours, shape), of(theirs, shape), method="asymp").pvalue
        assert pvalue > P_MIN, name


FALLBACKS = {  # what is left when ten tries do not fit: the largest central crop of ratio 3/4-4/3
    (20, 60): (0, 16, 20, 27),
    (60, 20): (16, 0, 27, 20),
    (15, 60): (0, 20, 15, 20),
}


@pytest.mark.parametrize("shape", FALLBACKS, ids=lambda s: f"{s[0]} x {s[1]}")
def test_the_central_crop_stands_in_for_ten_misfits_as_often_as_in_torchvision(shape):
    ours = (sampled(shape).box.numpy() == FALLBACKS[shape]).all(axis=1)
    theirs = (their_boxes(shape) == FALLBACKS[shape]).all(axis=1)
    assert theirs.mean() > 0.03
    assert same_shares(ours, theirs) > P_MIN


@pytest.mark.parametrize("index", range(4), ids=NAMES)
def test_colour_factors_are_distributed_as_torchvision_samples_them(index):
    ours, theirs = sampled().factor[:, index].numpy(), their_jitter()[1][:, index]
    assert ks_2samp(ours, theirs, method="asymp").pvalue > P_MIN


def test_colour_factors_of_an_image_are_independent():
    correlation = np.corrcoef(sampled().factor.numpy(), rowvar=False) - np.eye(4)
    assert np.abs(correlation).max() < 4 / SAMPLES**0.5


def test_the_24_orders_of_the_colour_operations_are_equally_frequent_as_torchvisions_are():
    place = 4 ** np.arange(4)
    ours, theirs = sampled().order.numpy() @ place, their_jitter()[0] @ place
    counts = np.unique(ours, return_counts=True)[1]
    assert (sampled().order.sort(dim=1).values == torch.arange(4)).all()
    assert len(counts) == 24
    assert chisquare(counts).pvalue > P_MIN
    assert same_shares(ours, theirs) > P_MIN


@pytest.mark.parametrize(("field", "probability"), [("flip", 0.5), ("jitter", 0.8), ("gray", 0.2)])
def test_flip_jitter_and_grey_have_their_probabilities(field, probability):
    yes = getattr(sampled(), field).sum().item()
    expected = [SAMPLES * probability, SAMPLES * (1 - probability)]
    assert chisquare([yes, SAMPLES - yes], expected).pvalue > P_MIN


CHOICES = {
    "flip": lambda d: d.flip,
    "jitter": lambda d: d.jitter,
    "gray": lambda d: d.gray,
    "first operation": lambda d: d.order[:, 0],
    "factor above its middle": lambda d: d.factor[:, 0] > 1,
    "crop in the upper half": lambda d: 2 * d.box[:, 0] + d.box[:, 2] < 32,
    "crop in the left half": lambda d: 2 * d.box[:, 1] + d.box[:, 3] < 32,
}


def test_what_is_sampled_for_an_image_is_independent():
    choices = {name: of(sampled()).long().numpy() for name, of in CHOICES.items()}
    for (one, a), (other, b) in itertools.combinations(choices.items(), 2):
        table = np.zeros((a.max() + 1, b.max() + 1))
        np.add.at(table, (a, b), 1)
        assert chi2_contingency(table).pvalue > P_MIN, (one, other)


def test_org_shifts_are_uniform_over_81_places_as_torchvisions_are():
    shift = sample_org(SAMPLES, generator(15)).shift.numpy()
    padded = torch.empty(3, 40, 40)
    theirs = np.array(seeded(lambda: transforms.RandomCrop.get_params(padded, (32, 32))[:2]))
    counts = np.bincount(9 * shift[:, 0] + shift[:, 1], minlength=81)
    assert len(counts) == 81
    assert chisquare(counts).pvalue > P_MIN
    assert same_shares(shift[:, 0], theirs[:, 0]) > P_MIN
    assert same_shares(shift[:, 1], theirs[:, 1]) > P_MIN


def test_org_flips_half_of_the_images():
    yes = sample_org(SAMPLES, generator(16)).flip.sum().item()
    assert chisquare([yes, SAMPLES - yes]).pvalue > P_MIN


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (5, 17), (17, 5), (2, 3)])
def test_no_crop_leaves_its_image(shape):
    top, left, height, width = sample_ssl(5_000, *shape, generator(17)).box.unbind(dim=1)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= shape[0]
    assert (left + width).max() <= shape[1]


def test_the_parameters_of_a_seed_stay_what_they_were():
    # Runs that were begun before go on with them.
    params = sample_ssl(3, 40, 28, generator(3))
    assert params.box.tolist() == [[15, 11, 17, 15], [2, 0, 26, 23], [6, 1, 27, 26]]
    assert params.order.tolist() == [[1, 2, 0, 3], [0, 3, 2, 1], [1, 0, 3, 2]]
    assert params.factor[1].tolist() == pytest.approx([0.7805, 0.7499, 0.8913, -0.0657], abs=5e-5)
    assert sample_org(3, generator(3)).shift.tolist() == [[0, 2], [1, 6], [1, 3]]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} x {s[1]}")
def test_an_image_of_any_size_has_the_parameters_of_its_row_of_numbers(shape):
    u = augment.uniform_ssl(20, generator(24))
    whole = sample_ssl(20, *shape, generator(24))
    for i in range(20):
        row = u[i : i + 1]
        alone = augment.ssl_params(row, augment.ssl_boxes(row, *shape))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


SAMPLERS = {
    "ssl": lambda g: sample_ssl(64, 32, 32, g),
    "org": lambda g: sample_org(64, g),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parameters_are_a_function_of_the_generator_alone(sampler):
    draw = SAMPLERS[sampler]
    first = draw(generator(18))
    torch.rand(5)  # of the global stream, which has no part in it
    again, other = draw(generator(18)), draw(generator(19))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_generator_goes_on_and_the_second_view_differs_from_the_first(sampler):
    g = generator(20)
    first, second = SAMPLERS[sampler](g), SAMPLERS[sampler](g)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("sampler", "field"), [("ssl", f) for f in augment.SSLParams._fields]
    + [("org", f) for f in augment.OrgParams._fields],
)
def test_the_images_of_a_batch_have_parameters_of_their_own(sampler, field):
    rows = getattr(SAMPLERS[sampler](generator(21)), field).view(64, -1)
    assert len(rows.unique(dim=0)) >= (2 if rows.dtype == torch.bool else 15)


# --- the other device -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("source", [32, 96])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_gpu_augments_as_the_cpu_does(chain, source, dtype):
    pixels = random_bytes(64, source, source)
    pixels = pixels if dtype == torch.uint8 else pixels.float() / 255
    found = CHAINS[chain](pixels.cuda(), 64)
    assert found.device.type == "cuda"
    close(found.cpu(), CHAINS[chain](pixels, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("source", [16, 24])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_gpu_is_not_waited_for(chain, source):
    pixels = random_bytes(64, source, source).cuda()
    augmented = given(chain, 64, source, "cuda")
    expected = augmented(pixels)  # libraries are loaded once, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augmented(pixels)
        moved = augment.to(sample_org(64, generator(11)), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
    assert moved.shift.device.type == "cuda"
