"""The picture path of a tokenizer of video (OmniTokenizer, 2406.09399): a picture is a film of one frame.

Blocks over space see the frame; blocks over time see one moment, so that their attention gives its only value. A
depthwise convolution tells every cell what lies beside it; of the kernel's three moments the last, its own, is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.encoders import EncoderOptions
from unimm.nn.rotary import BASE, rotate_pairs

SCORE_SCALE = 8.0  # of queries and keys of length 1


@dataclass(frozen=True)
class FrameOptions:
    """The two transformers.

    Args:
        patch: pixels per side of a cell.
        width, num_heads, head_width, mlp_width: of all blocks; heads need not make up the width.
        windows: one entry per block over space, the side of the squares of cells that see each other; 0 for all.
        moments: blocks over time.
    """

    patch: int = 8
    width: int = 512
    num_heads: int = 8
    head_width: int = 64
    mlp_width: int = 1365
    windows: tuple[int, ...] = (0, 0, 4, 4)
    moments: int = 4

    def __post_init__(self) -> None:
        if self.head_width % 4 or (any(self.windows) and self.width % self.num_heads):
            raise ValueError(
                f"head_width is {self.head_width}, width {self.width} and num_heads {self.num_heads}; the first must "
                "be a multiple of 4, and under windows the last divide the second."
            )


class FrameAttention(nn.Module):
    """Every cell sees every cell; keys and values are of cells before the norm, as upstream takes them."""

    def __init__(self, config: FrameOptions) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.head_width
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key_value = nn.Linear(config.width, 2 * inner, bias=False)
        self.query_scale = nn.Parameter(torch.ones(config.head_width))
        self.key_scale = nn.Parameter(torch.ones(config.head_width))
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """`[B, rows, columns, D]` to the same."""
        hidden, (rows, columns) = cells.flatten(1, 2), cells.shape[1:3]
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D of a head]
            for part in (self.query(self.norm(hidden)), *self.key_value(hidden).chunk(2, dim=-1))
        )
        angles = alternating_angles(rows, columns, query.shape[-1], cells.device)
        query = F.normalize(rotate_pairs(query, angles), dim=-1) * self.query_scale
        key = F.normalize(rotate_pairs(key, angles), dim=-1) * self.key_scale
        attended = F.scaled_dot_product_attention(query, key, value, scale=SCORE_SCALE)
        return self.out(attended.transpose(1, 2).flatten(2)).unflatten(1, (rows, columns))


def alternating_angles(rows: int, columns: int, head_width: int, device: torch.device) -> torch.Tensor:
    """Angles `[rows * columns, head_width / 2]` of cells, by column and by row in turn."""
    frequencies = BASE ** -(torch.arange(0, head_width, 4, device=device, dtype=torch.float32) / head_width)
    row, column = (torch.arange(side, device=device, dtype=torch.float32) for side in (rows, columns))
    places = torch.stack(torch.meshgrid(row, column, indexing="ij")[::-1], dim=-1)  # [rows, columns, 2]
    return (places[..., None, :] * frequencies[:, None]).flatten(2).flatten(0, 1)


class WindowAttention(nn.Module):
    """Cells of one square see each other, with a learned bias for how they lie to each other (Swin, 2103.14030)."""

    def __init__(self, config: FrameOptions, side: int) -> None:
        super().__init__()
        self.num_heads, self.side = config.num_heads, side
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.bias = nn.Parameter(torch.randn((2 * side - 1) ** 2, config.num_heads) * 0.02)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """`[B, rows, columns, D]` to the same.

        Raises:
            ValueError: a grid that squares do not cover.
        """
        batch, rows, columns, width = cells.shape
        side = self.side
        if rows % side or columns % side:
            raise ValueError(f"Windows of {side} x {side} cells do not cover {rows} x {columns}; use multiples.")
        squares = self.norm(cells).view(batch, rows // side, side, columns // side, side, width).transpose(2, 3)
        qkv = self.qkv(squares.reshape(-1, side * side, width)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B * squares, heads, N, D / heads]
        bias = self.bias[self._offsets(cells.device)].permute(2, 0, 1)  # [heads, N, N]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        out = self.out(attended.transpose(1, 2).flatten(2))
        return out.view(batch, rows // side, columns // side, side, side, width).transpose(2, 3).reshape(cells.shape)

    def _offsets(self, device: torch.device) -> torch.Tensor:
        """Which row of the table holds for each pair of cells of a square, `[N, N]`."""
        line = torch.arange(self.side, device=device)
        places = torch.cartesian_prod(line, line)  # [N, 2]
        rows, columns = (places[:, None] - places + self.side - 1).unbind(dim=-1)
        return rows * (2 * self.side - 1) + columns


class MomentAttention(nn.Module):
    """Attention to the one moment that there is."""

    def __init__(self, config: FrameOptions) -> None:
        super().__init__()
        inner = config.num_heads * config.head_width
        self.value = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.out(self.value(cells))


class FrameBlock(nn.Module):
    """What lies beside a cell, where asked for; attention; a norm and an MLP gated by GELU. All beside shortcuts."""

    def __init__(self, config: FrameOptions, attention: nn.Module, *, beside: bool) -> None:
        super().__init__()
        self.beside = nn.Conv2d(config.width, config.width, 3, padding=1, groups=config.width) if beside else None
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """`[B, rows, columns, D]` to the same."""
        if self.beside is not None:
            cells = cells + self.beside(cells.movedim(-1, 1)).movedim(1, -1)
        cells = cells + self.attention(cells)
        value, gate = self.up(self.mlp_norm(cells)).chunk(2, dim=-1)
        return cells + self.down(F.gelu(gate) * value)


class FrameTransformer(nn.Module):
    """Blocks and a norm."""

    def __init__(self, config: FrameOptions, blocks: Iterable[FrameBlock]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(cells))


def over_space(config: FrameOptions) -> FrameTransformer:
    """The transformer over the cells of the frame; what lies beside a cell is not asked for in windows."""
    attentions = (WindowAttention(config, side) if side else FrameAttention(config) for side in config.windows)
    return FrameTransformer(
        config, (FrameBlock(config, part, beside=isinstance(part, FrameAttention)) for part in attentions)
    )


def over_time(config: FrameOptions) -> FrameTransformer:
    """The transformer over the moments of a cell."""
    return FrameTransformer(
        config, (FrameBlock(config, MomentAttention(config), beside=True) for _ in range(config.moments))
    )


@dataclass(frozen=True)
class FrameEncoderConfig(FrameOptions, EncoderOptions):
    """Reads a frame, space first."""

    @property
    def downsample(self) -> int:
        return self.patch


class FrameEncoder(nn.Module):
    """Pixels to `[B, width, rows, columns]`."""

    def __init__(self, config: FrameEncoderConfig) -> None:
        super().__init__()
        self.patch, inner = config.patch, 3 * config.patch**2
        self.embed = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, config.width), nn.LayerNorm(config.width))
        self.space, self.time = over_space(config), over_time(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        cells = self.embed(F.pixel_unshuffle(pixel_values, self.patch).movedim(1, -1))
        return self.time(self.space(cells)).movedim(-1, 1)


@dataclass(frozen=True)
class FrameDecoderConfig(FrameOptions, DecoderOptions):
    """Draws a frame, time first."""

    @property
    def upsample(self) -> int:
        return self.patch

    @property
    def in_width(self) -> int:
        return self.width


class FrameDecoder(nn.Module):
    """`[B, width, rows, columns]` to pixels."""

    def __init__(self, config: FrameDecoderConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.time, self.space = over_time(config), over_space(config)
        self.to_pixels = nn.Linear(config.width, 3 * config.patch**2)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        patches = self.to_pixels(self.space(self.time(cells.movedim(1, -1))))
        return F.pixel_shuffle(patches.movedim(-1, 1), self.patch)
