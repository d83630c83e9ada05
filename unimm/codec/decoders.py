"""Decoder socket: what the resampler restores, mostly a grid `[B, D, rows, columns]`, to pixels `[B, 3, H, W]`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import ChannelsToSpace, ResidualBlock, check_channels
from unimm.nn.positions import sincos_2d


class DecoderOptions:
    """What the codec asks of any decoder's config besides `in_width` and `upsample`."""

    @property
    def makes_pixels(self) -> bool:
        """Whether the output is a picture; else it is features or latents, for something else to draw from."""
        return True

    @property
    def latents(self) -> int:
        """Channels of the latents of another autoencoder that are drawn in place of pixels; 0 for none."""
        return 0

    @property
    def makes_features(self) -> bool:
        """Whether there are features of a vision tower, as the output or beside pixels."""
        return False

    @property
    def mirrors_encoder(self) -> bool:
        """Whether a picture is drawn at the size at which it was read."""
        return True

    @property
    def draws_any_size(self) -> bool:
        """Whether the codes leave open how large the picture is, and the decoder is told."""
        return False

    @property
    def condition_size(self) -> tuple[int, int] | None:
        """(tokens, width) of the condition that decoding needs, if it needs one."""
        return None


@dataclass(frozen=True)
class ConvDecoderConfig(DecoderOptions):
    """Mirror of the convolutional encoder.

    Args:
        patch: pixels per side of the last unfold.
        channels: width of each stage, coarse to fine; every stage but the last doubles the grid.
        blocks: residual blocks per stage.
    """

    patch: int = 4
    channels: tuple[int, ...] = (256, 128, 64)
    blocks: int = 2

    @property
    def upsample(self) -> int:
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def in_width(self) -> int:
        return self.channels[0]


class ConvDecoder(nn.Module):
    """Residual stages with sub-pixel upsampling."""

    def __init__(self, config: ConvDecoderConfig) -> None:
        super().__init__()
        check_channels(config.channels)
        layers: list[nn.Module] = [nn.Conv2d(config.in_width, config.in_width, 3, padding=1)]
        for stage, width in enumerate(config.channels):
            if stage:
                layers.append(ChannelsToSpace(config.channels[stage - 1], width, 2))
            layers.extend(ResidualBlock(width) for _ in range(config.blocks))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(8, config.channels[-1])
        self.to_pixels = ChannelsToSpace(config.channels[-1], 3, config.patch)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.to_pixels(nn.functional.silu(self.norm(self.layers(features))))


@dataclass(frozen=True)
class ViTDecoderConfig(DecoderOptions):
    """Transformer that predicts one square patch per position; fields as in the ViT encoder."""

    patch: int = 16
    width: int = 256
    depth: int = 6
    num_heads: int = 4

    @property
    def upsample(self) -> int:
        return self.patch

    @property
    def in_width(self) -> int:
        return self.width


class ViTDecoder(nn.Module):
    """The ViT decoder of ViT-VQGAN (2110.04627)."""

    def __init__(self, config: ViTDecoderConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm = nn.GroupNorm(1, config.width)
        self.to_pixels = ChannelsToSpace(config.width, 3, config.patch)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        batch, width, rows, columns = features.shape
        hidden = features.flatten(2).transpose(1, 2)
        hidden = hidden + sincos_2d(rows, columns, width, features.device).to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.to_pixels(self.norm(hidden.transpose(1, 2).reshape(batch, width, rows, columns)))
