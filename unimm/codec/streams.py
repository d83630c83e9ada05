"""A picture as two grids of codes, first what it means, then how it looks (DualViTok, 2504.01934).

The meaning is read by a vision tower over large cells, the look by a pyramid over small ones. Both are drawn from: the
meaning is stretched to the small cells. All cells lie in one row, whose first channel tells the two apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.dual import TwoSidedDecoder
from unimm.codec.encoders import EncoderOptions
from unimm.codec.length import coarse_grid
from unimm.codec.pyramid import PyramidDecoder, PyramidDecoderConfig, PyramidEncoder, PyramidEncoderConfig
from unimm.nn.rotary import TurnedBlock, rotary_angles

EPS = 1e-6
PERIOD = 10000.0
MERGE = 2  # patches of the tower per cell, on each side
FRAMES = 2  # that the tower reads at once; a picture stands in both


@dataclass(frozen=True)
class MergingTowerConfig:
    """The vision tower of Qwen2-VL (2409.12191).

    Args:
        patch: pixels per side; 2 x 2 patches become a cell.
        width, depth, num_heads, mlp_width: of its blocks.
        out_width: of its features.
        mean, std: of each channel of pixels in [0, 1].
    """

    patch: int = 14
    width: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_width: int = 5120
    out_width: int = 3584
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def cell(self) -> int:
        return MERGE * self.patch


def grid_positions(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Row and column of the cells of a grid in raster order, float `[rows * columns, 2]`."""
    sides = (torch.arange(side, device=device, dtype=torch.float32) for side in (rows, columns))
    return torch.cartesian_prod(*sides)


