"""Make an outlier set of 32-pixel images from your own copy of a larger one, as an .npz file.

    python -m infra.prepare fix lsun/images lsun_fix.npz
    python -m infra.prepare list openood/benchmark_imglist/cifar10/test_tin.txt tin.npz \\
        --root openood/images_classic
    python eval_ssd.py --ckpt network.pth.tar --ood npz:lsun_fix.npz

fix: "LSUN (Fix)" and "ImageNet (Fix)" by the recipe of CSI: short side to 256, central square, that
to 32 with antialiasing, of 10,000 images drawn at random. list: the images of a list of OpenOOD,
short side to 32, central square, as OpenOOD reads them. Unpack LSUN's databases into image files
first. Takes minutes; the array is test_images, uint8 [N, 32, 32, 3].
"""

from pathlib import Path

import numpy as np
import torch

import utils
from infra import image_files, program, storage
from utils import UserError, number

AT_ONCE = 256  # images in memory at 256 pixels: 50 MB


def parser():
    """Build the command line."""
    p = utils.Parser(description=__doc__)
    p.add_argument("recipe", choices=["fix", "list"], help="how images are chosen and resized")
    p.add_argument("source", help="fix: a folder, images at any depth; list: 'PATH LABEL' lines")
    p.add_argument("out", metavar="OUT.npz", help="the file to write")
    p.add_argument("--root", default=".", help="list: the folder that its paths start from")
    p.add_argument("--images", type=number(int, 1), default=10_000, help="fix: how many")
    p.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="fix: of the draw")
    p.add_argument("--size", type=number(int, 8, 256), default=32, help="side in pixels")
    return p


def choose(folder, n, seed):
    """Return n of the images below a folder at random, sorted; UserError if there are fewer."""
    if not folder.is_dir():
        raise UserError(f"fix: no folder {folder}")
    files, others = image_files.find_images(folder)
    image_files.note_unread(f"fix: {folder}", others, len(files))
    if len(files) < n:
        raise UserError(f"fix: {folder} holds {len(files)} images, fewer than --images {n}")
    chosen = torch.randperm(len(files), generator=utils.generator(seed, "fix"))[:n]
    return [files[i] for i in chosen.sort().values.tolist()]


def read_list(path, root):
    """Return the paths of a list of OpenOOD's; UserError if it is empty or an image is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list: {path}: {error}") from None
    if not (files := [root / line.rpartition(" ")[0] for line in lines if line.strip()]):
        raise UserError(f"list: {path} names no image; expected lines of 'PATH LABEL'")
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"list: {len(missing)} of the {len(files)} images of {path} are not below "
                        f"--root {root}, the first {missing[0]}")
    return files


def shrink(files, size, through):
    """Return images as uint8 [N, size, size, 3], resized from squares of `through` pixels."""
    from PIL import Image

    out = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for start in range(0, len(files), AT_ONCE):
        squares = image_files.decode(files[start : start + AT_ONCE], through)
        for i, square in enumerate(squares.permute(0, 2, 3, 1).numpy(), start):
            out[i] = Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR)
    return out


def main(argv=None):
    args = utils.parse_args(parser(), argv)
    out = Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"{out}: the name of the file to write must end in .npz")
    source, is_fix = Path(args.source), args.recipe == "fix"
    files = choose(source, args.images, args.seed) if is_fix else read_list(source, Path(args.root))
    storage.check_outputs({"OUT.npz": out},
                          {"--config": args.config, "the source": [source, *files]})
    images = shrink(files, args.size, 256 if is_fix else args.size)
    with storage.atomic_write(out) as file:
        np.savez_compressed(file, test_images=images)
    print(f"{out}: {len(images)} images of {args.size} pixels; --ood npz:{out}")


if __name__ == "__main__":
    program.run(main)
