"""Codes that are read twice: by a decoder of pixels, and by one that rebuilds the features of a vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.feature_decoder import FeatureViT, FeatureViTConfig
from unimm.codec.pyramid import PyramidDecoder, PyramidDecoderConfig
from unimm.nn.geglu import AttentionProjection
from unimm.nn.pyramid import GROUPS, PyramidBlock


@dataclass(frozen=True)
class DualDecoderConfig(DecoderOptions):
    """Two decoders, of a part of the vectors each.

    Args:
        pixel_dim: channels of a vector that the pixels are drawn from.
        pixels_first: whether these come before those of the features.
        pixels: the decoder of pixels, behind a linear map.
        features: the decoder of features; its `dim` says how many channels it reads.
        side: of the drawn picture in pixels, to which it is resized bicubically; 0 keeps its size.
    """

    pixel_dim: int = 8
    pixels_first: bool = True
    pixels: PyramidDecoderConfig = field(default_factory=PyramidDecoderConfig)
    features: FeatureViTConfig = field(default_factory=FeatureViTConfig)
    side: int = 0

    @property
    def upsample(self) -> int:
        return self.pixels.factor

    @property
    def in_width(self) -> int:
        return self.pixel_dim + self.features.dim

    @property
    def makes_features(self) -> bool:
        return True

    @property
    def mirrors_encoder(self) -> bool:
        return False


class TwoSidedDecoder(nn.Module):
    """Draws pixels when called, by its part `pixels`; `features`, called with the same, gives `[B, N, width]`."""

    pixels: nn.Module
    features: Callable[..., torch.Tensor]


class DualDecoder(TwoSidedDecoder):
    """`[B, pixel_dim + features.dim, rows, columns]` to pixels, and to features on request."""

    def __init__(self, config: DualDecoderConfig) -> None:
        super().__init__()
        self.side = config.side
        widths = (config.pixel_dim, config.features.dim)
        self.widths = widths if config.pixels_first else widths[::-1]
        self.pixels_first = config.pixels_first
        self.from_vectors = nn.Conv2d(config.pixel_dim, config.pixels.code_channels, 1)
        self.pixels = PyramidDecoder(config.pixels)
        self.tower = FeatureViT(config.features)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        drawn = self.pixels(self.from_vectors(self._parts(vectors)[0]))
        return F.interpolate(drawn, self.side, mode="bicubic", align_corners=False) if self.side else drawn

    def features(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.tower(self._parts(vectors)[1])

    def _parts(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pixels and what the features are made of."""
        first, second = vectors.split(self.widths, dim=1)
        return (first, second) if self.pixels_first else (second, first)


@dataclass(frozen=True)
class AttentionDualConfig(DecoderOptions):
    """Both sides widen their part of a vector by causal attention (DualToken, 2503.14324).

    Args:
        pixel_dim, feature_dim: channels of a vector that the pixels and the features are made of, in this order.
        width: of both after their attention, and so of the features.
        pixel_heads, feature_heads: of the two attentions.
        pixels: the decoder of pixels, behind a block that changes the width.
        rows, columns: of the grid that it reads, to which the codes' grid is resized bilinearly.
    """

    pixel_dim: int = 32
    feature_dim: int = 32
    width: int = 1152
    pixel_heads: int = 36
    feature_heads: int = 36
    pixels: PyramidDecoderConfig = field(default_factory=PyramidDecoderConfig)
    rows: int = 24
    columns: int = 24

    def __post_init__(self) -> None:
        widths = (self.width, self.pixels.code_channels)
        if any(width % GROUPS for width in widths):
            raise ValueError(f"width and pixels.code_channels are {widths}; both must be multiples of {GROUPS}.")

    @property
    def upsample(self) -> int:
        return self.pixels.factor

    @property
    def in_width(self) -> int:
        return self.pixel_dim + self.feature_dim

    @property
    def makes_features(self) -> bool:
        return True

    @property
    def mirrors_encoder(self) -> bool:
        return False


class AttentionDualDecoder(TwoSidedDecoder):
    """`[B, pixel_dim + feature_dim, rows, columns]` to pixels, and to features on request."""

    def __init__(self, config: AttentionDualConfig) -> None:
        super().__init__()
        self.widths, self.grid = (config.pixel_dim, config.feature_dim), (config.rows, config.columns)
        self.to_pixels = AttentionProjection(config.pixel_dim, config.width, config.pixel_heads, causal=True)
        self.to_features = AttentionProjection(config.feature_dim, config.width, config.feature_heads, causal=True)
        self.narrow = PyramidBlock(config.width, config.pixels.code_channels, first_kernel=1)
        self.pixels = PyramidDecoder(config.pixels)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        part = vectors.split(self.widths, dim=1)[0]
        wide = self.to_pixels(part.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, vectors.shape[2:])
        resized = F.interpolate(wide.contiguous(), self.grid, mode="bilinear", align_corners=False)
        return self.pixels(self.narrow(resized))

    def features(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.to_features(vectors.split(self.widths, dim=1)[1].flatten(2).transpose(1, 2))
