"""Levels of a picture: runs of codes that are drawn at once, given those of the levels before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Levels:
    """Levels by their sizes.

    Args:
        sizes: codes of every level in turn; the last size goes on to the end of the picture. Codes of all slots count:
            `(2,)` draws the two codes of a position at once, `(1, 1, 2, 4, 8)` a pyramid.

    Raises:
        ValueError: no size, or one below 1.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"levels are {list(self.sizes)}; give the codes of every level in turn, 1 or more each.")

    def starts(self, total: int) -> list[int]:
        """For each of `total` codes, the first code of its level."""
        starts: list[int] = []
        level = 0
        while len(starts) < total:
            starts += [len(starts)] * self.sizes[min(level, len(self.sizes) - 1)]
            level += 1
        return starts[:total]
