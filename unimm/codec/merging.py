"""Levels of residuals on both sides (ResTok, 2601.03955): cells are merged on the way, and codes come coarse to fine.

The latents begin as the picture averaged over ever finer grids, each the rest that coarser ones leave, and a level sees
the cells and the levels up to itself. After some blocks the coarsest cells are merged by pairs: what they share stands
before them as a coarser level, and they keep their difference from it. Each level of codes has linear maps of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.pyramid import PyramidDecoder, PyramidDecoderConfig
from unimm.codec.resamplers import SequenceResampler
from unimm.nn.rotary import rotary_angles
from unimm.nn.scaled import ScaledBlock

SPREAD = 0.02  # of freshly drawn tokens and embeddings


def level_sizes(tokens: int) -> tuple[int, ...]:
    """Codes of each level, 1, 1, 2, 4 and so on up to half of `tokens`.

    Raises:
        ValueError: a number of tokens that is no power of two from 2.
    """
    if tokens < 2 or tokens & (tokens - 1):
        raise ValueError(f"tokens is {tokens}; levels that double need a power of two, at least 2.")
    return (1, *(2**level for level in range(tokens.bit_length() - 1)))


def level_grid(size: int) -> tuple[int, int]:
    """(rows, columns) of a level of `size` codes, as wide as high or twice as wide."""
    power = size.bit_length() - 1
    return 2 ** (power // 2), 2 ** (power - power // 2)


def residual_levels(features: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Features `[B, D, rows, columns]` as the means of ever finer grids, `[B, sum(sizes), D]`, each of what is left."""
    levels, rest = [], features
    for size in sizes:
        level = F.adaptive_avg_pool2d(rest, level_grid(size))
        levels.append(level.flatten(2))
        rest = rest - F.interpolate(level, features.shape[2:], mode="nearest")
    return torch.cat(levels, dim=2).transpose(1, 2)


