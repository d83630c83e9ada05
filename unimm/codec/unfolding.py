"""A picture as a few continuous channels that unfold to what it means, and that to its pixels (MingTok, 2510.06590).

The row of latents ends with that of a class token. Features unfold causally, so that a language model that draws a
latent reads its feature at once; the pixels are drawn from the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.dual import TwoSidedDecoder
from unimm.codec.encoders import EncoderOptions
from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import SpaceToChannels

EPS = 1e-6
OFFSET = 0.1  # cells by which the scale of a resized table is off, as in DINO's release


@dataclass(frozen=True)
class LatentScale:
    """How latents are told: by their distance from `mean` in units of `std`.

    Args:
        dim: channels of a latent.
        mean, std: of what the encoder computes.
    """

    dim: int = 32
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class ClosingViTConfig(LatentScale, EncoderOptions):
    """A transformer over patches and a class token behind them.

    Args:
        patch: pixels per side of a cell.
        tower_width, depth, num_heads, mlp_width: of the blocks, whose MLPs are gated; `dim` divides the first.
        table_side: learned positions of a square grid of this side, resized to the grid of the picture.
    """

    patch: int = 32
    tower_width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 2048
    table_side: int = 16

    def __post_init__(self) -> None:
        if self.tower_width % self.dim:
            raise ValueError(f"dim is {self.dim}; it must divide tower_width {self.tower_width}.")

    @property
    def downsample(self) -> int:
        return self.patch

    @property
    def width(self) -> int:
        return self.dim


class ClosingViT(nn.Module):
    """Pixels to one row `[B, dim, 1, rows * columns + 1]`."""

    def __init__(self, config: ClosingViTConfig) -> None:
        super().__init__()
        self.dim, self.mean, self.std = config.dim, config.mean, config.std
        self.patches = SpaceToChannels(3, config.tower_width, config.patch)
        self.table = nn.Parameter(torch.randn(config.table_side**2 + 1, config.tower_width) * 0.02)
        self.class_token = nn.Parameter(torch.randn(1, config.tower_width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.tower_width, config.num_heads, mlp_width=config.mlp_width, eps=EPS, gated=True)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.tower_width, eps=EPS)
        self.to_latents = nn.Linear(config.tower_width, config.dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        grid = self.patches(pixel_values)
        cells = grid.flatten(2).transpose(1, 2) + offset_table(self.table[:-1], grid.shape[2], grid.shape[3])
        closing = (self.class_token + self.table[-1:]).expand(len(cells), 1, -1)
        hidden = torch.cat([cells, closing], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        means = hidden.unflatten(2, (self.dim, -1)).mean(dim=-1)  # of channels side by side
        latents = means + self.to_latents(F.gelu(self.norm(hidden)))
        return ((latents - self.mean) / self.std).transpose(1, 2)[:, :, None]


def offset_table(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Learned positions `[side * side, width]` resized bicubically to `[rows * columns, width]`."""
    side = isqrt(len(table))
    if (rows, columns) == (side, side):
        return table
    scale = ((rows + OFFSET) / side, (columns + OFFSET) / side)
    square = table.T.unflatten(1, (side, side))[None]
    return F.interpolate(square, scale_factor=scale, mode="bicubic", align_corners=False)[0].flatten(1).T


@dataclass(frozen=True)
class UnfoldingDecoderConfig(LatentScale, DecoderOptions):
    """Two transformers, one behind the other.

    Args:
        width, depth, num_heads, mlp_width: of the causal one, whose MLPs are gated; `dim` divides the first.
        pixel_width, pixel_depth, pixel_heads: of the one that draws.
        factor: cells that it draws for each latent, on each side.
        patch: pixels per side of one of these.
    """

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_width: int = 2736
    pixel_width: int = 1024
    pixel_depth: int = 24
    pixel_heads: int = 16
    factor: int = 2
    patch: int = 16

    def __post_init__(self) -> None:
        if self.width % self.dim:
            raise ValueError(f"dim is {self.dim}; it must divide width {self.width}.")

    @property
    def upsample(self) -> int:
        return self.factor * self.patch

    @property
    def in_width(self) -> int:
        return self.dim

    @property
    def makes_features(self) -> bool:
        return True


class FeaturePainter(nn.Module):
    """Features `[B, side * side, width]` to pixels, `factor` x `factor` cells for each of them."""

    def __init__(self, config: UnfoldingDecoderConfig) -> None:
        super().__init__()
        self.patch, self.factor, width = config.patch, config.factor, config.pixel_width
        self.unfold = nn.Linear(config.width, config.factor**2 * width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.pixel_heads, eps=EPS) for _ in range(config.pixel_depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.to_pixels = nn.Linear(width, 3 * config.patch**2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        side, factor = isqrt(features.shape[1]), self.factor
        cells = self.unfold(features).unflatten(1, (side, side)).unflatten(3, (factor, factor, -1))
        hidden = cells.transpose(2, 3).flatten(1, 4)  # in raster order of the finer grid
        for block in self.blocks:
            hidden = block(hidden)
        patches = self.to_pixels(self.norm(hidden)).transpose(1, 2).unflatten(2, (side * factor, side * factor))
        return F.pixel_shuffle(patches.contiguous(), self.patch)


class UnfoldingDecoder(TwoSidedDecoder):
    """`[B, dim, 1, side * side + 1]` to pixels, and to the features of the cells on request."""

    def __init__(self, config: UnfoldingDecoderConfig) -> None:
        super().__init__()
        self.mean, self.std = config.mean, config.std
        self.repeats = config.width // config.dim
        self.embed = nn.Linear(config.dim, config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.num_heads, mlp_width=config.mlp_width, eps=EPS, gated=True)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.pixels = FeaturePainter(config)

    def unfolded(self, latents: torch.Tensor) -> torch.Tensor:
        """Features `[B, N, width]` of every latent of `[B, N, dim]`, each of itself and those before it."""
        latents = latents * self.std + self.mean
        hidden = self.embed(latents) + latents.repeat_interleave(self.repeats, dim=-1)
        length = hidden.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.norm(hidden)

    def features(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.unfolded(vectors[:, :, 0].transpose(1, 2))[:, :-1]

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.pixels(self.features(vectors))
