"""Cells at several scales, coarse to fine, under scale-causal attention (HieraTok, 2509.23736).

A scale sees itself and all that are coarser, on both sides of the quantizer, so that what coarse codes stand for does
not depend on finer ones; the decoder reads the finest scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.merging import level_causal_mask
from unimm.codec.resamplers import Resampler
from unimm.nn.blocks import TransformerBlock

SPREAD = 0.02  # of freshly drawn tables


@dataclass(frozen=True)
class ScaleCausalConfig:
    """A transformer over all scales on either side of the quantizer.

    Args:
        sides: of the square grids, coarse to fine; the last is the side of the encoder's.
        dim: width of the vectors that are quantised.
        depth, num_heads: of each transformer, which is as wide as its neighbour outside.
    """

    sides: tuple[int, ...] = (1, 2, 4, 8)
    dim: int = 32
    depth: int = 4
    num_heads: int = 4

    def __post_init__(self) -> None:
        if not self.sides or list(self.sides) != sorted({side for side in self.sides if side > 0}):
            raise ValueError(f"sides are {self.sides}; name rising numbers from 1.")


class ScaleCausalTransformer(nn.Module):
    """`[B, N, width]`, all scales in a row, to the same; a learned table says where and at which scale a token is."""

    def __init__(self, config: ScaleCausalConfig, width: int) -> None:
        super().__init__()
        self.sizes = tuple(side * side for side in config.sides)
        self.table = nn.Parameter(torch.randn(sum(self.sizes), width) * SPREAD)
        self.blocks = nn.ModuleList(TransformerBlock(width, config.num_heads) for _ in range(config.depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = level_causal_mask(self.sizes, tokens.device)
        hidden = tokens + self.table
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden


class ScaleCausalResampler(Resampler):
    """The encoder's grid averaged to each scale, and the finest scale back to the decoder."""

    def __init__(self, config: ScaleCausalConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.sides = config.sides
        self.encode = ScaleCausalTransformer(config, encoder_width)
        self.to_positions = nn.Linear(encoder_width, config.dim)
        self.to_tokens = nn.Linear(config.dim, decoder_width)
        self.decode = ScaleCausalTransformer(config, decoder_width)

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        scales = [F.adaptive_avg_pool2d(features, side).flatten(2) for side in self.sides]
        return self.to_positions(self.encode(torch.cat(scales, dim=2).mT))

    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        finest = self.decode(self.to_tokens(vectors))[:, -(grid[0] * grid[1]) :]
        return finest.mT.unflatten(2, grid).contiguous()