def level_of(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The level of each token, int64 `[sum(sizes)]`."""
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


def level_causal_mask(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Bool `[sum(sizes), sum(sizes)]`, True where the row's level is the column's or comes after it."""
    level = level_of(sizes, device)
    return level[:, None] >= level


def sequence_positions(grids: list[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Float positions (row, column) of grids one after the other, `[N, 2]`, each from the number of cells before it."""
    positions, start = [], 0
    for rows, columns in grids:
        axes = torch.arange(rows, device=device), torch.arange(columns, device=device)
        positions.append(torch.cartesian_prod(*axes).view(-1, 2) + start)
        start += rows * columns
    return torch.cat(positions).float()


def diagonal_positions(length: int, device: torch.device) -> torch.Tensor:
    """Float positions of a sequence on both axes, `[N, 2]`."""
    return torch.arange(length, device=device).float()[:, None].expand(-1, 2)


class LevelLinear(nn.Module):
    """A linear map for each level of a sequence `[B, N, in]`, to `[B, N, out]`."""

    def __init__(self, in_width: int, out_width: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.randn(len(sizes), out_width, in_width) / in_width**0.5)
        self.bias = nn.Parameter(torch.zeros(len(sizes), out_width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        level = level_of(self.sizes, hidden.device)
        return torch.einsum("bni,noi->bno", hidden, self.weight[level]) + self.bias[level]


@dataclass(frozen=True)
class MergingResamplerConfig:
    """A transformer over cells that merge and latents.

    Args:
        tokens: latents, and so codes; a power of two.
        rows, columns: of the encoder's grid.
        dim: width of the vectors that are quantised.
        width, depth, num_heads: of the transformer.
        merge_in: blocks, counted from 0, between whose halves the coarsest cells merge.
        reduction: share of the cells that a merge takes away.
        period: longest wave of the rotary positions, over 2 pi.
        scramble: as of the latent resampler.
    """

    tokens: int = 128
    rows: int = 16
    columns: int = 16
    dim: int = 8
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    merge_in: tuple[int, ...] = (5, 11, 17)
    reduction: float = 0.5
    period: float = 10000.0
    scramble: bool = False

    def __post_init__(self) -> None:
        level_sizes(self.tokens)
        if list(self.merge_in) != sorted({block for block in self.merge_in if 0 <= block < self.depth}):
            raise ValueError(f"merge_in is {self.merge_in}; name rising blocks from 0 to {self.depth - 1}.")
        columns = self.columns
        for _ in self.merge_in:
            merged = self.reduced(columns)
            if not 0 < merged < columns or merged * self.rows != self.reduced(columns * self.rows):
                raise ValueError(
                    f"reduction is {self.reduction}; of {columns} columns it must leave a whole number, and fewer."
                )
            columns = merged

    def reduced(self, count: int) -> int:
        """How many are left after a merge."""
        return int(count * (1 - self.reduction))


@dataclass
class MergedLevels:
    """What the transformer made of a picture.

    Args:
        cells: `[B, n, D]` of each level, the most merged first.
        latents: `[B, tokens, D]`.
    """

    cells: list[torch.Tensor]
    latents: torch.Tensor


class MergingResampler(SequenceResampler):
    """Features `[B, D, rows, columns]` to `[B, tokens, dim]`, coarse to fine."""

    def __init__(self, config: MergingResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        self.sizes = level_sizes(config.tokens)
        self.embed = nn.Linear(encoder_width, config.width)
        self.cell_levels = nn.Parameter(torch.randn(len(config.merge_in) + 1, config.width) * SPREAD)  # finest first
        self.latent_levels = nn.Parameter(torch.randn(len(self.sizes), config.width) * SPREAD)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(ScaledBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width)
        self.to_positions = LevelLinear(config.width, config.dim, self.sizes)

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        assert pool == 1, "latents have no grid to pool"
        hidden = self.norm_out(self.read(features).latents)
        if self.config.scramble:
            batch, length, width = hidden.shape
            hidden = hidden.reshape(batch, width, length).transpose(1, 2)
        return self.to_positions(hidden)

    def read(self, features: torch.Tensor) -> MergedLevels:
        """Every level of cells and the latents after the last block."""
        grid = self.embed(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, width, rows, columns]
        latents = residual_levels(grid, self.sizes) + self.latent_levels[level_of(self.sizes, grid.device)]
        cells = grid.flatten(2).transpose(1, 2) + self.cell_levels[0]
        hidden = self.norm_in(torch.cat([cells, latents], dim=1))
        grids = [(grid.shape[2], grid.shape[3])]  # of the levels of cells, the most merged first
        angles, mask = self._order(grids, hidden.device)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, ScaledBlock)
            hidden = block.attend(hidden, angles, mask)
            if index not in self.config.merge_in:
                hidden = block.feed(hidden)
                continue
            hidden = block.feed(self._merged(hidden, grids[0]))
            grids.insert(0, (grids[0][0], self.config.reduced(grids[0][1])))
            coarsest = grids[0][0] * grids[0][1]
            level = self.cell_levels[len(grids) - 1].expand(coarsest, -1)
            hidden = hidden + F.pad(level, (0, 0, 0, hidden.shape[1] - coarsest))
            angles, mask = self._order(grids, hidden.device)
        *levels, latents = hidden.split([*(rows * columns for rows, columns in grids), self.config.tokens], dim=1)
        return MergedLevels(levels, latents)

    def _merged(self, hidden: torch.Tensor, coarsest: tuple[int, int]) -> torch.Tensor:
        """A coarser level before the others, and taken off the one that it was made of."""
        count = coarsest[0] * coarsest[1]
        cells, rest = hidden[:, :count].transpose(1, 2), hidden[:, count:]
        merged = F.interpolate(cells, self.config.reduced(count), mode="nearest")
        cells = cells - F.interpolate(merged, count, mode="nearest")
        return torch.cat([merged.transpose(1, 2), cells.transpose(1, 2), rest], dim=1)

    def _order(self, grids: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary angles and mask of the sequence."""
        sizes = [rows * columns for rows, columns in grids]
        cells = sequence_positions(grids, device)
        latents = diagonal_positions(self.config.tokens, device) + sum(sizes)
        head_width = self.config.width // self.config.num_heads
        angles = rotary_angles(torch.cat([cells, latents]), head_width, self.config.period)
        return angles, level_causal_mask((*sizes, *self.sizes), device)


@dataclass(frozen=True)
class LevelViTConfig(DecoderOptions):
    """Mask tokens that become a picture under levels of codes.

    Args:
        dim: width of a looked-up code.
        tokens: the most codes of a picture; a power of two.
        rows, columns: of the grid of mask tokens.
        width, depth, num_heads: of the transformer.
        period: longest wave of the rotary positions, over 2 pi.
        pixels: the pixel decoder behind it.
    """

    dim: int = 8
    tokens: int = 128
    rows: int = 16
    columns: int = 16
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    period: float = 10000.0
    pixels: PyramidDecoderConfig = field(default_factory=PyramidDecoderConfig)

    def __post_init__(self) -> None:
        level_sizes(self.tokens)

    @property
    def upsample(self) -> int:
        return self.pixels.factor

    @property
    def in_width(self) -> int:
        return self.dim


class LevelViTDecoder(nn.Module):
    """Codes `[B, N, dim]`, N at most `tokens`, to pixels; missing codes are a learned vector."""

    def __init__(self, config: LevelViTConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = level_sizes(config.tokens)
        self.missing = nn.Parameter(torch.randn(config.dim) * SPREAD)
        self.embed = LevelLinear(config.dim, config.width, self.sizes)
        self.code_levels = nn.Parameter(torch.randn(len(self.sizes), config.width) * SPREAD)
        self.mask_token = nn.Parameter(torch.randn(config.width) * SPREAD)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(ScaledBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width)
        self.to_grid = nn.Linear(config.width, config.pixels.code_channels)
        self.pixels = PyramidDecoder(config.pixels)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        batch, length, _ = vectors.shape
        config, device = self.config, vectors.device
        vectors = torch.cat([vectors, self.missing.expand(batch, config.tokens - length, -1)], dim=1)
        codes = self.embed(vectors) + self.code_levels[level_of(self.sizes, device)]
        cells = self.mask_token.expand(batch, config.rows * config.columns, -1)
        grid = sequence_positions([(config.rows, config.columns)], device) + config.tokens
        positions = torch.cat([diagonal_positions(config.tokens, device), grid])
        angles = rotary_angles(positions, config.width // config.num_heads, config.period)
        hidden = self.norm_in(torch.cat([codes, cells], dim=1))
        for block in self.blocks:
            hidden = block(hidden, angles)
        hidden = self.to_grid(self.norm_out(hidden[:, config.tokens :]))
        return self.pixels(hidden.transpose(1, 2).unflatten(2, (config.rows, config.columns)).contiguous())