def by_cell(grid: torch.Tensor) -> torch.Tensor:
    """`[B, D, rows, columns]` as `[B, rows * columns, D]`, the 2 x 2 patches of a cell one after the other."""
    batch, width, rows, columns = grid.shape
    cells = grid.view(batch, width, rows // MERGE, MERGE, columns // MERGE, MERGE)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, width)


class MergingTower(nn.Module):
    """Pixels in [-1, 1] to normalised features of the cells that they are stretched to, `[B, N, out_width]`."""

    def __init__(self, config: MergingTowerConfig) -> None:
        super().__init__()
        self.config = config
        merged = MERGE**2 * config.width
        self.patches = nn.Conv3d(3, config.width, (FRAMES, config.patch, config.patch), stride=config.patch, bias=False)
        self.blocks = nn.ModuleList(
            TurnedBlock(config.width, config.num_heads, mlp_width=config.mlp_width) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.merge = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, config.out_width))

    def forward(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        config = self.config
        size = [side * config.cell for side in grid]
        shown = F.interpolate((pixel_values + 1) / 2, size, mode="bicubic", align_corners=False, antialias=True)
        mean, std = (shown.new_tensor(values)[:, None, None] for values in (config.mean, config.std))
        normalised = (shown.clamp(0, 1) - mean) / std
        patches = F.conv2d(normalised, self.patches.weight.sum(dim=2), stride=config.patch)  # of two equal frames
        rows, columns = patches.shape[2:]
        positions = grid_positions(rows, columns, patches.device).T.unflatten(1, (rows, columns))
        angles = rotary_angles(by_cell(positions[None])[0], config.width // config.num_heads, PERIOD).repeat(1, 2)
        hidden = by_cell(patches)
        for block in self.blocks:
            hidden = block(hidden, angles)
        features = self.merge(self.norm(hidden).unflatten(1, (-1, MERGE**2)).flatten(2))
        return F.layer_norm(features, features.shape[-1:], eps=EPS)


@dataclass(frozen=True)
class CellTransformerConfig:
    """A transformer over the large cells, with a linear map on either side.

    Args:
        width, depth, num_heads: of its blocks.
    """

    width: int = 1280
    depth: int = 4
    num_heads: int = 16


class CellTransformer(nn.Module):
    """`[B, rows * columns, in_width]` to `[B, rows * columns, out_width]`."""

    def __init__(self, config: CellTransformerConfig, *, in_width: int, out_width: int) -> None:
        super().__init__()
        self.head_width = config.width // config.num_heads
        self.embed = nn.Linear(in_width, config.width)
        self.blocks = nn.ModuleList(TurnedBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.out = nn.Linear(config.width, out_width)

    def forward(self, cells: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        angles = rotary_angles(grid_positions(*grid, cells.device), self.head_width, PERIOD).repeat(1, 2)
        hidden = self.embed(cells)
        for block in self.blocks:
            hidden = block(hidden, angles)
        return self.out(hidden)


@dataclass(frozen=True)
class StreamsEncoderConfig(EncoderOptions):
    """Both encoders.

    Args:
        dim: channels of a vector that is quantised, of either stream.
        tower, meaning: what reads the large cells.
        pyramid: what reads the small ones, before a linear map to `dim` channels.
    """

    dim: int = 32
    tower: MergingTowerConfig = field(default_factory=MergingTowerConfig)
    meaning: CellTransformerConfig = field(default_factory=CellTransformerConfig)
    pyramid: PyramidEncoderConfig = field(default_factory=PyramidEncoderConfig)

    @property
    def downsample(self) -> int:
        return self.pyramid.downsample

    @property
    def width(self) -> int:
        return 1 + self.dim


class StreamsEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` to one row `[B, 1 + dim, 1, N]`: the stream, and the vector to quantise."""

    def __init__(self, config: StreamsEncoderConfig) -> None:
        super().__init__()
        self.cell = config.tower.cell
        self.tower = MergingTower(config.tower)
        self.meaning = CellTransformer(config.meaning, in_width=config.tower.out_width, out_width=config.dim)
        self.pyramid = PyramidEncoder(config.pyramid)
        self.to_vectors = nn.Conv2d(config.pyramid.width, config.dim, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        grid = coarse_grid(pixel_values.shape[2], pixel_values.shape[3], self.cell)
        coarse = self.meaning(self.tower(pixel_values, grid), grid).transpose(1, 2)
        fine = self.to_vectors(self.pyramid(pixel_values)).flatten(2)
        vectors = torch.cat([coarse, fine], dim=2)
        stream = torch.arange(vectors.shape[2], device=vectors.device) >= coarse.shape[2]
        return torch.cat([stream.to(vectors).expand(len(vectors), 1, -1), vectors], dim=1)[:, :, None]


@dataclass(frozen=True)
class StreamsDecoderConfig(DecoderOptions):
    """A decoder of both streams to pixels, and one of the first to features.

    Args:
        dim: channels of a looked-up vector without the first.
        cell: pixels per side of a large cell.
        pixels: the decoder of pixels, behind a linear map, whose norms read both streams too.
        meaning: the decoder of features.
        feature_width: of these.
    """

    dim: int = 32
    cell: int = 28
    pixels: PyramidDecoderConfig = field(default_factory=lambda: PyramidDecoderConfig(norm_channels=64))
    meaning: CellTransformerConfig = field(default_factory=CellTransformerConfig)
    feature_width: int = 3584

    def __post_init__(self) -> None:
        if self.pixels.norm_channels != 2 * self.dim:
            raise ValueError(
                f"pixels.norm_channels is {self.pixels.norm_channels}; the norms read both streams, {2 * self.dim}."
            )

    @property
    def upsample(self) -> int:
        return self.pixels.factor

    @property
    def in_width(self) -> int:
        return 1 + self.dim

    @property
    def makes_features(self) -> bool:
        return True

    @property
    def draws_any_size(self) -> bool:
        return True


class StreamsDecoder(TwoSidedDecoder):
    """`[B, 1 + dim, 1, N]` and the (height, width) of the picture to pixels, and to features on request."""

    def __init__(self, config: StreamsDecoderConfig) -> None:
        super().__init__()
        self.cell, self.factor = config.cell, config.upsample
        self.from_vectors = nn.Conv2d(2 * config.dim, config.pixels.code_channels, 1)
        self.pixels = PyramidDecoder(config.pixels)
        self.meaning = CellTransformer(config.meaning, in_width=config.dim, out_width=config.feature_width)
        self.norm = nn.LayerNorm(config.feature_width)

    def forward(self, vectors: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        coarse, fine = self._grids(vectors, size)
        stretched = F.interpolate(coarse, fine.shape[2:], mode="bicubic", align_corners=False)
        both = torch.cat([stretched, fine], dim=1)
        return self.pixels(self.from_vectors(both), both)

    def features(self, vectors: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Features of the large cells, `[B, N, feature_width]`."""
        coarse = self._grids(vectors, size)[0]
        grid = (coarse.shape[2], coarse.shape[3])
        return self.norm(self.meaning(coarse.flatten(2).transpose(1, 2), grid))

    def _grids(self, vectors: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors of either stream, `[B, dim, rows, columns]`.

        Raises:
            ValueError: not as many codes as a picture of this size has.
        """
        grids = coarse_grid(*size, self.cell), (size[0] // self.factor, size[1] // self.factor)
        lengths = [rows * columns for rows, columns in grids]
        if vectors.shape[3] != sum(lengths):
            raise ValueError(
                f"There are {vectors.shape[3]} codes, and a picture of {size[0]} x {size[1]} has {sum(lengths)}; "
                'say its size in side_info["size"], as encode does.'
            )
        coarse, fine = vectors[:, 1:, 0].split(lengths, dim=2)
        return coarse.unflatten(2, grids[0]).contiguous(), fine.unflatten(2, grids[1]).contiguous()
