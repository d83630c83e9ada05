"""Finite scalar quantisation (FSQ, 2309.15505): round a few bounded channels; the codebook is the product of levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from unimm.codec.quantizers.base import Quantized, Quantizer, straight_through

# The bound lies this much beyond the outermost level, so that two levels have a finite shift, as in the paper.
MARGIN = 1e-3


@dataclass(frozen=True)
class FSQConfig:
    """Rounding of each channel.

    Args:
        levels: per channel; the first channel varies fastest in an id.
        project: whether linear maps lead to the channels and back; without them the vectors are the channels.
    """

    levels: tuple[int, ...] = (8, 8, 8, 8)
    project: bool = True


class FSQ(Quantizer):
    """One code per position.

    Raises:
        ValueError: a level count below 2, or vectors of another width than the channels without projection.
    """

    def __init__(self, config: FSQConfig, *, dim: int) -> None:
        super().__init__()
        if not config.levels or min(config.levels) < 2:
            raise ValueError(f"levels are {config.levels}; every channel needs at least 2.")
        self.levels = config.levels
        self.sizes = (math.prod(config.levels),)
        channels = len(config.levels)
        if not config.project and dim != channels:
            raise ValueError(f"Vectors are {dim} wide and there are {channels} levels; set project: true.")
        self.to_channels = nn.Linear(dim, channels) if config.project else nn.Identity()
        self.to_vectors = nn.Linear(channels, dim) if config.project else nn.Identity()

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        bounded = self._bound(self.to_channels(vectors))
        rounded = straight_through(bounded, bounded.round())
        digits = rounded.detach() + self._half_widths(rounded)
        ids = (digits * self._basis(rounded)).sum(dim=-1, keepdim=True).round().long()
        return Quantized(ids, self._project(rounded), vectors.new_zeros(()))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(self.levels, device=ids.device)
        basis = torch.tensor(self._basis_tuple(), device=ids.device)
        digits = (ids // basis) % levels
        return self._project(digits.float() - self._half_widths(digits.float()))

    def _project(self, rounded: torch.Tensor) -> torch.Tensor:
        return self.to_vectors(rounded / self._half_widths(rounded))

    def _bound(self, channels: torch.Tensor) -> torch.Tensor:
        levels = channels.new_tensor(self.levels)
        half = (levels - 1) * (1 + MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(channels + torch.atanh(offset / half)) * half - offset

    def _half_widths(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_tensor([level // 2 for level in self.levels])

    def _basis(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_tensor(self._basis_tuple())

    def _basis_tuple(self) -> tuple[int, ...]:
        return tuple(math.prod(self.levels[:channel]) for channel in range(len(self.levels)))
