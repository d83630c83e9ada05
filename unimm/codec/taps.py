"""One vision tower read at several depths (DualToken, 2503.14324): early layers for pixels, a late one for meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.codec.encoders import TowerOptions, ViTEncoder
from unimm.nn.geglu import AttentionProjection


@dataclass(frozen=True)
class TapEncoderConfig(TowerOptions):
    """The tower and its taps.

    Args:
        tower: whose last block gives the meaning; it needs no final norm and no class token.
        pixel_layer: blocks before the tap of the pixels.
        shortcut_layer: blocks before a second tap of them, which is added.
        shortcut_weight: of the second tap.
        pixel_dim, meaning_dim: channels of the two, in this order.
        pixel_heads, meaning_heads: of the attentions that lead there.
    """

    pixel_layer: int = 6
    shortcut_layer: int = 4
    shortcut_weight: float = 0.6
    pixel_dim: int = 32
    meaning_dim: int = 32
    pixel_heads: int = 36
    meaning_heads: int = 36

    def __post_init__(self) -> None:
        taps = (self.pixel_layer, self.shortcut_layer)
        if any(not 1 <= tap <= self.tower.depth for tap in taps):
            raise ValueError(
                f"pixel_layer and shortcut_layer are {taps}; the tower has 1 to {self.tower.depth} blocks."
            )
        if self.tower.final_norm or self.tower.class_token:
            raise ValueError("The tower is read between its blocks; set final_norm: false and class_token: false.")

    @property
    def width(self) -> int:
        return self.pixel_dim + self.meaning_dim


class TapEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` to `[B, pixel_dim + meaning_dim, rows, columns]`."""

    def __init__(self, config: TapEncoderConfig) -> None:
        super().__init__()
        self.tower = ViTEncoder(config.tower)
        self.pixel_layer, self.shortcut_layer = config.pixel_layer, config.shortcut_layer
        self.shortcut_weight = config.shortcut_weight
        width = config.tower.width
        self.to_pixels = AttentionProjection(width, config.pixel_dim, config.pixel_heads, causal=False)
        self.shortcut = AttentionProjection(width, config.pixel_dim, config.pixel_heads, causal=False)
        self.to_meaning = AttentionProjection(width, config.meaning_dim, config.meaning_heads, causal=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden, grid = self.tower.begin(pixel_values)
        states = [hidden]
        for block in self.tower.blocks:
            states.append(block(states[-1]))
        pixels = self.to_pixels(states[self.pixel_layer])
        pixels = pixels + self.shortcut_weight * self.shortcut(states[self.shortcut_layer])
        return torch.cat([pixels, self.to_meaning(states[-1])], dim=2).transpose(1, 2).unflatten(2, grid)
