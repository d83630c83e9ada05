"""Residual quantisation over scales (VAR, 2404.02905): a picture's coarse squares first, then what they left over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from unimm.codec.quantizers.base import Quantized, Quantizer, straight_through
from unimm.codec.quantizers.vector import VQ, VQConfig


@dataclass(frozen=True)
class ScaleVQConfig(VQConfig):
    """The other options are those of the one codebook of all scales; `project` must be false.

    Args:
        sides: of the square grids, coarse to fine; the last is that of the vectors.
    """

    sides: tuple[int, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        if not self.sides or self.sides[0] < 1 or list(self.sides) != sorted(set(self.sides)):
            raise ValueError(f"sides are {self.sides}; name rising numbers, from 1 up.")
        if self.project:
            raise ValueError("project is true; the residuals are quantised as they are, set project: false.")


class ScaleVQ(Quantizer):
    """Vectors `[B, N, D]` of a square grid to ids `[B, M, 1]`, M the cells of all scales, and back to `[B, N, D]`."""

    def __init__(self, config: ScaleVQConfig, *, dim: int) -> None:
        super().__init__()
        self.sides, self.commitment = config.sides, config.commitment
        self.sizes = (config.size,)
        self.codebook = VQ(config, dim=dim)

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        if vectors.shape[1] != self.sides[-1] ** 2:
            raise ValueError(f"There are {vectors.shape[1]} vectors; the last scale has {self.sides[-1]} squared.")
        rest = vectors.transpose(1, 2).unflatten(2, (self.sides[-1],) * 2)  # [B, D, side, side]
        ids, losses, drawn = [], [], torch.zeros_like(rest)
        for side in self.sides:
            pooled = F.interpolate(rest, side, mode="area").flatten(2).transpose(1, 2)
            quantized = self.codebook(pooled)
            whole = self._whole(quantized.vectors.detach(), side)
            ids.append(quantized.ids)
            losses.append(quantized.loss)
            drawn, rest = drawn + whole, rest - whole
        values = drawn.flatten(2).transpose(1, 2)
        return Quantized(torch.cat(ids, dim=1), straight_through(vectors, values), torch.stack(losses).mean())

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[B, M, 1]` to the sums over all scales, `[B, N, D]`."""
        scales = ids.split([side * side for side in self.sides], dim=1)
        wholes = (
            self._whole(self.codebook.lookup(scale), side) for scale, side in zip(scales, self.sides, strict=True)
        )
        return torch.stack(list(wholes)).sum(dim=0).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return self.codebook.code_vectors()

    def _whole(self, rows: torch.Tensor, side: int) -> torch.Tensor:
        """Rows `[B, side * side, D]` stretched to the finest grid, `[B, D, last side, last side]`."""
        grid = rows.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(grid, self.sides[-1], mode="bicubic", align_corners=False)
