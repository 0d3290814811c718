"""Random augmentation and normalisation of whole batches, on whatever device the images are.

    # what is random, on the CPU, and the rest, on the device
    params = sample_views("ssl", 1, len(pixels), slice(None), height, width, generator)
    x = apply_ssl(pixels, params, size=32, mean=MEAN, std=STD)

Every image has its own parameters, as if torchvision's transforms had been called on each. They
are sampled first, so that torchvision's functional operations (in the tests), another device or
another process can apply the same ones. Crops made by worker processes (infra/image_files.py) go
on from the colours: apply_colors.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

CROP_SCALE = (0.2, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
CROP_TRIES = 10
FLIP, JITTER, GRAYSCALE = 0.5, 0.8, 0.2  # probabilities
STRENGTH = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation (factors 1 +- s), hue (turns)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
PADDING = 4  # pixels, of the "org" augmentation
LUMA = (0.2989, 0.587, 0.114)  # red, green, blue; torchvision's weights of grey
CHUNK = 2**17  # pixels that a thread of a CPU augments at a time: 1.5 MiB of them


class SSLParams(NamedTuple):
    """Parameters of the "ssl" augmentation of B images; sampled on the CPU."""

    box: torch.Tensor  # int64 [B, 4]: top, left, height, width of the crop, in pixels
    flip: torch.Tensor  # bool [B]
    jitter: torch.Tensor  # bool [B]: whether the colours are changed at all
    order: torch.Tensor  # int64 [B, 4]: operations, first to last (BRIGHTNESS, ...)
    factor: torch.Tensor  # float32 [B, 4]: strength of each operation
    gray: torch.Tensor  # bool [B]


class OrgParams(NamedTuple):
    """Parameters of the "org" augmentation of B images; sampled on the CPU."""

    shift: torch.Tensor  # int64 [B, 2]: top and left of the crop in the padded image, 0..8
    flip: torch.Tensor  # bool [B]


def uniform_ssl(n, generator):
    """Sample what the parameters of n images are computed from: float64 [n, 51] in [0, 1).

    It depends on no image size: pictures of many sizes share a generator, a row for each.
    """
    return torch.rand(n, 4 * CROP_TRIES + 11, generator=generator, dtype=torch.float64)


def ssl_params(u, box):
    """Turn rows of `uniform_ssl`, float64 [n, 51], and their `ssl_boxes` into SSLParams."""
    u = u[:, 4 * CROP_TRIES :]
    low = torch.tensor([1 - s for s in STRENGTH[:3]] + [-STRENGTH[3]], dtype=torch.float64)
    factor = low + 2 * torch.tensor(STRENGTH, dtype=torch.float64) * u[:, 7:11]
    return SSLParams(box=box, flip=u[:, 0] < FLIP, jitter=u[:, 1] < JITTER,
                     order=u[:, 3:7].argsort(dim=1), factor=factor.float(),
                     gray=u[:, 2] < GRAYSCALE)


def ssl_boxes(u, height, width):
    """Turn uniform numbers into crops: the first of ten tries that fits, else the centre.

    Args: u: rows of `uniform_ssl`. height, width: of these images, in pixels.
    Returns: int64 [n, 4]: top, left, height, width.
    """
    u = u[:, : 4 * CROP_TRIES].view(-1, 4, CROP_TRIES)
    area = height * width * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * u[:, 0])
    log_low, log_high = map(math.log, CROP_RATIO)
    ratio = torch.exp(log_low + (log_high - log_low) * u[:, 1])
    w = torch.sqrt(area * ratio).round().long()  # [n, tries]
    h = torch.sqrt(area / ratio).round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = torch.where(fits, torch.arange(CROP_TRIES), CROP_TRIES).amin(dim=1, keepdim=True)
    none = first == CROP_TRIES
    first = first.clamp(max=CROP_TRIES - 1)

    aspect = width / height
    centre_w = width if aspect <= CROP_RATIO[1] else round(height * CROP_RATIO[1])
    centre_h = height if aspect >= CROP_RATIO[0] else round(width / CROP_RATIO[0])
    w = torch.where(none, centre_w, w.gather(1, first))
    h = torch.where(none, centre_h, h.gather(1, first))
    top = torch.where(none, (height - h) // 2, (u[:, 2].gather(1, first) * (height - h + 1)).long())
    left = torch.where(none, (width - w) // 2, (u[:, 3].gather(1, first) * (width - w + 1)).long())
    return torch.cat([top, left, h, w], dim=1)


def sample_views(augmentation, views, batch, rows, height, width, generator):
    """Sample the parameters of the views of some rows of a batch, whichever process makes them.

    They are distributed as by torchvision's RandomResizedCrop (ten tries of the crop included),
    flip, ColorJitter and grayscale ("ssl"), or RandomCrop with padding 4 and flip ("org").

    Args: views: of each image. batch: number of images. rows: slice of them, b images.
        height, width: of every image, in pixels. generator: torch.Generator on the CPU.
    Returns: SSLParams or OrgParams of views * b images, view after view.
    """
    # Sampled for the whole batch: the parameters of an image are the same in every process.
    index = torch.arange(views * batch).view(views, batch)[:, rows].flatten()
    if augmentation == "org":
        u = torch.rand(views * batch, 3, generator=generator, dtype=torch.float64)[index]
        return OrgParams(shift=(u[:, :2] * (2 * PADDING + 1)).long(), flip=u[:, 2] < FLIP)
    u = uniform_ssl(views * batch, generator)[index]  # the rest is a function of its row of u
    return ssl_params(u, ssl_boxes(u, height, width))


def _in_chunks(apply):
    """Run a function (pixels, params, ...) on a CPU on chunks that its caches hold."""
    @functools.wraps(apply)
    def on_batch(pixels, params, size, mean=None, std=None):
        params = to(params, pixels.device)
        whole = torch.compiler.is_compiling() or pixels.device.type != "cpu"
        if whole or len(pixels) <= (chunk := max(1, CHUNK * torch.get_num_threads() // size**2)):
            return apply(pixels, params, size, mean, std)
        out = torch.empty(len(pixels), 3, size, size)
        for start in range(0, len(pixels), chunk):
            now = slice(start, start + chunk)
            out[now] = apply(pixels[now], subset(params, now), size, mean, std)
        return out

    return on_batch


@_in_chunks
def apply_ssl(pixels, params, size, mean=None, std=None):
    """Crop and resize, flip, jitter the colours, make some grey, normalise.

    Args:
        pixels: uint8 or float in [0, 1], [B, 3, H, W]; not changed. size: S in pixels.
        params: SSLParams of these B images, on the CPU or on the device of `pixels`.
        mean, std: three numbers each, on the [0, 1] scale, as a sequence or a tensor, which is not
            copied if it is on the device of `pixels`; None: no normalisation.
    Returns: float32 [B, 3, S, S] on the device of `pixels`.

    Every image goes through the same operations; those not due to it return it bit by bit. So no
    shape depends on a draw: torch.compile makes one graph of it, and no device is waited for.

    Source: torchvision's functional operations on float tensors, antialias on, in the original's
    order. The original works on 8-bit PIL images and rounds between the operations.
    """
    return _recolor(resized_crop(pixels, params.box, params.flip, size), params, mean, std)


@_in_chunks
def apply_colors(pixels, params, size, mean=None, std=None):
    """Do the rest of apply_ssl to pixels [B, 3, S, S] that are cropped and flipped already."""
    return _recolor(to_float(pixels), params, mean, std)


def _recolor(x, params, mean, std):
    x = color_jitter(x, params.jitter, params.order, params.factor)
    return normalize(grayscale(x, params.gray), mean, std)


@_in_chunks
def apply_org(pixels, params, size, mean=None, std=None):
    """Resize, crop a shifted window out of the zero-padded image, flip, normalise.

    Args and Returns: as apply_ssl, with OrgParams. Source: as the original, without 8-bit rounding.
    """
    x = resize(to_float(pixels), size)
    # A shift by whole pixels is a crop too: a window as wide as the image, hung over its edge.
    # What it finds there has no weight, which is the zero of the padding.
    shift = params.shift - PADDING
    box = torch.cat([shift, torch.full_like(shift, size)], dim=1)
    return normalize(resized_crop(x, box, params.flip, size), mean, std)


def apply_base(pixels, size, mean=None, std=None, interpolation="bilinear"):
    """Resize and normalise, as for evaluation. Args and Returns: as apply_ssl and resize."""
    return normalize(resize(to_float(pixels), size, interpolation), mean, std)


# How views are made: of whole images, or of those that worker processes cropped and flipped.
AUGMENTATIONS = {"ssl": apply_ssl, "org": apply_org}
AFTER_WORKERS = {"ssl": apply_colors, "org": apply_org}


def to(params, device):
    """Return SSLParams or OrgParams on a device; the host does not wait for a copy."""
    return type(params)(*(_move(d, torch.device(device)) for d in params))


def subset(params, index):
    """Return the parameters of the images at an index: a slice, or int64 [n]."""
    return type(params)(*(d[index] for d in params))


def _move(tensor, device):
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_float(pixels):
    """Return uint8 pixels, or float ones in [0, 1], as a new float32 tensor in [0, 1]."""
    is_uint8 = pixels.dtype == torch.uint8
    return pixels.float().div_(255) if is_uint8 else pixels.to(torch.float32, copy=True)


def normalize(x, mean, std):
    """Standardise channels of float [B, 3, S, S] by apply_ssl's mean and std. Changes `x`."""
    if mean is None:
        return x
    mean, std = (_move(torch.as_tensor(v, dtype=torch.float32), x.device).view(1, 3, 1, 1)
                 for v in (mean, std))
    return x.sub_(mean).div_(std)


