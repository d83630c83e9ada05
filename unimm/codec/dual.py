"""Codes that are read twice: by a decoder of pixels, and by one that rebuilds the features of a vision tower."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.feature_decoder import FeatureViT, FeatureViTConfig
from unimm.codec.pyramid import PyramidDecoder, PyramidDecoderConfig


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


class DualDecoder(nn.Module):
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
        """Features `[B, rows * columns, D]`."""
        return self.tower(self._parts(vectors)[1])

    def _parts(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pixels and what the features are made of."""
        first, second = vectors.split(self.widths, dim=1)
        return (first, second) if self.pixels_first else (second, first)
