"""Encoder socket: pixels `[B, 3, H, W]` to a grid of features `[B, D, rows, columns]`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import ResidualBlock, SpaceToChannels, check_channels
from unimm.nn.positions import sincos_2d


@dataclass(frozen=True)
class ConvEncoderConfig:
    """Residual convolutions; the first fold is `patch`, every further stage halves the grid.

    Args:
        patch: pixels per side of the first fold.
        channels: width of each stage; their number fixes the downsampling, `patch * 2 ** (len(channels) - 1)`.
        blocks: residual blocks per stage.
    """

    patch: int = 4
    channels: tuple[int, ...] = (64, 128, 256)
    blocks: int = 2

    @property
    def downsample(self) -> int:
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def width(self) -> int:
        return self.channels[-1]


class ConvEncoder(nn.Module):
    """The convolutional encoder of VQGAN (2012.09841) without its full-resolution stages."""

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__()
        check_channels(config.channels)
        widths = (3, *config.channels)
        layers: list[nn.Module] = []
        for stage, width in enumerate(config.channels):
            layers.append(SpaceToChannels(widths[stage], width, config.patch if stage == 0 else 2))
            layers.extend(ResidualBlock(width) for _ in range(config.blocks))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values)


@dataclass(frozen=True)
class ViTEncoderConfig:
    """Transformer over square patches.

    Args:
        patch: pixels per side of a patch, and so the downsampling.
        width: D.
        depth: blocks.
        num_heads: attention heads.
    """

    patch: int = 16
    width: int = 256
    depth: int = 6
    num_heads: int = 4

    @property
    def downsample(self) -> int:
        return self.patch


class ViTEncoder(nn.Module):
    """The ViT encoder of ViT-VQGAN (2110.04627), with sine-cosine positions of any grid."""

    def __init__(self, config: ViTEncoderConfig) -> None:
        super().__init__()
        self.patches = SpaceToChannels(3, config.width, config.patch)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        grid = self.patches(pixel_values)  # [B, D, rows, columns]
        batch, width, rows, columns = grid.shape
        hidden = grid.flatten(2).transpose(1, 2) + sincos_2d(rows, columns, width, grid.device).to(grid.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden).transpose(1, 2).reshape(batch, width, rows, columns)


EncoderConfig = ConvEncoderConfig | ViTEncoderConfig
ENCODERS: dict[str, tuple[type, type[nn.Module]]] = {
    "conv": (ConvEncoderConfig, ConvEncoder),
    "vit": (ViTEncoderConfig, ViTEncoder),
}
