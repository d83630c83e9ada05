"""Two encoders of one picture (TokenFlow, 2412.03069): a vision tower for meaning, a pyramid for pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.encoders import TowerOptions, ViTEncoder
from unimm.codec.pyramid import PyramidEncoder, PyramidEncoderConfig


@dataclass(frozen=True)
class PairEncoderConfig(TowerOptions):
    """Both encoders.

    Args:
        tower: the encoder whose cells are those of the pair.
        tower_dim: channels that a small network makes of its features.
        pyramid: the other; it sees the picture resized bicubically to as many cells.
        pyramid_dim: channels that a linear map makes of its features, behind those of the tower.
    """

    tower_dim: int = 32
    pyramid: PyramidEncoderConfig = field(default_factory=PyramidEncoderConfig)
    pyramid_dim: int = 8

    @property
    def width(self) -> int:
        return self.tower_dim + self.pyramid_dim


class PairEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` to `[B, tower_dim + pyramid_dim, rows, columns]`."""

    def __init__(self, config: PairEncoderConfig) -> None:
        super().__init__()
        self.tower = ViTEncoder(config.tower)
        width = config.tower.width
        self.from_tower = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.tower_dim))
        self.pyramid = PyramidEncoder(config.pyramid)
        self.from_pyramid = nn.Conv2d(config.pyramid.width, config.pyramid_dim, 1)
        self.factor = config.pyramid.factor

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        meaning = self.tower(pixel_values)
        meaning = self.from_tower(meaning.movedim(1, 3)).movedim(3, 1)
        size = [side * self.factor for side in meaning.shape[2:]]
        resized = F.interpolate(pixel_values, size, mode="bicubic", align_corners=False)
        return torch.cat([meaning, self.from_pyramid(self.pyramid(resized))], dim=1)
