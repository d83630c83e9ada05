"""ViTamin (2404.02132) on both sides: two stages of inverted bottlenecks, then a transformer without positions.

The convolutions have told every cell where it lies by then, so that pictures need no position table. The decoder is the
mirror image, as in UniTok (2502.20321).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.encoders import EncoderOptions
from unimm.nn.geglu import EPS, GeGLUBlock
from unimm.nn.pyramid import Double

EXPANSION = 4
STRIDE = 16


@dataclass(frozen=True)
class VitaminConfig:
    """What both sides share.

    Args:
        stages: channels of the two convolutional stages, fine to coarse; the stem has those of the first.
        blocks: of each stage.
        width, depth, num_heads: of the transformer.
    """

    stages: tuple[int, int] = (160, 320)
    blocks: tuple[int, int] = (2, 4)
    width: int = 1024
    depth: int = 31
    num_heads: int = 16

    def __post_init__(self) -> None:
        if len(self.stages) != 2 or len(self.blocks) != 2 or min(*self.stages, *self.blocks) < 1:
            raise ValueError(f"stages are {self.stages} and blocks {self.blocks}; name two positive numbers of each.")


@dataclass(frozen=True)
class VitaminEncoderConfig(VitaminConfig, EncoderOptions):
    """The encoder; every cell is 16 pixels a side."""

    @property
    def downsample(self) -> int:
        return STRIDE


@dataclass(frozen=True)
class VitaminDecoderConfig(VitaminConfig, DecoderOptions):
    """The decoder."""

    @property
    def upsample(self) -> int:
        return STRIDE

    @property
    def in_width(self) -> int:
        return self.width


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `[B, C, H, W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PooledShortcut(nn.Module):
    """Average of every 3 x 3 neighbourhood at stride 2, and a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
        self.expand = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.expand(self.pool(hidden))


class InvertedBlock(nn.Module):
    """Norm, 1x1 convolution to more channels, a 3x3 one of each channel for itself, 1x1 back, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        inner = EXPANSION * out_channels
        self.norm = ChannelNorm(in_channels)
        self.expand = nn.Conv2d(in_channels, inner, 1)
        self.resize: nn.Module = nn.Identity()
        self.spread = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.shrink = nn.Conv2d(inner, out_channels, 1)
        self.shortcut: nn.Module = nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        update = self.resize(F.gelu(self.expand(self.norm(hidden))))
        return self.shortcut(hidden) + self.shrink(F.gelu(self.spread(update)))


class HalvingBlock(InvertedBlock):
    """An inverted bottleneck to half the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.spread.stride = (2, 2)
        self.shortcut = PooledShortcut(in_channels, out_channels)


class DoublingBlock(InvertedBlock):
    """An inverted bottleneck to twice the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.resize = Double(self.spread.in_channels)
        self.shortcut = Double(in_channels, out_channels)


class VitaminEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` to `[B, width, H / 16, W / 16]`."""

    def __init__(self, config: VitaminEncoderConfig) -> None:
        super().__init__()
        fine, coarse = config.stages
        self.stem = nn.Sequential(
            nn.Conv2d(3, fine, 3, stride=2, padding=1),
            ChannelNorm(fine),
            nn.GELU(),
            nn.Conv2d(fine, fine, 3, padding=1),
        )
        self.stages = nn.ModuleList()
        for before, channels, blocks in ((fine, fine, config.blocks[0]), (fine, coarse, config.blocks[1])):
            rest = (InvertedBlock(channels, channels) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(HalvingBlock(before, channels), *rest))
        self.to_cells = nn.Sequential(ChannelNorm(coarse), nn.Conv2d(coarse, config.width, 3, stride=2, padding=1))
        self.blocks = nn.ModuleList(GeGLUBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(pixel_values)
        for stage in self.stages:
            hidden = stage(hidden)
        cells = self.to_cells(hidden)
        hidden = cells.flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden).transpose(1, 2).unflatten(2, cells.shape[2:])


class VitaminDecoder(nn.Module):
    """`[B, width, rows, columns]` to pixels `[B, 3, 16 rows, 16 columns]`."""

    def __init__(self, config: VitaminDecoderConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GeGLUBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        fine, coarse = config.stages
        self.from_cells = Double(config.width, coarse)
        self.stages = nn.ModuleList()  # coarse to fine
        for before, channels, blocks in ((coarse, coarse, config.blocks[1]), (coarse, fine, config.blocks[0])):
            rest = (InvertedBlock(channels, channels) for _ in range(blocks - 1))
            self.stages.append(nn.Sequential(DoublingBlock(before, channels), *rest))
        self.out = nn.Sequential(Double(fine), ChannelNorm(fine), nn.GELU(), nn.Conv2d(fine, 3, 3, padding=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = features.flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.from_cells(self.norm(hidden).transpose(1, 2).unflatten(2, features.shape[2:]))
        for stage in self.stages:
            hidden = stage(hidden)
        return self.out(hidden)
