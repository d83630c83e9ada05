"""What an image is to the rest of the house: a block of integer codes, and the space they live in.

`VisualCodes` travels between the rooms, `CodeSpec` says what a codec can emit. Neither knows token ids: the offset into
a language model's vocabulary belongs to `unimm.sequence`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

LAYOUTS = ("grid", "sequence", "levels", "streams")


@dataclass(frozen=True)
class CodeSpec:
    """The code space of one visual tokenizer.

    Args:
        sizes: codebook size of each of the K slots of a position; empty for continuous latents.
        layout: how positions are arranged: `grid` (rows x columns), `sequence` (1-D), `levels` (coarse to fine),
            `streams` (parallel semantic and pixel streams).
        max_length: the largest number of positions N of one image.
        dim: width D of the vectors that `lookup` returns.
        flatten: order in which a grid becomes a sequence.
        fingerprint: digest of the codec's weights; codes are only comparable under the same fingerprint.
    """

    sizes: tuple[int, ...]
    layout: str
    max_length: int
    dim: int
    flatten: str = "raster"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; it must be one of {', '.join(LAYOUTS)}.")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; a picture needs at least one position.")

    @property
    def num_codebooks(self) -> int:
        return len(self.sizes)

    @property
    def num_codes(self) -> int:
        """Rows of all codebooks together."""
        return sum(self.sizes)

    def share_used(self, ids: torch.Tensor) -> float:
        """Share of the codes of all slots that occur in `ids` `[..., K]`."""
        return sum(len(slot.unique()) for slot in ids.unbind(dim=-1)) / self.num_codes

    @property
    def bits(self) -> float:
        """Bits of one image of `max_length` positions."""
        return self.max_length * sum(math.log2(size) for size in self.sizes)


@dataclass(eq=False)
class VisualCodes:
    """A batch of encoded images; equal where all its numbers are, on whatever device.

    Args:
        ids: int64 `[B, N, K]`, each in `[0, spec.sizes[k])`, never offset.
        mask: bool `[B, N]`, True where a position exists; padding is on the right.
        grid: (rows, columns) per image for grid layouts, else None.
        side_info: further tensors that a decoder may want, each with leading dimension B.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    grid: list[tuple[int, int]] | None = None
    side_info: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.ids.dtype != torch.int64:
            raise ValueError(f"ids are {self.ids.dtype} {tuple(self.ids.shape)}; they must be int64 [B, N, K].")
        if self.mask.shape != self.ids.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {self.mask.dtype} {tuple(self.mask.shape)}; it must be bool {tuple(self.ids.shape[:2])}."
            )
        if self.grid is not None:
            self._check_grid(self.grid)

    def _check_grid(self, grid: list[tuple[int, int]]) -> None:
        if len(grid) != len(self):
            raise ValueError(f"grid names {len(grid)} images, ids hold {len(self)}.")
        for (rows, columns), length in zip(grid, self.lengths.tolist(), strict=True):
            if rows * columns != length:
                raise ValueError(f"A {rows} x {columns} grid has {rows * columns} positions, the mask keeps {length}.")

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VisualCodes):
            return NotImplemented
        pairs = [(self.ids, other.ids), (self.mask, other.mask)]
        if self.grid != other.grid or self.side_info.keys() != other.side_info.keys():
            return False
        pairs += [(value, other.side_info[name]) for name, value in self.side_info.items()]
        return all(one.cpu().equal(two.cpu()) for one, two in pairs)

    @property
    def lengths(self) -> torch.Tensor:
        """Positions per image, int64 `[B]`."""
        return self.mask.sum(dim=1)

    @classmethod
    def from_grid(cls, ids: torch.Tensor) -> VisualCodes:
        """Codes of equal grids: int64 `[B, rows, columns, K]` flattened in raster order."""
        batch, rows, columns, num_codebooks = ids.shape
        flat = ids.reshape(batch, rows * columns, num_codebooks)
        mask = torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
        return cls(flat, mask, [(rows, columns)] * batch)

    def record(self, index: int) -> dict[str, Any]:
        """One picture as plain numbers: `codes` `[N][K]`, and `height` and `width` of its grid, 0 where it has none."""
        height, width = (0, 0) if self.grid is None else self.grid[index]
        return {"codes": self.ids[index][self.mask[index]].tolist(), "height": height, "width": width}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> VisualCodes:
        """The picture of a record.

        Raises:
            ValueError: another number of codes than the grid has cells.
        """
        height, width = record["height"], record["width"]
        ids = torch.tensor(record["codes"], dtype=torch.int64)[None]  # [1, N, K]
        if (height or width) and ids.shape[1] != height * width:
            raise ValueError(f"There are {ids.shape[1]} codes for {height} x {width} cells; write them again.")
        grid = [(height, width)] if height else None
        return cls(ids, torch.ones_like(ids[..., 0], dtype=torch.bool), grid)

    def to(self, device: torch.device | str) -> VisualCodes:
        moved = {name: value.to(device) for name, value in self.side_info.items()}
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device), side_info=moved)

    def select(self, index: slice) -> VisualCodes:
        """The images of a slice, as a batch of their own."""
        side_info = {name: value[index] for name, value in self.side_info.items()}
        grid = None if self.grid is None else self.grid[index]
        return replace(self, ids=self.ids[index], mask=self.mask[index], grid=grid, side_info=side_info)

    def validate(self, spec: CodeSpec) -> None:
        """Raise `ValueError` where an id is outside its codebook or an image is longer than the codec allows."""
        if self.ids.shape[2] != spec.num_codebooks:
            raise ValueError(
                f"Codes have {self.ids.shape[2]} slots at a position, the codec has {spec.num_codebooks}; decode codes "
                "by the codec that made them."
            )
        if self.ids.shape[1] > spec.max_length:
            raise ValueError(f"Codes have {self.ids.shape[1]} positions, the codec takes at most {spec.max_length}.")
        for slot, size in enumerate(spec.sizes):
            legal = self.ids[self.mask][:, slot]
            if legal.numel() and not 0 <= int(legal.min()) <= int(legal.max()) < size:
                raise ValueError(
                    f"Codes of slot {slot} range over [{int(legal.min())}, {int(legal.max())}]; "
                    f"the codebook has ids 0 to {size - 1}. Were they offset into a vocabulary?"
                )
