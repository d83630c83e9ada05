"""What a rendered picture shows, exactly: the ground truth that captions state and judges check."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class SceneObject:
    """One thing in a picture.

    Args:
        name: a shape (`heart`) or the name of an emoji (`red apple`).
        colour: of a shape; None for an emoji.
        centre: (x, y) in pixels.
        size: side of the object's box in pixels.
    """

    name: str
    colour: str | None
    centre: tuple[int, int]
    size: int

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.name}" if self.colour else self.name


@dataclass(frozen=True)
class SceneFacts:
    """Everything that a judge may ask.

    Args:
        objects: in the order in which the caption names them.
        relation: of the first object to the second, a key of `RELATIONS`, or None.
        word: the written word, or None.
        ink: colour of the word, or None.
        ground: name of the background colour.
    """

    objects: tuple[SceneObject, ...] = ()
    relation: str | None = None
    word: str | None = None
    ink: str | None = None
    ground: str = "white"

    def in_reading_order(self) -> tuple[SceneObject, ...]:
        """The objects from top to bottom, then from left to right."""
        return tuple(sorted(self.objects, key=lambda thing: (thing.centre[1], thing.centre[0])))

    @property
    def runs_across(self) -> bool:
        """Whether the objects stand beside each other rather than on top of each other."""
        return len({thing.centre[1] for thing in self.objects}) == 1

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SceneFacts:
        data = json.loads(text)
        objects = tuple(SceneObject(**{**item, "centre": tuple(item["centre"])}) for item in data.pop("objects"))
        return cls(objects=objects, **data)
