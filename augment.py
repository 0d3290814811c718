"""Random augmentation and normalisation of whole batches, on whatever device the images are.

    draws = draw_ssl(len(pixels), height, width, generator)   # what is random, on the CPU
    x = apply_ssl(pixels, draws, size=32, mean=MEAN, std=STD)  # what is not, on the device

Every image has parameters of its own, as if torchvision's transforms had been called on each.
Drawing is apart from applying: the same parameters can be applied by torchvision's functional
operations (the tests do), on another device, or on a part of the batch by another process.
"""

import math
from typing import NamedTuple

import torch

CROP_SCALE = (0.2, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
CROP_TRIES = 10
FLIP, JITTER, GRAYSCALE = 0.5, 0.8, 0.2  # probabilities
STRENGTH = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation (factors 1 +- s), hue (turns)
PADDING = 4  # pixels, of the "org" augmentation
LUMA = (0.2989, 0.587, 0.114)  # red, green, blue; torchvision's weights of grey


class SSLDraws(NamedTuple):
    """Parameters of the "ssl" augmentation of B images; tensors on the CPU."""

    box: torch.Tensor  # int64 [B, 4]: top, left, height, width of the crop, in pixels
    flip: torch.Tensor  # bool [B]
    jitter: torch.Tensor  # bool [B]: whether the colours are changed at all
    order: torch.Tensor  # int64 [B, 4]: operations, first to last (indices into OPERATIONS)
    factor: torch.Tensor  # float32 [B, 4]: strength of each operation, by index
    gray: torch.Tensor  # bool [B]


class OrgDraws(NamedTuple):
    """Parameters of the "org" augmentation of B images; tensors on the CPU."""

    shift: torch.Tensor  # int64 [B, 2]: top and left of the crop in the padded image, 0..8
    flip: torch.Tensor  # bool [B]


def draw_ssl(n, height, width, generator):
    """Draw the parameters of RandomResizedCrop, flip, ColorJitter and grayscale.

    Args:
        n: number of images.
        height, width: of every image, in pixels.
        generator: torch.Generator on the CPU.

    Returns:
        SSLDraws, distributed as torchvision's get_params (ten tries of the crop included).
    """
    u = torch.rand(n, 4 * CROP_TRIES + 11, generator=generator, dtype=torch.float64)
    crop, u = u[:, : 4 * CROP_TRIES].view(n, 4, CROP_TRIES), u[:, 4 * CROP_TRIES :]
    low = torch.tensor([1 - s for s in STRENGTH[:3]] + [-STRENGTH[3]], dtype=torch.float64)
    factor = low + 2 * torch.tensor(STRENGTH, dtype=torch.float64) * u[:, 7:11]
    return SSLDraws(
        box=_draw_boxes(crop, height, width),
        flip=u[:, 0] < FLIP,
        jitter=u[:, 1] < JITTER,
        order=u[:, 3:7].argsort(dim=1),
        factor=factor.float(),
        gray=u[:, 2] < GRAYSCALE,
    )


def _draw_boxes(u, height, width):
    """Uniform numbers [n, 4, tries] -> boxes [n, 4]: the first try that fits, else the centre."""
    area = height * width * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * u[:, 0])
    log_low, log_high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
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


def draw_org(n, generator):
    """Draw the parameters of RandomCrop with padding 4 and of the flip.

    Args:
        n: number of images.
        generator: torch.Generator on the CPU.

    Returns:
        OrgDraws.
    """
    u = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    return OrgDraws(shift=(u[:, :2] * (2 * PADDING + 1)).long(), flip=u[:, 2] < FLIP)


def apply_ssl(pixels, draws, size, mean=None, std=None):
    """Crop and resize, flip, jitter the colours, make some grey, normalise.

    Args:
        pixels: uint8 or float in [0, 1], [B, 3, H, W]; not changed.
        draws: SSLDraws of these B images.
        size: S, side of the result in pixels.
        mean, std: three numbers each, per channel on the [0, 1] scale; None leaves it at that.

    Returns:
        float32 [B, 3, S, S] on the device of `pixels`.

    Source: torchvision's functional operations on float tensors, antialias on, in the original's
    order. The original works on 8-bit PIL images and rounds between the operations.
    """
    box, flip = _to(draws.box, pixels), _to(draws.flip, pixels)
    rows = resampling(box[:, 0], box[:, 2], size, pixels.shape[2])
    columns = resampling(box[:, 1], box[:, 3], size, pixels.shape[3], flip)
    x = _resample(to_float(pixels), rows, columns)
    x = color_jitter(x, draws.jitter, draws.order, draws.factor)
    gray = _to(draws.gray.nonzero().squeeze(1), x)
    x[gray] = luma(x[gray]).expand(-1, 3, -1, -1)
    return normalize(x, mean, std)


def apply_org(pixels, draws, size, mean=None, std=None):
    """Resize, crop a shifted window out of the zero-padded image, flip, normalise.

    Args and Returns: as apply_ssl, with OrgDraws. Source: as the original, without 8-bit rounding.
    """
    x = resize(to_float(pixels), size)
    shift, flip = _to(draws.shift, x) - PADDING, _to(draws.flip, x)
    # A shift by whole pixels is a resampling too: a window as wide as the image, hung over its
    # edge. What it finds there has no weight, which is the zero of the padding.
    whole = torch.full_like(shift[:, 0], size)
    rows = resampling(shift[:, 0], whole, size, size)
    columns = resampling(shift[:, 1], whole, size, size, flip)
    return normalize(_resample(x, rows, columns), mean, std)


