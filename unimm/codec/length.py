"""Length-policy socket: which picture sizes a codec takes, and how many positions each becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class LengthPolicy(ABC):
    """Says which (rows, columns) grids are legal."""

    @abstractmethod
    def grids(self) -> list[tuple[int, int]]:
        """Every legal (rows, columns)."""

    @property
    def max_length(self) -> int:
        return max(rows * columns for rows, columns in self.grids())

    def grid(self, height: int, width: int, downsample: int) -> tuple[int, int]:
        """The grid of a picture of `height` x `width` pixels.

        Raises:
            ValueError: the codec cannot take this size.
        """
        found = (height // downsample, width // downsample)
        if height % downsample or width % downsample or found not in self.grids():
            legal = [f"{rows * downsample} x {columns * downsample}" for rows, columns in self.grids()]
            shown = ", ".join(legal[:8]) + (", ..." if len(legal) > 8 else "")
            raise ValueError(
                f"This codec cannot take a {height} x {width} picture (height x width); it takes {shown}. "
                "Its image processor resizes pictures to a legal size."
            )
        return found


@dataclass(frozen=True)
class FixedLength(LengthPolicy):
    """One size, the codec's own; `rows` x `columns` positions."""

    rows: int
    columns: int

    def grids(self) -> list[tuple[int, int]]:
        return [(self.rows, self.columns)]


@dataclass(frozen=True)
class ResolutionLength(LengthPolicy):
    """Every grid with `min_side` to `max_side` rows and columns and at most `max_positions` positions."""

    min_side: int
    max_side: int
    max_positions: int

    def grids(self) -> list[tuple[int, int]]:
        sides = range(self.min_side, self.max_side + 1)
        return [(rows, columns) for rows in sides for columns in sides if rows * columns <= self.max_positions]


LENGTH_POLICIES: dict[str, type[LengthPolicy]] = {"fixed": FixedLength, "resolution": ResolutionLength}
