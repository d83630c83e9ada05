"""Capital letters as coverage masks, in a monospaced bold face that ships with matplotlib."""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = string.ascii_uppercase
CELL_WIDTH, CELL_HEIGHT = 32, 64  # pixels
POINT_SIZE = 50


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), POINT_SIZE)


@lru_cache(maxsize=len(LETTERS))
def letter_coverage(letter: str) -> np.ndarray:
    """Share of each pixel inside the letter, float32 `[CELL_HEIGHT, CELL_WIDTH]`, read-only."""
    cell = Image.new("L", (CELL_WIDTH, CELL_HEIGHT))
    ImageDraw.Draw(cell).text((CELL_WIDTH / 2, CELL_HEIGHT / 2), letter, font=_font(), fill=255, anchor="mm")
    mask = np.asarray(cell, dtype=np.float32) / 255
    mask.setflags(write=False)
    return mask
