"""Photographs that ship with scikit-image and scikit-learn, cut into squares: real pictures without a download."""

from __future__ import annotations

import numpy as np
from PIL import Image

SCIKIT_IMAGE = ("astronaut", "coffee", "chelsea", "rocket")


def photographs() -> list[np.ndarray]:
    """uint8 `[H, W, 3]` each, in colour; those that are installed.

    Raises:
        ImportError: neither package is there.
    """
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = list(load_sample_images().images)
    for name in SCIKIT_IMAGE:
        try:
            found.append(getattr(data, name)())
        except (ConnectionError, ModuleNotFoundError, OSError, ValueError):  # not in the package, but on a server
            continue
    return found


def photograph_squares(side: int, limit: int) -> np.ndarray:
    """At most `limit` squares `[N, side, side, 3]` that do not overlap, at the photographs' own resolution.

    Photographs smaller than a square are enlarged to it. The same ones are given every time, a few of each photograph
    before more of any.
    """
    squares = []
    for picture in photographs():
        height, width = picture.shape[:2]
        scale = max(1.0, side / min(height, width))
        if scale > 1:
            size = (max(side, round(width * scale)), max(side, round(height * scale)))
            picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        corners = [
            (top, left)
            for top in range(0, picture.shape[0] - side + 1, side)
            for left in range(0, picture.shape[1] - side + 1, side)
        ]
        order = np.random.default_rng(0).permutation(len(corners))
        squares.append([picture[top : top + side, left : left + side] for top, left in (corners[i] for i in order)])
    deepest = max(map(len, squares))
    mixed = [found[index] for index in range(deepest) for found in squares if index < len(found)]
    return np.stack(mixed[:limit])
