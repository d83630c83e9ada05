"""Which pictures are legal, and how their sizes are spelled between `<boi>` and the codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SpanShape:
    """One legal picture.

    Args:
        grid: (rows, columns), or None for a 1-D code.
        prefix: text or special ids that spell the size after `<boi>`; empty where the codec makes one size only.
        min_positions, max_positions: legal numbers of positions, of K codes each.
    """

    grid: tuple[int, int] | None
    prefix: tuple[int, ...]
    min_positions: int
    max_positions: int


@dataclass(frozen=True)
class SpelledSizes:
    """Pictures of every size within bounds, spelled as rows and columns in decimal.

    Args:
        rows, columns: lowest and highest number.
        digits: ids of the ten digits.
        between, end: ids after the rows and after the columns; their first ones are no digits.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    digits: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]

    def shapes(self) -> tuple[SpanShape, ...]:
        """All of them."""
        return tuple(
            SpanShape((rows, columns), self._prefix(rows, columns), rows * columns, rows * columns)
            for rows in range(self.rows[0], self.rows[1] + 1)
            for columns in range(self.columns[0], self.columns[1] + 1)
        )

    def _prefix(self, rows: int, columns: int) -> tuple[int, ...]:
        row_ids, column_ids = (tuple(self.digits[int(digit)] for digit in str(side)) for side in (rows, columns))
        return (*row_ids, *self.between, *column_ids, *self.end)


def read_shapes(listed: Iterable[Mapping[str, Any]], spelled: Mapping[str, Any] | None) -> tuple[SpanShape, ...]:
    """The shapes that a configuration file lists, and those that it gives by their bounds.

    Raises:
        ValueError: bounds or ids that are not ten digits and two limits.
    """
    shapes = tuple(
        SpanShape(
            grid=tuple(shape["grid"]) if shape["grid"] else None,
            prefix=tuple(shape["prefix"]),
            min_positions=shape["min_positions"],
            max_positions=shape["max_positions"],
        )
        for shape in listed
    )
    if spelled is None:
        return shapes
    sizes = SpelledSizes(**{name: tuple(value) for name, value in spelled.items()})
    legal = all(len(bounds) == 2 and 1 <= bounds[0] <= bounds[1] for bounds in (sizes.rows, sizes.columns))
    if not legal or len(sizes.digits) != 10:
        raise ValueError(
            f"spelled_sizes are {dict(spelled)}; name a lowest and a highest of each side, and ten digits."
        )
    return (*shapes, *sizes.shapes())


def shape_fields(shape: SpanShape) -> dict[str, Any]:
    """What `read_shapes` reads back."""
    return {
        "grid": list(shape.grid) if shape.grid else None,
        "prefix": list(shape.prefix),
        "min_positions": shape.min_positions,
        "max_positions": shape.max_positions,
    }
