"""Encoder socket: pixels `[B, 3, H, W]` to a grid of features `[B, D, rows, columns]`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import LocalBlock, ResidualBlock, SpaceToChannels, check_channels
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
class LocalEncoderConfig(ConvEncoderConfig):
    """Convolutions that see little beyond their own cell, so that what looks alike has the same codes everywhere.

    Args:
        kernels: odd side of the convolutions of each stage; 1 mixes channels only.
    """

    blocks: int = 1
    kernels: tuple[int, ...] = (3, 3, 1)

    def __post_init__(self) -> None:
        if len(self.kernels) != len(self.channels) or any(side < 1 or side % 2 == 0 for side in self.kernels):
            raise ValueError(f"kernels are {self.kernels}; name one odd side for each of channels {self.channels}.")

    @property
    def reach(self) -> int:
        """Pixels beyond its own cell that a code can depend on."""
        strides = [self.patch * 2**stage for stage in range(len(self.channels))]
        return sum(self.blocks * (side // 2) * stride for side, stride in zip(self.kernels, strides, strict=True))


class LocalEncoder(nn.Module):
    """A code says what its cell shows, wherever the cell lies and whatever lies far from it."""

    def __init__(self, config: LocalEncoderConfig) -> None:
        super().__init__()
        check_channels(config.channels)
        widths = (3, *config.channels)
        layers: list[nn.Module] = []
        for stage, (width, kernel) in enumerate(zip(config.channels, config.kernels, strict=True)):
            layers.append(SpaceToChannels(widths[stage], width, config.patch if stage == 0 else 2))
            layers.extend(LocalBlock(width, kernel) for _ in range(config.blocks))
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


EncoderConfig = ConvEncoderConfig | LocalEncoderConfig | ViTEncoderConfig
ENCODERS: dict[str, tuple[type, type[nn.Module]]] = {
    "conv": (ConvEncoderConfig, ConvEncoder),
    "local": (LocalEncoderConfig, LocalEncoder),
    "vit": (ViTEncoderConfig, ViTEncoder),
}
