"""Resampler socket: features `[B, D, rows, columns]` to the positions that are quantised, and back to the decoder.

`sample(features, pool)` gives `[B, N, dim]`; `restore(vectors, grid)` gives what the decoder reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.nn.blocks import PackedGatedMLP
from unimm.nn.geglu import AttentionProjection


class Resampler(nn.Module, ABC):
    """Around the quantizer: what becomes a position, and what the decoder is given.

    `condition_size` is (tokens, width) of the text features that reading needs, None where it needs none.
    """

    condition_size: tuple[int, int] | None = None

    @abstractmethod
    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        """`[B, D, rows, columns]` to `[B, N, dim]`, after averaging squares of `pool` x `pool` cells."""

    @abstractmethod
    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, N, dim]`, laid out as `grid` where positions form one, to the decoder's input."""


class SequenceResampler(Resampler):
    """Positions without a grid; the decoder reads what is looked up as it is."""

    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The vectors themselves, `[B, N, dim]`."""
        return vectors


@dataclass(frozen=True)
class GridResamplerConfig:
    """One position per grid cell, in raster order.

    Args:
        dim: width of the vectors that are quantised.
        groups: equal parts of the channels that never meet on the way to the quantizer.
        norm: whether each position is normalised first.
        tanh_width: width of a linear map and a tanh before the rest; 0 for none.
        gelu_width: of a linear map and a GELU there instead.
        gated_width: of a SwiGLU there instead, which keeps the encoder's width (TokenFLEX, 2504.03154).
        project: whether linear maps lie on both sides of the quantizer; without them all widths must be `dim`.
        project_back: whether the one behind the quantizer is there; without it the decoder reads the codes' vectors.
    """

    dim: int = 256
    groups: int = 1
    norm: bool = True
    tanh_width: int = 0
    gelu_width: int = 0
    gated_width: int = 0
    project: bool = True
    project_back: bool = True

    def __post_init__(self) -> None:
        if sum(bool(width) for width in (self.tanh_width, self.gelu_width, self.gated_width)) > 1:
            raise ValueError(
                f"tanh_width is {self.tanh_width}, gelu_width {self.gelu_width} and gated_width {self.gated_width}; "
                "set all but one of them to 0."
            )


class GridResampler(Resampler):
    """Linear maps around the quantizer; the grid itself is kept.

    Raises:
        ValueError: widths that `groups` does not divide, or that differ although nothing projects them.
    """

    def __init__(self, config: GridResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        if encoder_width % config.groups or config.dim % config.groups:
            raise ValueError(
                f"groups is {config.groups}; it must divide the encoder's width {encoder_width} and dim {config.dim}."
            )
        if not config.project and not encoder_width == config.dim == decoder_width:
            raise ValueError(
                f"The encoder is {encoder_width} wide, dim is {config.dim} and the decoder reads {decoder_width}; "
                "make them equal, or set project: true."
            )
        self.before: nn.Module = nn.Identity()
        if width := config.tanh_width or config.gelu_width:
            self.before = nn.Sequential(nn.Linear(encoder_width, width), nn.Tanh() if config.tanh_width else nn.GELU())
            encoder_width = width
        elif config.gated_width:
            self.before = PackedGatedMLP(encoder_width, config.gated_width)
        self.norm = nn.GroupNorm(config.groups, encoder_width) if config.norm else nn.Identity()
        self.to_positions: nn.Module = nn.Identity()
        self.to_grid: nn.Module = nn.Identity()
        if config.project:
            self.to_positions = nn.Conv1d(encoder_width, config.dim, 1, groups=config.groups)
            if config.project_back:
                self.to_grid = nn.Linear(config.dim, decoder_width)

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        if pool > 1:
            features = F.avg_pool2d(features, pool)
        batch = len(features)
        positions = self.before(features.flatten(2).transpose(1, 2)).flatten(
            0, 1
        )  # [B N, D]: statistics of one position each
        return self.to_positions(self.norm(positions)[..., None])[..., 0].unflatten(0, (batch, -1))

    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, N, dim]` to `[B, D, rows, columns]`."""
        # Channels-last strides would choose a group norm that is 30 times less exact.
        return self.to_grid(vectors).transpose(1, 2).contiguous().unflatten(2, grid)


@dataclass(frozen=True)
class AttentionResamplerConfig:
    """One position per grid cell, through attention on both sides of the quantizer.

    Args:
        dim: width of the vectors that are quantised.
        num_heads: of both attentions.
        causal: whether a position sees itself and those before it only (MedITok, 2505.19225), or all (UniTok,
            2502.20321).
    """

    dim: int = 64
    num_heads: int = 16
    causal: bool = False


class AttentionResampler(Resampler):
    """Positions that have looked at each other once more before they are quantised, and again afterwards."""

    def __init__(self, config: AttentionResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        heads, causal = config.num_heads, config.causal
        self.to_positions = AttentionProjection(encoder_width, config.dim, heads, causal=causal)
        self.to_grid = AttentionProjection(config.dim, decoder_width, heads, causal=causal)

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        if pool > 1:
            features = F.avg_pool2d(features, pool)
        return self.to_positions(features.flatten(2).transpose(1, 2))

    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """`[B, N, dim]` to `[B, D, rows, columns]`."""
        return self.to_grid(vectors).transpose(1, 2).contiguous().unflatten(2, grid)
