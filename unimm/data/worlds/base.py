"""What every world shares: the example, the seeding and the canvas."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unimm.scorers.facts import SceneFacts
from unimm.scorers.palette import GROUNDS

SIDE = 128  # pixels
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Example:
    """A picture and all that is known of it.

    Args:
        image: RGB, `SIDE` x `SIDE`.
        facts: the ground truth.
        category: what the example exercises, one of the world's `categories`.
        description: what a reader should say; it follows from the pixels alone, so that there is one right answer.
        captions: phrasings of the facts; the first is canonical and every one is read back by `parse_caption`.
        questions: (question, answer) pairs about the picture.
    """

    image: Image.Image
    facts: SceneFacts
    category: str
    description: str
    captions: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


class World(ABC):
    """A seeded stream of examples; `categories` maps the name of each to its share.

    Args:
        split: `train`, or `held_out` for combinations that `train` never shows.
        seed: streams of different seeds are independent.

    Raises:
        ValueError: unknown split.
    """

    categories: dict[str, float]

    def __init__(self, *, split: str = "train", seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
        self.split = split
        self.seed = seed

    @property
    def held_out(self) -> bool:
        return self.split == "held_out"

    def example(self, index: int, *, category: str | None = None) -> Example:
        """The example of this index, of the named category or of one drawn at random.

        Raises:
            ValueError: unknown category.
        """
        name = f"{type(self).__name__} {self.split} {category}"
        rng = np.random.default_rng([self.seed, index, zlib.crc32(name.encode())])
        category = category or str(rng.choice(list(self.categories), p=list(self.categories.values())))
        if category not in self.categories:
            raise ValueError(f"category is {category!r}; this world has {', '.join(self.categories)}.")
        return self.compose(rng, category)

    @abstractmethod
    def compose(self, rng: np.random.Generator, category: str) -> Example:
        """Draw the facts of a category and render them."""


class Canvas:
    """A float picture to lay coverage masks on."""

    def __init__(self, ground: str) -> None:
        self.pixels = np.empty((SIDE, SIDE, 3), dtype=np.float32)
        self.pixels[:] = GROUNDS[ground]

    def fill(self, coverage: np.ndarray, colour: tuple[int, int, int], left: int, top: int) -> None:
        """Blend one colour in where `coverage` `[h, w]` says."""
        self.lay(coverage[..., None] * np.asarray(colour, dtype=np.float32), coverage, left, top)

    def lay(self, premultiplied: np.ndarray, coverage: np.ndarray, left: int, top: int) -> None:
        """Lay premultiplied colour `[h, w, 3]` in [0, 255] over the canvas; what leaves the canvas is cut."""
        height, width = coverage.shape
        rows, columns = slice(max(top, 0), min(top + height, SIDE)), slice(max(left, 0), min(left + width, SIDE))
        inner = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        area = self.pixels[rows, columns]
        area *= 1 - coverage[inner][..., None]
        area += premultiplied[inner]

    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels.round().clip(0, 255).astype(np.uint8))


def pick_ground(rng: np.random.Generator) -> str:
    names = list(GROUNDS)
    return names[rng.integers(len(names))]


def two_places(relation: str, lines: tuple[int, int], middle: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Centres of two objects in a relation: on two `lines` along its axis, on `middle` across."""
    near, far = lines
    places = {
        "left of": ((near, middle), (far, middle)),
        "right of": ((far, middle), (near, middle)),
        "above": ((middle, near), (middle, far)),
        "below": ((middle, far), (middle, near)),
    }
    return places[relation]
