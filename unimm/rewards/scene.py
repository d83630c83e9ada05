"""Rewards of shapes scenes: counted, named, coloured and placed, each from the pixels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from unimm.rewards.base import Drawing, Reward
from unimm.scorers.facts import SceneFacts
from unimm.scorers.scene import NO_SHAPE, find_objects, match_objects, stands, verify_scene


def is_shapes_scene(facts: SceneFacts) -> bool:
    return bool(facts.objects) and all(thing.colour is not None for thing in facts.objects)


def scene_parts(image: Image.Image, facts: SceneFacts) -> dict[str, float]:
    """Marks in [0, 1] for count, shapes, binding and, where one is stated, the relation.

    Everything is divided by the larger of the found and the wanted number, blobs count as objects too many, and a
    picture whose ground is not plain shows nothing, so that neither noise nor a picture full of shapes earns marks.
    """
    found = find_objects(image)
    wanted = facts.objects
    blobs = sum(thing.shape == NO_SHAPE for thing in found)
    miscounted = abs(len(found) - blobs - len(wanted)) + blobs
    pairs = match_objects(found, wanted)
    shaped = [f.shape == w.name for w, f in pairs]
    bound = [f.shape == w.name and f.colour == w.colour for w, f in pairs]
    most = max(len(found), len(wanted))
    parts = {
        "count": max(0.0, 1 - miscounted / len(wanted)),
        "shapes": sum(shaped) / most,
        "binding": sum(bound) / most,
    }
    if facts.relation:
        placed = len(pairs) == 2 and all(shaped) and stands(pairs[0][1].centre, pairs[1][1].centre, facts.relation)
        parts["relation"] = placed * len(wanted) / most
    return parts


def _graded(images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
    parts = [scene_parts(image, drawing.facts) for image, drawing in zip(images, drawings, strict=True)]
    return [sum(marks.values()) / len(marks) for marks in parts]


def _exact(images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
    return [float(verify_scene(image, drawing.facts).exact) for image, drawing in zip(images, drawings, strict=True)]


scene = Reward("scene", 0.0, 1.0, is_shapes_scene, _graded)
scene_exact = Reward("scene_exact", 0.0, 1.0, is_shapes_scene, _exact)
