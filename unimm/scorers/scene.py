"""Judge of shapes scenes: finds the objects in the pixels and compares them with the facts, without a model.

Ground by the border's median, objects by connected components, colour by the nearest palette entry of the interior,
shape by the overlap of the object's box with each outline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from unimm.scorers.facts import RELATIONS, SceneFacts, SceneObject
from unimm.scorers.outlines import SHAPES, coverage
from unimm.scorers.palette import nearest_colour, to_lab

FOREGROUND_DISTANCE = 18.0  # CIE Lab
MIN_AREA = 60  # pixels
BORDER = 3
MAX_BORDER_INK = 0.1
TEMPLATE_SIDE = 32
TOLERANCE = 10.0  # pixels of a side by which an object may miss the best outline; a blob that misses more has no shape
NO_SHAPE = "blob"


@dataclass(frozen=True)
class FoundObject:
    """An object in the pixels; `shape` is `blob` where no outline fits, `centre` is (x, y) of its box."""

    shape: str
    colour: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class SceneVerdict:
    """What holds of the picture.

    Args:
        count: as many objects as the facts name.
        shapes: the same shapes, whatever their colours.
        binding: every object has its own shape and colour.
        relation: the first object stands to the second as stated; True where nothing is stated.
    """

    count: bool
    shapes: bool
    binding: bool
    relation: bool

    @property
    def exact(self) -> bool:
        return self.count and self.binding and self.relation


def foreground(image: Image.Image) -> np.ndarray:
    """Where the picture differs from its border's median colour, bool `[H, W]`."""
    lab = to_lab(np.asarray(image.convert("RGB")))
    return np.linalg.norm(lab - _border_median(lab), axis=-1) > FOREGROUND_DISTANCE


def has_clean_border(ink: np.ndarray) -> bool:
    """Whether the ground of a picture with this `foreground` is plain: at most a tenth of its border is ink."""
    border = np.ones_like(ink)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return float(ink[border].mean()) <= MAX_BORDER_INK


def find_objects(image: Image.Image) -> list[FoundObject]:
    """Every object of at least 60 pixels; none where the ground is not plain, so that noise shows nothing."""
    ink = foreground(image)
    if not has_clean_border(ink):
        return []
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    ground = _border_median(pixels)
    labels, _ = ndimage.label(ink, structure=np.ones((3, 3)))
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        tinted = labels[box] == index
        if tinted.sum() < MIN_AREA:
            continue
        interior = ndimage.binary_erosion(tinted, iterations=2)
        colour = np.median(pixels[box][interior if interior.any() else tinted], axis=0)
        step = colour - ground
        # The share of a pixel that is covered; the median of a patchwork may be the ground itself, which covers none.
        share = tinted * np.clip((pixels[box] - ground) @ step / max(step @ step, 1.0), 0, 1)
        plain = share.max() > 0.5
        rows, columns = _extent(share if plain else tinted)
        shape = _nearest_shape(share[rows, columns]) if plain else NO_SHAPE
        centre = (box[1].start + (columns.start + columns.stop) / 2, box[0].start + (rows.start + rows.stop) / 2)
        found.append(FoundObject(shape, nearest_colour(colour), centre))
    return found


def verify_scene(image: Image.Image, facts: SceneFacts) -> SceneVerdict:
    """Compare a picture with the facts of a shapes scene."""
    found, wanted = find_objects(image), facts.objects
    if len(found) < len(wanted):
        return SceneVerdict(False, False, False, False)
    pairs = match_objects(found, wanted)
    same_number = len(found) == len(wanted)
    shapes = same_number and sorted(f.shape for f in found) == sorted(w.name for w in wanted)
    binding = same_number and all(f.shape == w.name and f.colour == w.colour for w, f in pairs)
    relation = True
    if facts.relation:
        (_, one), (_, other) = pairs
        right = all(f.shape == w.name for w, f in pairs)
        relation = stands(one.centre, other.centre, facts.relation) and right
    return SceneVerdict(same_number, shapes, binding, relation)


def match_objects(found: Sequence[FoundObject], wanted: Sequence[SceneObject]) -> list[tuple[SceneObject, FoundObject]]:
    """The best one-to-one assignment, in the order of `wanted`; what finds no partner is left out.

    A wrong shape costs more than a wrong colour, so that "red cube, blue ball" is not met by the swap.
    """
    if not found or not wanted:
        return []
    cost = np.array([[2 * (w.name != f.shape) + (w.colour != f.colour) for f in found] for w in wanted])
    rows, columns = linear_sum_assignment(cost)
    return [(wanted[row], found[column]) for row, column in zip(rows, columns, strict=True)]


def stands(one: tuple[float, float], other: tuple[float, float], relation: str) -> bool:
    """Whether one centre is left of, right of, above or below another, that axis being the larger difference."""
    across, down = RELATIONS[relation]
    dx, dy = one[0] - other[0], one[1] - other[1]
    return dx * across > abs(dy) if across else dy * down > abs(dx)


def _border_median(pixels: np.ndarray) -> np.ndarray:
    edges = (pixels[:BORDER], pixels[-BORDER:], pixels[:, :BORDER], pixels[:, -BORDER:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _nearest_shape(share: np.ndarray) -> str:
    boxed = _to_template(share)
    overlaps = [
        np.minimum(boxed, template).sum() / np.maximum(boxed, template).sum() for template in _shape_templates()
    ]
    best = int(np.argmax(overlaps))
    return SHAPES[best] if overlaps[best] >= 1 - TOLERANCE / max(share.shape) else NO_SHAPE


@lru_cache(maxsize=1)
def _shape_templates() -> tuple[np.ndarray, ...]:
    shares = [coverage(shape, 64) for shape in SHAPES]
    return tuple(_to_template(share[_extent(share)]) for share in shares)


def _extent(share: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around what is covered by more than half."""
    mask = share > 0.5
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _to_template(share: np.ndarray) -> np.ndarray:
    """A box's coverage at template size, keeping its proportions' stretch to the square."""
    image = Image.fromarray((share * 255).astype(np.uint8)).resize((TEMPLATE_SIDE, TEMPLATE_SIDE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255
