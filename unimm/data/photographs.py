"""Photographs that ship with scikit-image and scikit-learn, cut into squares: real pictures without a download.

    python -m unimm.data.photographs FOLDER

writes crops of them that a codec can learn from, by `data.source=FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from unimm.files import atomic_write

SCIKIT_IMAGE = ("astronaut", "coffee", "chelsea", "rocket")
SMALLEST = 0.3  # of a photograph's shorter side, the side of a crop
KEPT = "chelsea"  # the photograph that nothing is learned from
HELD_OUT = 96  # crops of it, written last: a run keeps its last pictures back


def photographs() -> dict[str, np.ndarray]:
    """uint8 `[H, W, 3]` by name, in colour; those that are installed.

    Raises:
        ImportError: neither package is there.
    """
    from skimage import data
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    found = {Path(name).stem: picture for name, picture in zip(samples.filenames, samples.images, strict=True)}
    for name in SCIKIT_IMAGE:
        try:
            found[name] = getattr(data, name)()
        except (ConnectionError, ModuleNotFoundError, OSError, ValueError):  # not in the package, but on a server
            continue
    return found


def photograph_squares(side: int, limit: int) -> np.ndarray:
    """At most `limit` squares `[N, side, side, 3]` that do not overlap, at the photographs' own resolution.

    Photographs smaller than a square are enlarged to it. The same ones are given every time, a few of each photograph
    before more of any.
    """
    squares = []
    for picture in photographs().values():
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


def random_crop(picture: np.ndarray, side: int, rng: np.random.Generator) -> Image.Image:
    """A square of random size and place, mirrored half of the time, at `side` x `side` pixels."""
    height, width = picture.shape[:2]
    taken = int(min(height, width) * rng.uniform(SMALLEST, 1))
    top, left = int(rng.integers(height - taken + 1)), int(rng.integers(width - taken + 1))
    crop = picture[top : top + taken, left : left + taken]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    return Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC)


def write_crops(folder: Path, *, side: int, number: int, seed: int = 0) -> None:
    """Write `number` crops of all photographs but one, and then `HELD_OUT` of that one, as PNG files of a folder.

    Raises:
        ValueError: no crops wanted, or a folder that holds something.
    """
    if number < 1:
        raise ValueError(f"number is {number}; write at least 1 crop.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pictures = photographs()
    kept = pictures.pop(KEPT)
    shown = list(pictures.values())
    for index in tqdm(range(number + HELD_OUT), desc="cropping"):
        picture = kept if index >= number else shown[index % len(shown)]
        with atomic_write(folder / f"{index:06d}.png") as path:
            random_crop(picture, side, rng).save(path, format="png")


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(description="write random crops of the sample photographs")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=128, help="pixels of a crop (default: 128)")
    parser.add_argument("--number", type=int, default=4_000, help="crops to learn from (default: 4000)")
    arguments = parser.parse_args()
    write_crops(arguments.folder, side=arguments.side, number=arguments.number)


if __name__ == "__main__":
    main()
