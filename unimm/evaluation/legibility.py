"""At which height of its letters a word is still read after one trip through a codec.

The truth is the string that was drawn, not what a reader makes of the original; how often the reader is right on
originals is the ceiling, and stands beside every share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unimm.data.pictures import to_pictures
from unimm.evaluation.subjects import Subject

HEIGHTS = (6, 8, 11, 16, 22, 32)  # of a capital letter, in pixels
WORDS = ("BREAD", "CLOUD", "FIELD", "GRAPE", "HOUSE", "LIGHT", "MUSIC", "PLANT", "RIVER", "STONE", "TRAIN", "WATER")
MARGIN = 4
Reader = Callable[[Image.Image], str]


@dataclass(frozen=True)
class Survival:
    """At one height.

    Args:
        height: of a capital letter, in pixels.
        read: share of words read exactly, whatever their case, in the copies.
        ceiling: the same in the originals.
        trials: words.
    """

    height: int
    read: float
    ceiling: float
    trials: int


def rapid_reader() -> Reader:
    """The recogniser of RapidOCR, which brings its weights along.

    Raises:
        ImportError: the package is not there.
    """
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ImportError("Reading text needs an OCR: pip install 'unimm[ocr]', or leave --text out.") from error
    engine = RapidOCR()

    def read(picture: Image.Image) -> str:
        found, _ = engine(np.asarray(picture)[..., ::-1], use_det=False, use_cls=False)
        return found[0][0] if found else ""

    return read


def text_survival(subject: Subject, reader: Reader, heights: tuple[int, ...] = HEIGHTS) -> list[Survival]:
    """Every word at every height that fits into a picture of the subject."""
    survivals = []
    for height in heights:
        drawn = [place_word(word, height, subject.side, seed) for seed, word in enumerate(WORDS)]
        placed = [(word, found) for word, found in zip(WORDS, drawn, strict=True) if found is not None]
        if not placed:
            continue
        originals = np.stack([np.asarray(picture) for _, (picture, _) in placed])
        copies = to_pictures(subject.copy(originals).pixels)
        right = [
            [_same(reader(picture.crop(box)), word) for picture in (original, copy)]
            for (word, (original, box)), copy in zip(placed, copies, strict=True)
        ]
        ceiling, read = np.mean(right, axis=0)
        survivals.append(Survival(height, float(read), float(ceiling), len(placed)))
    return survivals


def place_word(word: str, height: int, side: int, seed: int) -> tuple[Image.Image, tuple[int, int, int, int]] | None:
    """A word in black on white somewhere in a picture, and its box with a margin; None where it does not fit."""
    font = _font(height)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(word))
    width, tall = right - left + 2 * MARGIN, bottom - top + 2 * MARGIN
    if width > side or tall > side:
        return None
    generator = np.random.default_rng([seed, height])
    x, y = (int(generator.integers(0, side - extent + 1)) for extent in (width, tall))
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).text((x + MARGIN - left, y + MARGIN - top), word, fill="black", font=font)
    return picture, (x, y, x + width, y + tall)


def _font(height: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font at the size at which an H is `height` pixels tall."""
    for size in range(height, 4 * height):
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        box = font.getbbox("H")
        if box[3] - box[1] >= height:
            return font
    raise ValueError(f"No size of the font has capitals of {height} pixels.")


def _same(read: str, word: str) -> bool:
    return "".join(letter for letter in read.upper() if letter.isalnum()) == word
