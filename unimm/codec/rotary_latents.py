"""Latents beside a grid that changes its side (Instella-T2I, 2506.21022): any picture becomes one number of codes.

Both ways one transformer sees the latents first, then the cells. Reading halves the grid between two blocks, drawing
doubles it; positions are computed, so that pictures have any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.resamplers import SequenceResampler
from unimm.nn.rotary import EPS, RotaryBlock, axis_angles, check_axes

SPREAD = 0.02  # of freshly drawn latents


@dataclass(frozen=True)
class TrunkOptions:
    """The transformer.

    Args:
        tokens: latents, and so codes.
        depth, num_heads, mlp_width: of the blocks.
        axes: channels of a head that turn with the place of a latent, and with the row and the column of a cell.
        turns: blocks after which the grid changes its side, counted from 0.
        nominal_side: of a grid in cells, before it is halved, to which rows and columns are stretched, so that every
            picture has the positions of one size; 0 counts the cells as they are.
    """

    tokens: int = 128
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    axes: tuple[int, int, int] = (8, 28, 28)
    turns: tuple[int, ...] = (7,)
    nominal_side: int = 0

    def check(self, width: int) -> None:
        """Raise `ValueError` for axes that do not make up a head, or a turn after a block that is not there."""
        check_axes(self.axes, width // self.num_heads)
        if any(not 0 <= turn < self.depth for turn in self.turns) or len(set(self.turns)) != len(self.turns):
            raise ValueError(f"turns are {self.turns}; name different blocks of 0 to {self.depth - 1}.")

    @property
    def shrink(self) -> int:
        """Of the side of the grid, all turns together."""
        return int(2 ** len(self.turns))


class HalvedGrid(nn.Module):
    """A convolution of stride 2 beside the mean of groups of what the squares of four cells hold."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.conv(cells) + F.pixel_unshuffle(cells, 2).unflatten(1, (-1, 4)).mean(dim=2)


class DoubledGrid(nn.Module):
    """A convolution whose channels become squares of four cells, beside the cell itself four times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.conv(cells), 2) + F.interpolate(cells, scale_factor=2)


class LatentTrunk(nn.Module):
    """Latents `[B, N, D]` and cells `[B, D, rows, columns]` to the same, the grid halved or doubled at each turn."""

    def __init__(self, config: TrunkOptions, width: int, *, halves: bool) -> None:
        super().__init__()
        config.check(width)
        self.config, self.halves = config, halves
        self.blocks = nn.ModuleList(
            RotaryBlock(width, config.num_heads, mlp_width=config.mlp_width) for _ in range(config.depth)
        )
        self.resizes = nn.ModuleList(HalvedGrid(width) if halves else DoubledGrid(width) for _ in config.turns)

    def forward(self, latents: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turns = dict(zip(sorted(self.config.turns), self.resizes, strict=True))
        level = 0 if self.halves else len(turns)
        for index, block in enumerate(self.blocks):
            count, grid = latents.shape[1], (cells.shape[2], cells.shape[3])
            angles = axis_angles(self._coordinates(count, grid, level, cells.device), self.config.axes)
            hidden = block(torch.cat([latents, cells.flatten(2).transpose(1, 2)], dim=1), angles)
            latents, cells = hidden[:, :count], hidden[:, count:].transpose(1, 2).unflatten(2, grid)
            if index in turns:
                cells = turns[index](cells.contiguous())
                level += 1 if self.halves else -1
        return latents, cells

    def _coordinates(self, count: int, grid: tuple[int, int], level: int, device: torch.device) -> torch.Tensor:
        """(latent, row, column) of every row of the sequence, `[N, 3]`, the grid halved `level` times."""
        nominal = self.config.nominal_side // 2**level
        if not self.halves:  # what halving an odd side lost is not drawn either
            nominal = self.config.nominal_side // self.config.shrink * self.config.shrink // 2**level
        last = ((nominal if self.config.nominal_side else side) - 1 for side in grid)
        sides = (torch.linspace(0, end, side, device=device) for end, side in zip(last, grid, strict=True))
        cells = torch.cartesian_prod(torch.zeros(1, device=device), *sides)
        latents = F.pad(torch.arange(count, device=device, dtype=torch.float32)[:, None], (0, 2))
        return torch.cat([latents, cells])


@dataclass(frozen=True)
class RotaryLatentsConfig(TrunkOptions):
    """Latents that read a picture; the transformer is as wide as the encoder.

    Args:
        dim: width of the vectors that are quantised.
    """

    dim: int = 768


class RotaryLatentsResampler(SequenceResampler):
    """Features `[B, D, rows, columns]` of any grid that can be halved to `[B, tokens, dim]`.

    Raises:
        ValueError: a transformer that cannot be.
    """

    def __init__(self, config: RotaryLatentsConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.tokens, encoder_width) * SPREAD)
        self.trunk = LatentTrunk(config, encoder_width, halves=True)
        self.norm = nn.RMSNorm(encoder_width, eps=EPS)
        self.to_positions = nn.Linear(encoder_width, config.dim)

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        assert pool == 1, "latents have no grid to pool"
        latents, _ = self.trunk(self.latents.expand(len(features), -1, -1), features)
        return self.to_positions(self.norm(latents))


@dataclass(frozen=True)
class RotaryMaskConfig(TrunkOptions, DecoderOptions):
    """One mask token, repeated over a grid that becomes a picture.

    Args:
        dim: width of a looked-up code.
        width: of the transformer.
        patch: pixels per side of a cell of the last grid.
    """

    num_heads: int = 16
    mlp_width: int = 4096
    dim: int = 768
    width: int = 1024
    patch: int = 16

    @property
    def upsample(self) -> int:
        return self.patch

    @property
    def in_width(self) -> int:
        return self.dim

    @property
    def draws_any_size(self) -> bool:
        return True


class RotaryMaskDecoder(nn.Module):
    """Codes `[B, N, dim]` to pixels of a wanted (height, width)."""

    def __init__(self, config: RotaryMaskConfig) -> None:
        super().__init__()
        self.patch, self.shrink = config.patch, config.shrink
        self.embed = nn.Sequential(nn.RMSNorm(config.dim, eps=EPS), nn.Linear(config.dim, config.width))
        self.mask_token = nn.Parameter(torch.randn(1, config.width, 1, 1) * SPREAD)
        self.trunk = LatentTrunk(config, config.width, halves=False)
        self.norm = nn.RMSNorm(config.width, eps=EPS)
        self.to_pixels = nn.Linear(config.width, 3 * config.patch**2)

    def forward(self, vectors: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        rows, columns = (side // (self.patch * self.shrink) for side in size)
        cells = self.mask_token.expand(len(vectors), -1, rows, columns)
        _, drawn = self.trunk(self.embed(vectors), cells)
        patches = self.to_pixels(self.norm(drawn.movedim(1, -1)))  # [B, rows, columns, 3 * patch * patch]
        return F.pixel_shuffle(patches.movedim(-1, 1), self.patch)
