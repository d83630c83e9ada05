"""Emoji: one glyph, or two in a relation."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

from unimm.data.worlds.base import SIDE, Canvas, Example, World, two_places
from unimm.data.worlds.captions import emoji_captions, emoji_description
from unimm.scorers.emoji import SINGLE_SIZE
from unimm.scorers.facts import RELATIONS, SceneFacts, SceneObject
from unimm.scorers.glyphs import Glyph, catalog, world_glyphs
from unimm.scorers.palette import GROUNDS

PAIR_SIZE, PAIR_LINES = 56, (32, 96)


@lru_cache(maxsize=1)
def glyphs_by_name() -> dict[str, Glyph]:
    return {glyph.name: glyph for glyph in world_glyphs()}


def held_out_ground(name: str) -> str:
    """The one ground on which `train` never shows a glyph alone."""
    return list(GROUNDS)[zlib.crc32(name.encode()) % len(GROUNDS)]


def is_held_out_pair(first: str, second: str) -> bool:
    """A tenth of all unordered pairs."""
    return zlib.crc32(" ".join(sorted((first, second))).encode()) % 10 == 0


class EmojiWorld(World):
    """`held_out` shows a glyph on its held-out ground, or a held-out pair.

    Raises:
        FileNotFoundError: the emoji font is not installed.
    """

    categories = {"emoji": 0.75, "emoji_pair": 0.25}

    def compose(self, rng: np.random.Generator, category: str) -> Example:
        facts = self._one(rng) if category == "emoji" else self._two(rng)
        return Example(
            render(facts), facts, category, emoji_description(facts), emoji_captions(facts), questions(facts)
        )

    def _name(self, rng: np.random.Generator) -> str:
        glyphs = world_glyphs()
        return glyphs[rng.integers(len(glyphs))].name

    def _one(self, rng: np.random.Generator) -> SceneFacts:
        name = self._name(rng)
        unseen = held_out_ground(name)
        seen = [ground for ground in GROUNDS if ground != unseen]
        ground = unseen if self.held_out else seen[rng.integers(len(seen))]
        return SceneFacts((SceneObject(name, None, (SIDE // 2, SIDE // 2), SINGLE_SIZE),), ground=ground)

    def _two(self, rng: np.random.Generator) -> SceneFacts:
        first, second = self._name(rng), self._name(rng)
        while first == second or is_held_out_pair(first, second) != self.held_out:
            first, second = self._name(rng), self._name(rng)
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        places = two_places(relation, PAIR_LINES, SIDE // 2)
        objects = tuple(
            SceneObject(name, None, place, PAIR_SIZE) for name, place in zip((first, second), places, strict=True)
        )
        return SceneFacts(objects, relation, ground="white")


def render(facts: SceneFacts) -> Image.Image:
    """The picture of an emoji scene."""
    canvas = Canvas(facts.ground)
    for thing in facts.objects:
        pixels = catalog().resized(glyphs_by_name()[thing.name].characters, thing.size)
        left, top = (centre - thing.size // 2 for centre in thing.centre)
        canvas.lay(pixels[..., :3] * 255, pixels[..., 3], left, top)
    return canvas.picture()


def questions(facts: SceneFacts) -> tuple[tuple[str, str], ...]:
    """Reverse tasks about an emoji scene."""
    if not facts.relation:
        return (("what emoji is this?", facts.objects[0].name),)
    ordered = sorted(facts.objects, key=lambda thing: thing.centre)
    sides = (
        ("on the left", "on the right")
        if facts.relation in ("left of", "right of")
        else ("at the top", "at the bottom")
    )
    return tuple((f"what is {side}?", thing.name) for side, thing in zip(sides, ordered, strict=True))