def resize(x, size, interpolation="bilinear"):
    """Bring the short side to `size` and keep the central square (torchvision: Resize, CenterCrop).

    Args: x: float [B, 3, H, W]. size: S. interpolation: "bilinear" or "bicubic".
    Returns: float [B, 3, S, S], with antialiasing; `x` itself where it has that shape.
    """
    height, width = x.shape[2:]
    if height == width == size:
        return x
    side = min(height, width)
    if interpolation == "bicubic":
        top, left = (height - side) // 2, (width - side) // 2
        x = x[:, :, top : top + side, left : left + side]
        return F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
    length = torch.full((1,), side, device=x.device)
    rows = resampling((height - length) // 2, length, size, height)
    columns = resampling((width - length) // 2, length, size, width)
    return _resample(x, rows.expand(len(x), -1, -1), columns.expand(len(x), -1, -1))


def resized_crop(pixels, box, flip, size):
    """Crop each image to its own window, resize to one size, flip some.

    Args: pixels: as of apply_ssl. box, flip: as of SSLParams; a box may hang over. size: S.
    Returns: float32 [B, 3, S, S], bilinear with antialiasing.
    """
    height, width = pixels.shape[2:]
    rows = resampling(box[:, 0], box[:, 2], size, height)
    columns = resampling(box[:, 1], box[:, 3], size, width, flip)
    return _resample(to_float(pixels), rows, columns)


def resampling(start, length, size, source, flip=None):
    """Write crop, antialiased bilinear resize and flip along one axis as a matrix per image.

    Args: start, length: int64 [B], the window in source pixels. size: S, number of output pixels.
        source: number of source pixels. flip: bool [B], which outputs are mirrored; None: none.
    Returns: float32 [B, S, source]: row i holds the weights of the source pixels in output pixel i,
        a triangle as wide as an output pixel (at least one source pixel), cut at the window and
        scaled to sum 1.
    Source: torch's interpolate(mode="bilinear", antialias=True) of the cropped image.
    """
    device = start.device
    out = torch.arange(size, device=device).expand(len(start), size)
    if flip is not None:
        out = torch.where(flip[:, None], size - 1 - out, out)
    start, length = start[:, None].float(), length[:, None].float()
    step = length / size  # source pixels per output pixel
    centre = start + (out + 0.5) * step  # [B, S]
    position = torch.arange(source, device=device) + 0.5  # [source]
    weight = 1 - (position - centre[:, :, None]).abs() / step.clamp(min=1)[:, :, None]
    inside = (position > start) & (position < start + length)  # [B, source]
    weight = weight.clamp_(min=0).mul_(inside[:, None, :])
    total = weight.sum(dim=2, keepdim=True)
    return weight.div_(total.masked_fill_(total == 0, 1))


def _resample(x, rows, columns):
    """[B, 3, H, W] between [B, S, H] and the transpose of [B, S, W] -> [B, 3, S, S]."""
    batch, channels, height, width = x.shape
    size = columns.shape[1]
    x = torch.bmm(x.reshape(batch, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], x.view(batch, channels, height, size))


def luma(x):
    """Mix the channels [B, 3, H, W] to grey [B, 1, H, W] with torchvision's weights."""
    red, green, blue = x.unbind(dim=1)
    return (LUMA[0] * red).add_(LUMA[1] * green).add_(LUMA[2] * blue).unsqueeze(1)


def grayscale(x, chosen):
    """Make the chosen images (bool [B]) of float [B, 3, H, W] grey. Changes `x`."""
    return _put(luma(x), x, chosen)


def blending(operation, factor, due):
    """Write brightness, contrast and saturation as one formula: the coefficients of `blend`.

    All are factor * x + (1 - factor) * other, clamped to [0, 1]; other is black (brightness), the
    mean grey of the image (contrast) or the grey of each pixel (saturation).

    Args: operation: int64 [B, ...], BRIGHTNESS, CONTRAST or SATURATION. factor: float32 [B, ...].
        due: bool [B, ...], whether to change anything at all.
    Returns: float32 [B, ...] each: multipliers of x, its grey and its mean grey, and the maximum.
    """
    factor = torch.where(due, factor, 1)
    of_grey = torch.where(operation == SATURATION, 1 - factor, 0)
    of_mean = torch.where(operation == CONTRAST, 1 - factor, 0)
    most = torch.where(due, 1, torch.inf)  # a resampled 1 may be more by a rounding
    return factor, of_grey, of_mean, most


def blend(x, factor, of_grey, of_mean, most):
    """Change float images [B, 3, H, W] by what `blending` returns, [B] each. Changes `x`."""
    grey = luma(x)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True) * _each(of_mean)
    grey = grey.mul_(_each(of_grey)).add_(mean)
    return x.mul_(_each(factor)).add_(grey).clamp_max_(_each(most)).clamp_min_(0)


def adjust_hue(x, shift):
    """Turn the hue of float images [B, 3, H, W] by a shift per image [B], in turns."""
    red, green, blue = x.unbind(dim=1)  # [B, H, W] each
    value, least = x.amax(dim=1), x.amin(dim=1)
    chroma = value - least
    # Choices are products with 0 and 1, which change no bit: on a CPU a torch.where of this size
    # takes ten times as long.
    is_red = value.clone().eq_(red)
    is_green = value.clone().eq_(green).mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    across = (green - blue).mul_(is_red)
    across = across.add_((blue - red).mul_(is_green)).add_((red - green).mul_(is_blue))
    grey = chroma.clone().eq_(0)  # has no hue; its chroma hides any
    sector = across.mul_(1 / (chroma + grey))  # hue in sixths of a turn, from its primary
    sector = sector.add_(is_green.mul_(2).add_(is_blue.mul_(4)))
    sector = sector.add_(6 * shift.view(-1, 1, 1))
    # HSV to RGB without its six cases
    k = sector[:, None] + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # [B, 3, H, W]
    k = k.sub_((k / 6).floor_().mul_(6))
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value[:, None] - k.mul_(chroma[:, None])


def color_jitter(x, apply, order, factor):
    """Apply each image's four colour operations in its own order; returns float [B, 3, H, W].

    Args: x: in [0, 1]; changed. apply, order, factor: `jitter`, `order`, `factor` of SSLParams.
    """
    # Hue alone is no blend, and each image has it once. So all go through three blends before it
    # and three after it, of which three are due in all.
    turn = torch.arange(4, device=x.device)
    hue_turn = ((order == HUE) * turn).sum(dim=1, keepdim=True)
    operation = torch.cat([order[:, :3], order[:, 1:]], dim=1)  # [B, 6]
    due = torch.cat([turn[:3] < hue_turn, turn[1:] > hue_turn], dim=1) & apply[:, None]
    steps = blending(operation, factor.gather(1, operation), due)
    for i in range(6):
        if i == 3:
            x = _put(adjust_hue(x, factor[:, HUE]), x, apply)
        x = blend(x, *(s[:, i] for s in steps))
    return x


def _put(images, x, chosen):
    chosen = _each(chosen).float()
    return x.mul_(1 - chosen).add_(images * chosen)


def _each(values):
    return values.reshape(-1, 1, 1, 1)
