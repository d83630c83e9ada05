"""Words: one to four capital letters, pronounceable but mostly not English, in colour on white."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image

from unimm.data.worlds.base import SIDE, Canvas, Example, World
from unimm.data.worlds.captions import word_captions
from unimm.scorers.facts import SceneFacts
from unimm.scorers.letters import CELL_HEIGHT, CELL_WIDTH, letter_coverage
from unimm.scorers.palette import COLOURS

CONSONANTS, VOWELS = "BCDFGHJKLMNPQRSTVWXYZ", "AEIOU"
PATTERNS = ("V", "CV", "VC", "CVC", "VCV", "CVCV", "CVVC", "CCVC", "CVCC", "VCVC")


def is_held_out_word(word: str) -> bool:
    """A tenth of all words."""
    return zlib.crc32(word.encode()) % 10 == 0


class WordsWorld(World):
    """`held_out` writes words that `train` never writes."""

    categories = {"word": 1.0}

    def compose(self, rng: np.random.Generator, category: str) -> Example:
        word = self._word(rng)
        while is_held_out_word(word) != self.held_out:
            word = self._word(rng)
        ink = list(COLOURS)[rng.integers(len(COLOURS))]
        facts = SceneFacts(word=word, ink=ink, ground="white")
        captions = word_captions(facts)
        return Example(render(facts), facts, category, captions[0], captions, questions(facts))

    def _word(self, rng: np.random.Generator) -> str:
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        pools = {"C": CONSONANTS, "V": VOWELS}
        return "".join(pools[kind][rng.integers(len(pools[kind]))] for kind in pattern)


def render(facts: SceneFacts) -> Image.Image:
    """The picture of a word; letter cells start at multiples of 16 pixels."""
    assert facts.word is not None
    assert facts.ink is not None
    canvas = Canvas(facts.ground)
    left, top = (SIDE - CELL_WIDTH * len(facts.word)) // 2, (SIDE - CELL_HEIGHT) // 2
    for position, letter in enumerate(facts.word):
        canvas.fill(letter_coverage(letter), COLOURS[facts.ink], left + position * CELL_WIDTH, top)
    return canvas.picture()


def questions(facts: SceneFacts) -> tuple[tuple[str, str], ...]:
    """Reverse tasks about a word."""
    return (("what does it say?", str(facts.word)), ("what color are the letters?", str(facts.ink)))
