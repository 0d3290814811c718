#!/usr/bin/env python3
"""Make an outlier set of 32-pixel images from your own copy of a larger one, as an .npz file.

    python prepare.py fix lsun/images lsun_fix.npz
    python prepare.py list openood/benchmark_imglist/cifar10/test_tin.txt tin.npz \\
        --root openood/images_classic
    python eval_ssd.py --ckpt network.pth.tar --ood npz:lsun_fix.npz

fix: "LSUN (Fix)" and "ImageNet (Fix)", the recipe of CSI: short side to 256, the central square of
256, that to 32 with antialiasing, 10,000 images drawn at random. list: the images that a list of
OpenOOD names, short side to 32, the central square, as OpenOOD reads them. LSUN's databases are
unpacked into image files first. Takes minutes; the array is test_images, uint8 [N, 32, 32, 3].
"""

from pathlib import Path

import numpy as np
import torch

import data
import utils
from utils import UserError, number

AT_ONCE = 256  # images in memory at 256 pixels: 50 MB


def parser():
    """Build the command line."""
    p = utils.Parser(description=__doc__)
    p.add_argument("recipe", choices=["fix", "list"], help="how images are chosen and resized")
    p.add_argument("source", help="fix: a folder with images at any depth; list: a text file with "
                   "the path of an image at the start of each line")
    p.add_argument("out", metavar="OUT.npz", help="the file to write")
    p.add_argument("--root", default=".", help="list: the folder that its paths start from")
    p.add_argument("--images", type=number(int, 1), default=10_000, help="fix: how many")
    p.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="fix: of the draw")
    p.add_argument("--size", type=number(int, 8, 256), default=32, help="side in pixels")
    return p


def choose(folder, n, seed):
    """Draw n of the images below a folder: list of paths, sorted.

    Raises:
        UserError: no folder, or fewer images than that.
    """
    if not folder.is_dir():
        raise UserError(f"fix: no folder {folder}")
    files = data.image_files(folder)
    if len(files) < n:
        raise UserError(f"fix: {folder} holds {len(files)} images, fewer than --images {n}")
    chosen = torch.randperm(len(files), generator=utils.generator(seed, "fix"))[:n]
    return [files[i] for i in chosen.sort().values.tolist()]


def listed(path, root):
    """Return the paths of a list of OpenOOD's ("PATH LABEL" lines).

    Raises:
        UserError: no list, an empty one, or an image of it that is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list: {path}: {error}") from None
    files = [root / line.rpartition(" ")[0] for line in lines if line.strip()]
    if not files:
        raise UserError(f"list: {path} names no image ('PATH LABEL' lines are needed)")
    gone = [file for file in files if not file.is_file()]
    if gone:
        raise UserError(f"list: {len(gone)} of the {len(files)} images of {path} are not below "
                        f"--root {root}, the first {gone[0]}")
    return files


def shrink(files, size, through):
    """Read images as squares.

    Args:
        files: paths. size: side in pixels. through: side of the square that is cut first; `size`
            for none.

    Returns:
        uint8 array [N, size, size, 3]: bilinear with antialiasing, by PIL.
    """
    from PIL import Image

    out = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for start in range(0, len(files), AT_ONCE):
        squares = data.decode(files[start : start + AT_ONCE], through).permute(0, 2, 3, 1).numpy()
        for i, square in enumerate(squares, start):
            image = Image.fromarray(square)
            if through != size:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            out[i] = image
    return out


def main():
    args = utils.parse_args(parser())
    out = Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"{out}: the name of the file to write must end in .npz")
    utils.make_folder(out.parent, "the folder of OUT.npz")
    if args.recipe == "fix":
        files, through = choose(Path(args.source), args.images, args.seed), 256
    else:
        files, through = listed(Path(args.source), Path(args.root)), args.size
    images = shrink(files, args.size, through)
    with utils.whole_file(out) as file:
        np.savez_compressed(file, test_images=images)
    print(f"{out}: {len(images)} images of {args.size} pixels; --ood npz:{out}")


if __name__ == "__main__":
    utils.program(main)
