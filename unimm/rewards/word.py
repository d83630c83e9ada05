"""Rewards of written words: read from the ink, exactly or by edit distance, and in the right colour."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from unimm.rewards.base import Drawing, Reward
from unimm.scorers.facts import SceneFacts
from unimm.scorers.scene import foreground, has_clean_border
from unimm.scorers.word import ink_colour, read_word, stray_ink

MAX_STRAY = 0.1  # of the ink may lie beside the word; more is spam, which earns nothing


def has_word(facts: SceneFacts) -> bool:
    return facts.word is not None


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and substitutions (Levenshtein, 1966) between two strings."""
    row = list(range(len(other) + 1))
    for index, letter in enumerate(one, start=1):
        previous, row[0] = row[0], index
        for column, wanted in enumerate(other, start=1):
            previous, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, previous + (letter != wanted)),
            )
    return row[-1]


def clean_reading(image: Image.Image) -> str | None:
    """The word in the middle of a picture; None where there is none, or other ink beside it."""
    reading = read_word(image)
    return reading if reading and stray_ink(image, len(reading)) <= MAX_STRAY else None


def _similar(images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
    scores = []
    for image, drawing in zip(images, drawings, strict=True):
        reading, wanted = clean_reading(image) or "", drawing.facts.word or ""
        scores.append(1 - edit_distance(reading, wanted) / max(len(reading), len(wanted)))
    return scores


def _exact(images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
    return [float(clean_reading(image) == drawing.facts.word) for image, drawing in zip(images, drawings, strict=True)]


def _ink(images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
    return [
        float(has_clean_border(foreground(image)) and ink_colour(image) == drawing.facts.ink)
        for image, drawing in zip(images, drawings, strict=True)
    ]


word = Reward("word", 0.0, 1.0, has_word, _similar)
word_exact = Reward("word_exact", 0.0, 1.0, has_word, _exact)
ink = Reward("ink", 0.0, 1.0, has_word, _ink)
