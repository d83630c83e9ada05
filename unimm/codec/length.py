"""Length-policy socket: which picture sizes a codec takes, and how many positions each becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrangement:
    """How the codes of one picture lie.

    Args:
        rows, columns: of the codes; a sequence is one row.
        pool: cells of the encoder's grid, per side, that were averaged into one position.
        codes: how many there are, where they do not lie as `rows` x `columns`; 0 where they do.
        adaptive: whether cells are averaged so that they lie as `rows` x `columns`, whatever the encoder's grid.
    """

    rows: int
    columns: int
    pool: int = 1
    codes: int = 0
    adaptive: bool = False

    @property
    def length(self) -> int:
        return self.codes or self.rows * self.columns


class LengthPolicy(ABC):
    """Says which (rows, columns) grids are legal, and how many positions a picture becomes."""

    filled = (
        False  # whether positions without a code are filled, so that the decoder sees as many whatever their number
    )

    @abstractmethod
    def grids(self) -> list[tuple[int, int]]:
        """Every legal (rows, columns) of the encoder's grid."""

    def takes(self, grid: tuple[int, int]) -> bool:
        return grid in self.grids()

    @property
    def layout(self) -> str:
        return "grid"

    @property
    def ragged(self) -> bool:
        """Whether pictures of one size may have different numbers of codes."""
        return False

    @property
    def max_length(self) -> int:
        return max(rows * columns for rows, columns in self.grids())

    @property
    def max_learned(self) -> int:
        """The most positions that training decodes."""
        return self.max_length

    @property
    def min_length(self) -> int:
        """The fewest codes of a picture, where they lie on no grid; all numbers up to `max_length` are legal."""
        return self.max_length

    def grid(self, height: int, width: int, downsample: int) -> tuple[int, int]:
        """The encoder's grid of a picture of `height` x `width` pixels.

        Raises:
            ValueError: the codec cannot take this size.
        """
        found = (height // downsample, width // downsample)
        if height % downsample or width % downsample or not self.takes(found):
            legal = [f"{rows * downsample} x {columns * downsample}" for rows, columns in self.grids()]
            shown = ", ".join(legal[:8]) + (", ..." if len(legal) > 8 else "")
            raise ValueError(
                f"This codec cannot take a {height} x {width} picture (height x width); it takes {shown}. "
                "Its image processor resizes pictures to a legal size."
            )
        return found

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        """How the codes of a picture with this encoder grid lie.

        Raises:
            ValueError: the codec cannot make `num_tokens` of it.
        """
        if num_tokens is not None and num_tokens != grid[0] * grid[1]:
            raise ValueError(
                f"num_tokens is {num_tokens}; this codec always makes {grid[0] * grid[1]} of such a picture."
            )
        return Arrangement(*grid)

    def arrange_learned(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        """As `arrange`, of a step of training.

        Raises:
            ValueError: the codec cannot learn `num_tokens`.
        """
        return self.arrange(grid, num_tokens)

    def drawn_grid(self, length: int) -> tuple[int, int]:
        """(rows, columns) of what `length` codes without a grid of their own are looked up as."""
        return 1, length

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise `ValueError` where no picture of this codec has codes on a grid of (rows, columns)."""
        if not self.takes(grid):
            raise self._no_grid(grid, self.grids())

    def _no_grid(self, grid: tuple[int, int], legal: list[tuple[int, int]]) -> ValueError:
        shown = ", ".join(f"{rows} x {columns}" for rows, columns in legal[:8]) + (", ..." if len(legal) > 8 else "")
        return ValueError(f"Codes lie on a grid of {grid[0]} x {grid[1]}; this codec decodes {shown}.")

    def check_length(self, length: int) -> None:
        """Raise `ValueError` where no picture of this codec has `length` codes."""
        if not 1 <= length <= self.max_length:
            raise ValueError(f"There are {length} codes per picture; this codec decodes 1 to {self.max_length}.")


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

    def takes(self, grid: tuple[int, int]) -> bool:
        sides_fit = all(self.min_side <= side <= self.max_side for side in grid)
        return sides_fit and grid[0] * grid[1] <= self.max_positions


@dataclass(frozen=True)
class SequenceLength(LengthPolicy):
    """A picture of one size becomes a sequence.

    Args:
        rows, columns: of the encoder's grid.
        tokens: length of the sequence.
        prefixes: whether the first codes alone stand for the picture too, more coarsely (One-D-Piece, 2501.10064).
        filled: whether the decoder sees as many positions whatever the number of codes, those without a code as one
            learned vector (nested dropout, 1402.0915), so that pictures of several lengths are decoded together; else
            it sees the codes alone.
        padding: latents behind those of the codes, which training alone decodes, where it is asked for more than
            `tokens`; what they learn to hold, the codes need not (ReToK, 2601.01535). The resampler and the decoder
            have `tokens + padding` positions.

    Raises:
        ValueError: filled or padding, where all pictures have all codes.
    """

    rows: int
    columns: int
    tokens: int
    prefixes: bool = False
    filled: bool = False
    padding: int = 0

    def __post_init__(self) -> None:
        if self.filled and not self.prefixes:
            raise ValueError("length.filled fills positions without codes; set prefixes: true, or leave it out.")
        if self.padding < 0 or (self.padding and not self.prefixes):
            raise ValueError(
                f"length.padding is {self.padding}; it is 0 or more, and where there is some only the first latents "
                "are codes: set prefixes: true, or leave it out."
            )

    def grids(self) -> list[tuple[int, int]]:
        return [(self.rows, self.columns)]

    @property
    def layout(self) -> str:
        return "sequence"

    @property
    def max_length(self) -> int:
        return self.tokens

    @property
    def max_learned(self) -> int:
        return self.tokens + self.padding

    @property
    def min_length(self) -> int:
        return 1 if self.prefixes else self.tokens

    def arrange_learned(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        if not self.padding or num_tokens is None or num_tokens <= self.tokens:
            return self.arrange(grid, num_tokens)
        if num_tokens > self.max_learned:
            raise ValueError(
                f"num_tokens is {num_tokens}; this codec has {self.max_learned} latents, with those of length.padding."
            )
        return Arrangement(1, num_tokens)

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        length = self.tokens if num_tokens is None else num_tokens
        self.check_length(length)
        return Arrangement(1, length)

    def check_length(self, length: int) -> None:
        if not self.min_length <= length <= self.tokens:
            legal = f"1 to {self.tokens}" if self.prefixes else f"exactly {self.tokens}"
            raise ValueError(f"There are {length} codes per picture; this codec makes and decodes {legal}.")


@dataclass(frozen=True)
class AnySequenceLength(LengthPolicy):
    """A picture of any size becomes a sequence of one length (Instella-T2I, 2506.21022).

    Args:
        tokens: length of the sequence.
        step: what rows and columns of the encoder's grid must be multiples of.
        max_side: the most of them.
    """

    tokens: int
    step: int = 1
    max_side: int = 64

    def grids(self) -> list[tuple[int, int]]:
        sides = range(self.step, self.max_side + 1, self.step)
        return [(rows, columns) for rows in sides for columns in sides]

    def takes(self, grid: tuple[int, int]) -> bool:
        return all(side % self.step == 0 and self.step <= side <= self.max_side for side in grid)

    @property
    def layout(self) -> str:
        return "sequence"

    @property
    def max_length(self) -> int:
        return self.tokens

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        if num_tokens is not None:
            self.check_length(num_tokens)
        return Arrangement(1, self.tokens)

    def check_length(self, length: int) -> None:
        if length != self.tokens:
            raise ValueError(
                f"There are {length} codes per picture; this codec makes and decodes exactly {self.tokens}."
            )


@dataclass(frozen=True)
class PooledLength(LengthPolicy):
    """A picture of one size at several lengths: its grid averaged by each factor of `pools` (TA-Tok, 2506.18898)."""

    rows: int
    columns: int
    pools: tuple[int, ...] = (1, 2, 3)

    def grids(self) -> list[tuple[int, int]]:
        return [(self.rows, self.columns)]

    def grid(self, height: int, width: int, downsample: int) -> tuple[int, int]:
        # Its tower drops the pixels at the right and bottom that make no whole patch (384 are 27 patches of 14).
        return super().grid(height - height % downsample, width - width % downsample, downsample)

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        arrangements = {found.length: found for found in self._arrangements()}
        wanted = max(arrangements) if num_tokens is None else num_tokens
        if wanted not in arrangements:
            legal = ", ".join(map(str, sorted(arrangements)))
            raise ValueError(f"num_tokens is {num_tokens}; this codec makes {legal} of a picture.")
        return arrangements[wanted]

    def check_grid(self, grid: tuple[int, int]) -> None:
        legal = [(found.rows, found.columns) for found in self._arrangements()]
        if grid not in legal:
            raise self._no_grid(grid, legal)

    def check_length(self, length: int) -> None:
        self.arrange((self.rows, self.columns), length)

    def _arrangements(self) -> list[Arrangement]:
        fitting = [pool for pool in self.pools if pool <= min(self.rows, self.columns)]
        return [Arrangement(self.rows // pool, self.columns // pool, pool) for pool in fitting]


@dataclass(frozen=True)
class AdaptiveLength(LengthPolicy):
    """A picture of one size at its own length, or at that of any smaller square, whose cells are averages of those of
    the encoder's grid that they lie over (TokenFLEX, 2504.03154).

    Args:
        rows, columns: of the encoder's grid.
    """

    rows: int
    columns: int

    def grids(self) -> list[tuple[int, int]]:
        return [(self.rows, self.columns)]

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        if num_tokens is None or num_tokens == self.rows * self.columns:
            return Arrangement(*grid)
        found = [(rows, columns) for rows, columns in self._squares() if rows * columns == num_tokens]
        if not found:
            side = min(self.rows, self.columns)
            raise ValueError(
                f"num_tokens is {num_tokens}; this codec makes {self.rows * self.columns} of a picture, or the square "
                f"of 1 to {side}."
            )
        return Arrangement(*found[0], adaptive=True)

    def check_grid(self, grid: tuple[int, int]) -> None:
        legal = [*self.grids(), *self._squares()]
        if grid not in legal:
            raise self._no_grid(grid, legal)

    def check_length(self, length: int) -> None:
        self.arrange((self.rows, self.columns), length)

    def _squares(self) -> list[tuple[int, int]]:
        return [(side, side) for side in range(1, min(self.rows, self.columns) + 1)]


@dataclass(frozen=True)
class LevelsLength(LengthPolicy):
    """A picture of one size becomes square grids of rising sides, one after the other (VAR, 2404.02905).

    Args:
        sides: coarse to fine; the last is that of the encoder's grid.
    """

    sides: tuple[int, ...]

    def grids(self) -> list[tuple[int, int]]:
        return [(self.sides[-1], self.sides[-1])]

    @property
    def layout(self) -> str:
        return "levels"

    @property
    def max_length(self) -> int:
        return sum(side * side for side in self.sides)

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        if num_tokens is not None:
            self.check_length(num_tokens)
        return Arrangement(*grid, codes=self.max_length)

    def drawn_grid(self, length: int) -> tuple[int, int]:
        return self.sides[-1], self.sides[-1]

    def check_length(self, length: int) -> None:
        if length != self.max_length:
            raise ValueError(
                f"There are {length} codes per picture; this codec makes and decodes exactly {self.max_length}, "
                f"of squares of {', '.join(map(str, self.sides))}."
            )


@dataclass(frozen=True)
class KeptLength(LengthPolicy):
    """A picture of one size has as many codes as the resampler keeps of its cells (LaVIT, 2309.04669)."""

    rows: int
    columns: int

    def grids(self) -> list[tuple[int, int]]:
        return [(self.rows, self.columns)]

    @property
    def layout(self) -> str:
        return "sequence"

    @property
    def ragged(self) -> bool:
        return True

    @property
    def min_length(self) -> int:
        return 1

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        if num_tokens is not None:
            raise ValueError(f"num_tokens is {num_tokens}; how many codes this codec makes is up to the picture.")
        return Arrangement(1, self.max_length)


@dataclass(frozen=True)
class HaltedLength(KeptLength):
    """The same of the latents that a picture may have, which halt where it does not need them (KARL, 2507.07995).

    Args:
        rows, columns: of the encoder's grid.
        tokens: the most latents.
        budget: latents of a picture unless `num_tokens` says otherwise; at least one of them is kept.
    """

    tokens: int
    budget: int

    def __post_init__(self) -> None:
        self.arrange((self.rows, self.columns), self.budget)

    @property
    def max_length(self) -> int:
        return self.tokens

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        length = self.budget if num_tokens is None else num_tokens
        if not 1 <= length <= self.tokens:
            raise ValueError(f"num_tokens is {length}; a picture has 1 to {self.tokens} latents.")
        return Arrangement(1, length)


# Picture sizes that the coarse stream is not read at the nearest smaller one of, and what it is read at (2504.01934).
COARSE_SIZES = {
    (512, 384): (448, 336),
    (768, 384): (728, 364),
    (384, 576): (336, 504),
    (960, 320): (924, 308),
}
COARSE_SIZES |= {size[::-1]: read[::-1] for size, read in COARSE_SIZES.items()}


def coarse_grid(height: int, width: int, cell: int) -> tuple[int, int]:
    """(rows, columns) of cells of `cell` pixels a side, at least one, that a picture is stretched to."""
    height, width = COARSE_SIZES.get((height, width), (height, width))
    return max(1, height // cell), max(1, width // cell)


@dataclass(frozen=True)
class StreamsLength(LengthPolicy):
    """A picture of any size becomes two grids, one behind the other (DualViTok, 2504.01934).

    Args:
        cell, coarse_cell: pixels per side of a cell of the second and of the first.
        max_side: the most rows or columns of the second.
    """

    cell: int = 16
    coarse_cell: int = 28
    max_side: int = 64

    def grids(self) -> list[tuple[int, int]]:
        sides = range(1, self.max_side + 1)
        return [(rows, columns) for rows in sides for columns in sides]

    def takes(self, grid: tuple[int, int]) -> bool:
        return all(1 <= side <= self.max_side for side in grid)

    @property
    def layout(self) -> str:
        return "streams"

    @property
    def max_length(self) -> int:
        return self._length(self.max_side, self.max_side)

    @property
    def min_length(self) -> int:
        return self._length(1, 1)

    def arrange(self, grid: tuple[int, int], num_tokens: int | None) -> Arrangement:
        length = self._length(*grid)
        if num_tokens not in (None, length):
            raise ValueError(f"num_tokens is {num_tokens}; this codec always makes {length} of such a picture.")
        return Arrangement(1, length)

    def _length(self, rows: int, columns: int) -> int:
        coarse_rows, coarse_columns = coarse_grid(rows * self.cell, columns * self.cell, self.coarse_cell)
        return coarse_rows * coarse_columns + rows * columns


LENGTH_POLICIES: dict[str, type[LengthPolicy]] = {
    "fixed": FixedLength,
    "resolution": ResolutionLength,
    "sequence": SequenceLength,
    "any_sequence": AnySequenceLength,
    "pooled": PooledLength,
    "adaptive": AdaptiveLength,
    "levels": LevelsLength,
    "kept": KeptLength,
    "streams": StreamsLength,
    "halted": HaltedLength,
}
