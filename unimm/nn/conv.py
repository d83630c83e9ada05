"""Residual convolutions over `[B, D, H, W]`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 8


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, with an identity shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_out = nn.GroupNorm(GROUPS, channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        update = self.conv_in(F.silu(self.norm_in(hidden)))
        return hidden + self.conv_out(F.silu(self.norm_out(update)))


class LocalBlock(nn.Module):
    """Norm over channels, one convolution of side `kernel`, SiLU, 1x1 convolution, with an identity shortcut.

    Nothing but the kernel carries information between positions: no statistics over the picture, and edges are repeated
    rather than padded by zeros, which would tell a position how far it is from them.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv_in = nn.Conv2d(channels, 2 * channels, kernel, padding=kernel // 2, padding_mode="replicate")
        self.conv_out = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return hidden + self.conv_out(F.silu(self.conv_in(normed)))


class SpaceToChannels(nn.Module):
    """Fold `factor` x `factor` blocks of pixels into channels, then mix: a strided convolution without overlap."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, factor, stride=factor)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden)


class ChannelsToSpace(nn.Module):
    """Mix channels, then unfold them into `factor` x `factor` blocks of pixels (sub-pixel convolution, 1609.05158)."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(in_channels, out_channels * factor * factor, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.conv(hidden), self.factor)


def check_channels(channels: tuple[int, ...]) -> None:
    """Raise `ValueError` for stages that group normalisation cannot take."""
    if not channels or any(width < 1 or width % GROUPS for width in channels):
        raise ValueError(f"channels are {channels}; name one positive multiple of {GROUPS} per stage.")
