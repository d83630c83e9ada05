"""Judge of emoji pictures: the nearest of all glyphs, laid over the picture's own ground."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from unimm.scorers.glyphs import EmojiCatalog, Glyph, catalog, world_glyphs

SIDE = 32  # at which pictures are compared
SINGLE_SIZE, PICTURE_SIZE = 96, 128  # of a glyph that stands alone in the emoji world, and of its picture


class EmojiJudge:
    """Names the glyph in the middle of a picture.

    Args:
        catalog: of the font.
        glyphs: the candidates.
        glyph_size, picture_size: sides in pixels.
    """

    def __init__(self, catalog: EmojiCatalog, glyphs: Sequence[Glyph], *, glyph_size: int, picture_size: int) -> None:
        self.names = [glyph.name for glyph in glyphs]
        layers = [_layer(catalog.resized(glyph.characters, glyph_size), picture_size) for glyph in glyphs]
        self.colour = np.stack([layer[..., :3] for layer in layers])  # [G, SIDE, SIDE, 3], premultiplied
        self.cover = np.stack([layer[..., 3:] for layer in layers])

    def name(self, image: Image.Image) -> str:
        """The name of the nearest candidate."""
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        expected = self.colour + (1 - self.cover) * np.median(border, axis=0)
        return self.names[int(np.square(expected - pixels).sum(axis=(1, 2, 3)).argmin())]


@lru_cache(maxsize=1)
def emoji_judge() -> EmojiJudge:
    """The judge of single glyphs of the emoji world."""
    return EmojiJudge(catalog(), world_glyphs(), glyph_size=SINGLE_SIZE, picture_size=PICTURE_SIZE)


def _layer(glyph: np.ndarray, picture_size: int) -> np.ndarray:
    """A glyph centred on a transparent picture, at the judge's size, float32 `[SIDE, SIDE, 4]`."""
    canvas = np.zeros((picture_size, picture_size, 4), dtype=np.float32)
    start = (picture_size - len(glyph)) // 2
    canvas[start : start + len(glyph), start : start + len(glyph)] = glyph
    block = picture_size // SIDE
    return canvas.reshape(SIDE, block, SIDE, block, 4).mean(axis=(1, 3))
