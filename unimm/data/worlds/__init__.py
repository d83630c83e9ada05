"""Three rendered worlds whose every picture carries its exact facts.

A world is stateless: `world.example(index)` depends on the seed, the split and the index alone.
"""

from unimm.data.worlds.base import Example, World
from unimm.data.worlds.captions import parse_caption
from unimm.data.worlds.emoji import EmojiWorld
from unimm.data.worlds.shapes import HELD_OUT_PAIRS, ShapesWorld
from unimm.data.worlds.words import WordsWorld, is_held_out_word

WORLDS: dict[str, type[World]] = {"shapes": ShapesWorld, "emoji": EmojiWorld, "words": WordsWorld}

__all__ = [
    "HELD_OUT_PAIRS",
    "WORLDS",
    "EmojiWorld",
    "Example",
    "ShapesWorld",
    "WordsWorld",
    "World",
    "is_held_out_word",
    "parse_caption",
]
