"""Judge of written words: the letters whose rendering overlaps the ink best."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from unimm.scorers.letters import CELL_HEIGHT, CELL_WIDTH, LETTERS, letter_coverage
from unimm.scorers.palette import nearest_colour
from unimm.scorers.scene import foreground

MAX_LETTERS = 4
MIN_OVERLAP = 0.5  # below it nothing legible is there


def read_word(image: Image.Image) -> str | None:
    """The one to four capital letters in the middle of a picture; None where none can be read.

    Every number of letters is tried: each cell takes its best letter, and the word whose rendering overlaps the ink
    of the whole picture best is the answer.
    """
    ink = foreground(image).astype(np.float32)
    best = max((_read(ink, number) for number in range(1, MAX_LETTERS + 1)), key=lambda reading: reading[1])
    return best[0] if best[1] >= MIN_OVERLAP else None


def stray_ink(image: Image.Image, letters: int) -> float:
    """The share of a picture's ink outside the cells of a word of so many letters; 0 where there is no ink."""
    ink = foreground(image)
    height, width = ink.shape
    left, top = (width - CELL_WIDTH * letters) // 2, (height - CELL_HEIGHT) // 2
    inside = int(ink[top : top + CELL_HEIGHT, left : left + CELL_WIDTH * letters].sum())
    return 1 - inside / max(int(ink.sum()), 1) if ink.any() else 0.0


def ink_colour(image: Image.Image) -> str | None:
    """The palette's name of the ink's median colour; None for an empty picture."""
    ink = foreground(image)
    inner = ndimage.binary_erosion(ink)
    if not ink.any():
        return None
    return nearest_colour(np.median(np.asarray(image.convert("RGB"))[inner if inner.any() else ink], axis=0))


def _read(ink: np.ndarray, number: int) -> tuple[str, float]:
    """The best word of that many letters and its overlap (intersection over union) with the ink."""
    height, width = ink.shape
    left, top = (width - CELL_WIDTH * number) // 2, (height - CELL_HEIGHT) // 2
    word, rendered = "", np.zeros_like(ink)
    for position in range(number):
        cell = (
            slice(top, top + CELL_HEIGHT),
            slice(left + position * CELL_WIDTH, left + (position + 1) * CELL_WIDTH),
        )
        masks = _letter_masks()
        overlaps = np.minimum(masks, ink[cell]).sum(axis=(1, 2)) / np.maximum(masks, ink[cell]).sum(axis=(1, 2))
        choice = int(overlaps.argmax())
        word += LETTERS[choice]
        rendered[cell] = masks[choice]
    return word, float(np.minimum(rendered, ink).sum() / max(np.maximum(rendered, ink).sum(), 1.0))


@lru_cache(maxsize=1)
def _letter_masks() -> np.ndarray:
    return np.stack([(letter_coverage(letter) > 0.35).astype(np.float32) for letter in LETTERS])
