"""Resampler socket: features `[B, D, rows, columns]` to the positions that are quantised, and back to a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class GridResamplerConfig:
    """One position per grid cell, in raster order.

    Args:
        dim: width of the vectors that are quantised.
        groups: equal parts of the channels that never meet on the way to the quantizer.
    """

    dim: int = 256
    groups: int = 1


class GridResampler(nn.Module):
    """Linear maps around the quantizer; the grid itself is kept.

    Raises:
        ValueError: widths that `groups` does not divide.
    """

    def __init__(self, config: GridResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        if encoder_width % config.groups or config.dim % config.groups:
            raise ValueError(
                f"groups is {config.groups}; it must divide the encoder's width {encoder_width} and dim {config.dim}."
            )
        self.norm = nn.GroupNorm(config.groups, encoder_width)
        self.to_positions = nn.Conv1d(encoder_width, config.dim, 1, groups=config.groups)
        self.to_grid = nn.Linear(config.dim, decoder_width)

    def sample(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, D, rows, columns]` to `[B, N, dim]`."""
        batch = len(features)
        positions = features.flatten(2).transpose(1, 2).flatten(0, 1)  # [B N, D]: statistics of one position each
        return self.to_positions(self.norm(positions)[..., None]).view(batch, -1, self.to_positions.out_channels)

    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, N, dim]` to `[B, D, rows, columns]`."""
        return self.to_grid(vectors).transpose(1, 2).unflatten(2, grid)


ResamplerConfig = GridResamplerConfig
RESAMPLERS: dict[str, tuple[type, type[GridResampler]]] = {"grid": (GridResamplerConfig, GridResampler)}
