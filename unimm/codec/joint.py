"""Transformers whose cells know their place twice, by a learned table and by rotation (AToken, 2509.14476).

A head turns with time, row, column and depth, a quarter of it each. A picture has no time and no depth, so that half of
every head stands still.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.encoders import EncoderOptions
from unimm.nn.blocks import check_heads
from unimm.nn.conv import SpaceToChannels
from unimm.nn.positions import resized_table
from unimm.nn.rotary import BASE, EPS, rotate_pairs

AXES = 4


@dataclass(frozen=True)
class JointOptions:
    """The transformer.

    Args:
        patch: pixels per side of a cell.
        tower_width, depth, num_heads, mlp_width: of the blocks.
        table_side: learned positions of a square grid of this side, resized to the grid of the picture.
        bias: whether linear maps have one.
        rms_norm: whether norms leave the mean where it is.
        query_norm: whether queries and keys are normalised, with weights of each head.
        dim: channels of what is quantised.
    """

    patch: int = 16
    tower_width: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_width: int = 4304
    table_side: int = 16
    bias: bool = True
    rms_norm: bool = False
    query_norm: bool = False
    dim: int = 48

    def norm(self) -> nn.Module:
        """A norm over the width."""
        return nn.RMSNorm(self.tower_width, eps=EPS) if self.rms_norm else nn.LayerNorm(self.tower_width, eps=EPS)


class HeadNorm(nn.Module):
    """Root mean square of 1 within each head of `[B, heads, N, D]`, under weights of that head."""

    def __init__(self, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], eps=EPS) * self.weight[:, None]


class JointAttention(nn.Module):
    """Multi-head self-attention over turned queries and keys.

    Raises:
        ValueError: heads whose quarters are no pairs, or that do not divide the width.
    """

    def __init__(self, config: JointOptions) -> None:
        super().__init__()
        check_heads(config.tower_width, config.num_heads)
        head_width = config.tower_width // config.num_heads
        if head_width % (2 * AXES):
            raise ValueError(f"Heads are {head_width} wide; four axes of pairs need a multiple of {2 * AXES}.")
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.tower_width, 3 * config.tower_width, bias=config.bias)
        normed = config.query_norm
        self.query_norm = HeadNorm(config.num_heads, head_width) if normed else nn.Identity()
        self.key_norm = HeadNorm(config.num_heads, head_width) if normed else nn.Identity()
        self.out = nn.Linear(config.tower_width, config.tower_width, bias=config.bias)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        query, key = rotate_pairs(self.query_norm(query), angles), rotate_pairs(self.key_norm(key), angles)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class JointBlock(nn.Module):
    """Norm, attention, residual; norm, MLP with GELU by its tanh formula, residual."""

    def __init__(self, config: JointOptions) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = config.norm(), config.norm()
        self.attention = JointAttention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.tower_width, config.mlp_width, bias=config.bias),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_width, config.tower_width, bias=config.bias),
        )

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), angles)
        return hidden + self.mlp(self.mlp_norm(hidden))


class JointTower(nn.Module):
    """Cells `[B, rows, columns, D]` to the same, through all blocks and a last norm."""

    def __init__(self, config: JointOptions) -> None:
        super().__init__()
        self.head_width = config.tower_width // config.num_heads
        self.table = nn.Parameter(torch.randn(config.table_side**2, config.tower_width) * 0.02)
        self.blocks = nn.ModuleList(JointBlock(config) for _ in range(config.depth))
        self.norm = config.norm()

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        rows, columns = cells.shape[1:3]
        hidden = cells.flatten(1, 2) + resized_table(self.table, rows, columns, antialias=True)
        angles = still_angles(rows, columns, self.head_width, cells.device)
        for block in self.blocks:
            hidden = block(hidden, angles)
        return self.norm(hidden).unflatten(1, (rows, columns))


def still_angles(rows: int, columns: int, head_width: int, device: torch.device) -> torch.Tensor:
    """Angles `[rows * columns, head_width / 2]` of the cells of a picture: time, row, column, depth.

    The exponent of a frequency is its place over the whole head, not over the quarter that an axis has.
    """
    places = torch.arange(head_width // (2 * AXES), device=device, dtype=torch.float32)
    frequencies = BASE ** -(places / head_width)
    row = torch.arange(rows, device=device, dtype=torch.float32)[:, None, None] * frequencies
    column = torch.arange(columns, device=device, dtype=torch.float32)[None, :, None] * frequencies
    row, column = row.expand(-1, columns, -1), column.expand(rows, -1, -1)
    return torch.cat([torch.zeros_like(row), row, column, torch.zeros_like(row)], dim=2).flatten(0, 1)


@dataclass(frozen=True)
class JointEncoderConfig(JointOptions, EncoderOptions):
    """Reads a picture into cells of `dim` channels."""

    @property
    def downsample(self) -> int:
        return self.patch

    @property
    def width(self) -> int:
        return self.dim


class JointEncoder(nn.Module):
    """Pixels to `[B, dim, rows, columns]`."""

    def __init__(self, config: JointEncoderConfig) -> None:
        super().__init__()
        self.patches = SpaceToChannels(3, config.tower_width, config.patch)
        self.tower = JointTower(config)
        self.to_latents = nn.Linear(config.tower_width, config.dim, bias=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.to_latents(self.tower(self.patches(pixel_values).movedim(1, -1))).movedim(-1, 1)


@dataclass(frozen=True)
class JointDecoderConfig(JointOptions, DecoderOptions):
    """Draws a picture from `dim` channels."""

    bias: bool = False
    rms_norm: bool = True
    query_norm: bool = True

    @property
    def upsample(self) -> int:
        return self.patch

    @property
    def in_width(self) -> int:
        return self.dim


class JointDecoder(nn.Module):
    """`[B, dim, rows, columns]` to pixels."""

    def __init__(self, config: JointDecoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.embed = nn.Linear(config.dim, config.tower_width, bias=config.bias)
        self.tower = JointTower(config)
        self.to_pixels = nn.Linear(config.tower_width, 3 * config.patch**2, bias=config.bias)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        patches = self.to_pixels(self.tower(self.embed(latents.movedim(1, -1))))
        return F.pixel_shuffle(patches.movedim(-1, 1), self.patch)
