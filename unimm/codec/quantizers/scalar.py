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
        groups: of channels with these levels, each with a code of its own, one behind the other (AToken, 2509.14476).
    """

    levels: tuple[int, ...] = (8, 8, 8, 8)
    project: bool = True
    groups: int = 1


class FSQ(Quantizer):
    """`groups` codes per position.

    Raises:
        ValueError: a level count below 2, no groups or several under a projection, which would mix them, or vectors of
            another width than the channels without projection.
    """

    def __init__(self, config: FSQConfig, *, dim: int) -> None:
        super().__init__()
        if not config.levels or min(config.levels) < 2:
            raise ValueError(f"levels are {config.levels}; every channel needs at least 2.")
        if config.groups < 1 or (config.groups > 1 and config.project):
            raise ValueError(f"groups is {config.groups}; it must be 1, or more under project: false.")
        self.levels = config.levels
        self.sizes = (math.prod(config.levels),) * config.groups
        channels = len(config.levels) * config.groups
        if not config.project and dim != channels:
            raise ValueError(f"Vectors are {dim} wide and there are {channels} levels; set project: true.")
        self.to_channels = nn.Linear(dim, channels) if config.project else nn.Identity()
        self.to_vectors = nn.Linear(channels, dim) if config.project else nn.Identity()

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        bounded = self._bound(self.to_channels(vectors).unflatten(-1, (len(self.sizes), -1)))  # [B, N, K, C]
        rounded = straight_through(bounded, bounded.round())
        digits = rounded.detach() + self._half_widths(rounded)
        ids = (digits.round().long() * self._basis(rounded.device)).sum(dim=-1)  # floats count to 2**24 only
        return Quantized(ids, self._project(rounded), vectors.new_zeros(()))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(self.levels, device=ids.device)
        digits = (ids[..., None] // self._basis(ids.device)) % levels
        return self._project(digits.float() - self._half_widths(digits.float()))

    def _project(self, rounded: torch.Tensor) -> torch.Tensor:
        return self.to_vectors((rounded / self._half_widths(rounded)).flatten(-2))

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        ids = torch.arange(self.sizes[0], device=next((w.device for w in self.parameters()), None))
        alone = self.lookup(ids[:, None].expand(-1, len(self.sizes))[None])[0]  # every slot has the same code
        return alone.chunk(len(self.sizes), dim=-1)

    def _bound(self, channels: torch.Tensor) -> torch.Tensor:
        levels = channels.new_tensor(self.levels)
        half = (levels - 1) * (1 + MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        return torch.tanh(channels + torch.atanh(offset / half)) * half - offset

    def _half_widths(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_tensor([level // 2 for level in self.levels])

    def _basis(self, device: torch.device) -> torch.Tensor:
        """What one step of each channel adds to an id."""
        return torch.tensor([math.prod(self.levels[:channel]) for channel in range(len(self.levels))], device=device)
