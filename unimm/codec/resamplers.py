"""Resampler socket: features `[B, D, rows, columns]` to the positions that are quantised, and back to a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class GridResamplerConfig:
    """One position per grid cell, in raster order. `dim` is the width of the vectors that are quantised."""

    dim: int = 256


class GridResampler(nn.Module):
    """Linear maps around the quantizer; the grid itself is kept."""

    def __init__(self, config: GridResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(encoder_width)
        self.to_positions = nn.Linear(encoder_width, config.dim)
        self.to_grid = nn.Linear(config.dim, decoder_width)

    def sample(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, D, rows, columns]` to `[B, N, dim]`."""
        return self.to_positions(self.norm(features.flatten(2).transpose(1, 2)))

    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, N, dim]` to `[B, D, rows, columns]`."""
        return self.to_grid(vectors).transpose(1, 2).unflatten(2, grid)


ResamplerConfig = GridResamplerConfig
RESAMPLERS: dict[str, tuple[type, type[GridResampler]]] = {"grid": (GridResamplerConfig, GridResampler)}
