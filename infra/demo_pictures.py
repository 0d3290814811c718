"""Cut the demo's pictures out of the two photographs that scikit-learn ships.

    python -m infra.demo_pictures demo_results/pictures

good/ has 100 squares of the photograph of a temple; inbox/ has 24 others of it and 6 of a flower.
"""

import sys
from pathlib import Path

import numpy as np

from infra import program
from utils import UserError

SIDE = 96  # pixels


def main(argv=None):
    from PIL import Image
    from sklearn.datasets import load_sample_images

    words = argv or sys.argv[1:]
    if len(words) != 1:
        raise UserError("usage: python -m infra.demo_pictures FOLDER")
    rng = np.random.default_rng(0)
    temple, flower = load_sample_images().images  # uint8 [427, 640, 3] each
    for name, photograph, count in (("good/temple", temple, 100), ("inbox/temple", temple, 24),
                                    ("inbox/flower", flower, 6)):
        for i in range(count):
            top, left = (rng.integers(0, n - SIDE) for n in photograph.shape[:2])
            path = Path(words[0]) / f"{name}_{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(path)


if __name__ == "__main__":
    program.run(main)
