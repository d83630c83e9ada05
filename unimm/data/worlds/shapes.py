"""Shapes: one, several alike, two in a relation, two side by side, in sixteen outlines and sixteen colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

from unimm.data.worlds.base import Canvas, Example, World, pick_ground, two_places
from unimm.data.worlds.captions import NUMBERS, PLURALS, shape_captions, shape_description, with_article
from unimm.scorers.facts import OPPOSITES, RELATIONS, SceneFacts, SceneObject
from unimm.scorers.outlines import SHAPES, coverage
from unimm.scorers.palette import COLOURS

# Boxes of 5, 3 and 2 cells of 16 pixels with a margin of 2; every box starts at a cell.
SINGLE_SIZE, SINGLE_LINES = 76, (56, 72)
PAIR_SIZE, PAIR_LINES, PAIR_MIDDLES = 44, (24, 104), (56, 72)
COUNT_SIZE, COUNT_LINES = 28, (16, 64, 112)  # centres of the 3 x 3 layout that counted objects stand on

_PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]
# Sixteen of the 256 pairs, one for every shape and every colour, so that every part of a held-out pair is well known.
HELD_OUT_PAIRS = frozenset(
    zip(SHAPES, (list(COLOURS)[(5 * turn + 3) % len(COLOURS)] for turn in range(len(SHAPES))), strict=True)
)
_SEEN_PAIRS = [pair for pair in _PAIRS if pair not in HELD_OUT_PAIRS]
_UNSEEN_PAIRS = [pair for pair in _PAIRS if pair in HELD_OUT_PAIRS]


class ShapesWorld(World):
    """Every object of a `held_out` scene is of a held-out pair, every object of a `train` scene of another."""

    categories = {"single": 0.2, "count": 0.3, "position": 0.25, "binding": 0.25}

    def compose(self, rng: np.random.Generator, category: str) -> Example:
        scene = {"single": self._single, "count": self._count, "position": self._two, "binding": self._two}[category]
        facts = scene(rng)
        if category == "binding":
            # Where no relation is stated, what is named first stands first.
            facts = SceneFacts(facts.in_reading_order(), ground=facts.ground)
        return Example(
            render(facts), facts, category, shape_description(facts), shape_captions(facts), questions(facts)
        )

    def _pair(self, rng: np.random.Generator) -> tuple[str, str]:
        pool = _UNSEEN_PAIRS if self.held_out else _SEEN_PAIRS
        return pool[rng.integers(len(pool))]

    def _single(self, rng: np.random.Generator) -> SceneFacts:
        shape, colour = self._pair(rng)
        x, y = (int(line) for line in rng.choice(SINGLE_LINES, size=2))
        return SceneFacts((SceneObject(shape, colour, (x, y), SINGLE_SIZE),), ground=pick_ground(rng))

    def _count(self, rng: np.random.Generator) -> SceneFacts:
        shape, colour = self._pair(rng)
        number = int(rng.integers(2, 5))
        cells = sorted(rng.choice(9, size=number, replace=False).tolist())
        places = [(COUNT_LINES[cell % 3], COUNT_LINES[cell // 3]) for cell in cells]
        objects = tuple(SceneObject(shape, colour, place, COUNT_SIZE) for place in places)
        return SceneFacts(objects, ground=pick_ground(rng))

    def _two(self, rng: np.random.Generator) -> SceneFacts:
        first = self._pair(rng)
        second = self._pair(rng)
        while second[0] == first[0] or second[1] == first[1]:
            second = self._pair(rng)
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        places = two_places(relation, PAIR_LINES, int(rng.choice(PAIR_MIDDLES)))
        objects = tuple(
            SceneObject(shape, colour, place, PAIR_SIZE)
            for (shape, colour), place in zip((first, second), places, strict=True)
        )
        return SceneFacts(objects, relation, ground=pick_ground(rng))


def render(facts: SceneFacts) -> Image.Image:
    """The picture of a shapes scene."""
    canvas = Canvas(facts.ground)
    for thing in facts.objects:
        assert thing.colour is not None
        left, top = (centre - thing.size // 2 for centre in thing.centre)
        canvas.fill(coverage(thing.name, thing.size), COLOURS[thing.colour], left, top)
    return canvas.picture()


def questions(facts: SceneFacts) -> tuple[tuple[str, str], ...]:
    """Reverse tasks about a shapes scene."""
    first = facts.objects[0]
    number = sum(thing.name == first.name for thing in facts.objects)
    asked = [(f"how many {PLURALS[first.name]} are there?", NUMBERS[number])]
    if number > 1:
        return (*asked, (f"what color are the {PLURALS[first.name]}?", str(first.colour)))
    asked += [(f"what color is the {thing.name}?", str(thing.colour)) for thing in facts.objects]
    asked += [(f"what shape is {thing.colour}?", thing.name) for thing in facts.objects]
    if facts.relation:
        one, other = facts.objects
        asked.append((f"what is {facts.relation} the {other.name}?", with_article(one.phrase)))
        asked.append((f"what is {OPPOSITES[facts.relation]} the {one.name}?", with_article(other.phrase)))
    return tuple(asked)
