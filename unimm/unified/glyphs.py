"""Rows of an embedding that are pictures of their texts (Emergent Semantics, 2507.04886).

A text is drawn in one square cell per character, side by side, and the strip is squeezed into one square of black and
white: its bits. A few of them are flipped, by one fixed seed, so that texts that look alike differ. The rows are the
bits along their principal axes, all of one length; what a text means they do not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedTokenizerBase

CELL = 32  # pixels per side of a character, and of the square of bits
POINT_SIZE = 24
MOST_CHARACTERS = 64  # of a text that are drawn; more would be a line of dust
FLIPPED = 1 / 64  # share of bits


def glyph_rows(texts: Sequence[str], width: int, norm: float) -> torch.Tensor:
    """Rows `[V, width]` of length `norm` for texts: their bits along the first principal axes, zeros beyond those."""
    bits = np.stack([glyph_bits(text) for text in texts])
    bits = (bits ^ (np.random.default_rng(0).random(bits.shape) < FLIPPED)).astype(np.float64)
    centred = bits - bits.mean(axis=0)
    # By numpy: torch's does not converge where few texts leave most axes without variance, on some processors.
    axes = np.linalg.eigh(centred.T @ centred).eigenvectors[:, ::-1][:, :width]  # of largest variance first
    rows = F.pad(torch.from_numpy(centred @ axes), (0, width - axes.shape[1]))
    return F.normalize(rows, dim=1).float() * norm


def glyph_bits(text: str) -> np.ndarray:
    """uint8 `[1024]`, 1 where there is ink."""
    cells = [_character(character) for character in text[:MOST_CHARACTERS]] or [_character(" ")]
    strip = Image.fromarray(np.concatenate(cells, axis=1))
    return (np.asarray(strip.resize((CELL, CELL), Image.Resampling.BOX)) > 127).astype(np.uint8).ravel()


@lru_cache(maxsize=4096)
def _character(character: str) -> np.ndarray:
    """Ink on nothing, uint8 `[32, 32]`; Pillow's own font draws a box for what it does not know."""
    cell = Image.new("L", (CELL, CELL))
    font = ImageFont.load_default(POINT_SIZE)
    ImageDraw.Draw(cell).text((CELL // 2, CELL // 2), character, fill=255, font=font, anchor="mm")
    return np.asarray(cell)


def texts_of_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """What the first ids stand for, as it is read; nothing for ids without a token."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(rows, len(tokenizer)))))
    texts = [tokenizer.convert_tokens_to_string([token]) for token in tokens]
    return texts + [""] * (rows - len(texts))