def apply_base(pixels, size, mean=None, std=None):
    """Resize and normalise: what evaluation sees.

    Args and Returns: as apply_ssl, without draws.
    """
    return normalize(resize(to_float(pixels), size), mean, std)


def to_float(pixels):
    """Bring uint8 pixels to float32 in [0, 1]; float ones pass as float32. Returns a new tensor.

    Args:
        pixels: uint8 [...] or float [...] in [0, 1].
    """
    if pixels.dtype == torch.uint8:
        return pixels.float().div_(255)
    return pixels.to(torch.float32, copy=True)


def normalize(x, mean, std):
    """Subtract the mean of each channel and divide by its standard deviation. Changes `x`.

    Args:
        x: float [B, 3, S, S].
        mean, std: three numbers each; None for both returns `x` as it is.
    """
    if mean is None:
        return x
    mean, std = (_to(torch.tensor(v, dtype=x.dtype).view(1, 3, 1, 1), x) for v in (mean, std))
    return x.sub_(mean).div_(std)


def resize(x, size):
    """Bring the short side to `size` and keep the central square (torchvision: Resize, CenterCrop).

    Args:
        x: float [B, 3, H, W].
        size: S.

    Returns:
        float [B, 3, S, S], bilinear with antialiasing; `x` itself where it has that shape.
    """
    height, width = x.shape[2:]
    if height == width == size:
        return x
    side = min(height, width)
    corner = _to(torch.tensor([[(height - side) // 2], [(width - side) // 2]]), x)
    length = _to(torch.tensor([side]), x)
    rows = resampling(corner[0], length, size, height)
    columns = resampling(corner[1], length, size, width)
    return _resample(x, rows.expand(len(x), -1, -1), columns.expand(len(x), -1, -1))


def resampling(start, length, size, source, flip=None):
    """Write crop, antialiased bilinear resize and flip along one axis as a matrix per image.

    Args:
        start, length: int64 [B], the window in source pixels.
        size: S, number of output pixels.
        source: number of source pixels.
        flip: bool [B], mirror the output; None never does.

    Returns:
        float32 [B, S, source]: row i holds the weights of the source pixels in output pixel i, a
        triangle as wide as an output pixel (one source pixel at least), cut at the window and
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
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _blend(x, other, factor):
    """factor * x + (1 - factor) * other, kept in [0, 1]; factor [B, 1, 1, 1]."""
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def adjust_brightness(x, factor):
    """Scale float images [B, 3, H, W] by a factor per image [B], kept in [0, 1]."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Move float images [B, 3, H, W] away from their mean grey by a factor per image [B]."""
    return _blend(x, luma(x).mean(dim=(1, 2, 3), keepdim=True), factor.view(-1, 1, 1, 1))


def adjust_saturation(x, factor):
    """Move float images [B, 3, H, W] away from their own grey by a factor per image [B]."""
    return _blend(x, luma(x), factor.view(-1, 1, 1, 1))


def adjust_hue(x, shift):
    """Turn the hue of float images [B, 3, H, W] by a shift per image [B], in turns."""
    red, green, blue = x.unbind(dim=1)  # [B, H, W] each
    value, least = x.amax(dim=1), x.amin(dim=1)
    chroma = value - least
    inverse = 1 / chroma.masked_fill(chroma == 0, 1)  # grey has no hue; its chroma hides any
    sector = torch.where(  # hue in sixths of a turn
        value == red,
        (green - blue) * inverse,
        torch.where(value == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    sector = sector + 6 * shift.view(-1, 1, 1)
    out = torch.empty_like(x)
    for channel, offset in enumerate((5, 3, 1)):  # HSV to RGB without its six cases
        k = (sector + offset).remainder(6)
        out[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return out


OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def color_jitter(x, apply, order, factor):
    """Apply each image's four colour operations in that image's own order. Changes `x`.

    Args:
        x: float [B, 3, H, W] in [0, 1].
        apply: bool [B] on the CPU, images that are changed.
        order: int64 [B, 4] on the CPU, a permutation of OPERATIONS a row.
        factor: float32 [B, 4] on the CPU, by operation.

    Returns:
        `x`.
    """
    strength = _to(factor, x)
    images = apply.nonzero().squeeze(1)
    for turn in range(len(OPERATIONS)):
        # Images that are due the same operation now go through it together. The grouping is
        # worked out on the CPU, where the draws are, so no device waits for it.
        due = order[images, turn]
        groups = _to(images[due.argsort()], x).split(due.bincount(minlength=4).tolist())
        for index, rows in enumerate(groups):
            if len(rows):
                x[rows] = OPERATIONS[index](x[rows], strength[rows, index])
    return x


def _to(draw, x):
    """Copy a small tensor from the CPU to the device of `x` without making the host wait."""
    if x.device.type != "cuda" or not draw.numel():
        return draw.to(x.device)
    return draw.pin_memory().to(x.device, non_blocking=True)
