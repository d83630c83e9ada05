"""Residual quantisation (2107.03312, 2203.01941): each codebook quantises what the ones before it left over."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import nn

from unimm.codec.quantizers.base import Quantized, Quantizer, straight_through
from unimm.codec.quantizers.vector import VQ, VQConfig


@dataclass(frozen=True)
class ResidualVQConfig(VQConfig):
    """The other options hold for every codebook, and `project` must be false: a residual has the vectors' own width.

    Args:
        depth: codes per position.
        shared: whether all depths have one codebook.
        taps: depths at which the running sum is read; the vectors are these sums side by side (EvoTok, 2603.12108).
            Empty for the whole sum alone.
    """

    depth: int = 4
    shared: bool = False
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.depth < 2 or any(not 1 <= tap <= self.depth for tap in self.taps):
            raise ValueError(f"depth is {self.depth} and taps are {self.taps}; at least 2, and taps from 1 to it.")
        if self.project:
            raise ValueError("project is true; the residuals are quantised as they are, set project: false.")


class ResidualVQ(Quantizer):
    """`depth` codes per position."""

    def __init__(self, config: ResidualVQConfig, *, dim: int) -> None:
        super().__init__()
        self.depth, self.taps = config.depth, config.taps or (config.depth,)
        self.sizes = (config.size,) * config.depth
        self.codebooks = nn.ModuleList(VQ(config, dim=dim) for _ in range(1 if config.shared else config.depth))

    def out_dim(self, dim: int) -> int:
        return dim * len(self.taps)

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        residual, done = vectors, []
        for codebook in self._by_depth:
            done.append(codebook(residual))
            residual = residual - done[-1].vectors.detach()
        values = self._tapped([quantized.vectors.detach() for quantized in done])
        return Quantized(
            ids=torch.cat([quantized.ids for quantized in done], dim=-1),
            vectors=straight_through(vectors.repeat(1, 1, len(self.taps)), values),
            loss=torch.stack([quantized.loss for quantized in done]).sum(),
        )

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        slots = ids.split(1, dim=-1)
        return self._tapped([codebook.lookup(slot) for codebook, slot in zip(self._by_depth, slots, strict=True)])

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return tuple(vectors for codebook in self._by_depth for vectors in codebook.code_vectors())

    def _tapped(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """The sums `[B, N, taps * D]` of the first rows, by depth `[B, N, D]`."""
        sums = list(accumulate(rows))
        return torch.cat([sums[tap - 1] for tap in self.taps], dim=-1)

    @property
    def _by_depth(self) -> list[VQ]:
        codebooks = [codebook for codebook in self.codebooks if isinstance(codebook, VQ)]
        return codebooks * self.depth if len(codebooks) == 1 else codebooks


def _plain() -> ResidualVQConfig:
    return ResidualVQConfig(project=False)


@dataclass(frozen=True)
class TwinRVQConfig:
    """Two chains of residuals, each over its own part of the channels, `dim` of each (DualToken, 2503.14324)."""

    first: ResidualVQConfig = field(default_factory=_plain)
    second: ResidualVQConfig = field(default_factory=_plain)


class TwinRVQ(Quantizer):
    """The codes of the first chain, then those of the second.

    Raises:
        ValueError: channels that are not those of the two chains together.
    """

    def __init__(self, config: TwinRVQConfig, *, dim: int) -> None:
        super().__init__()
        self.widths = (config.first.dim, config.second.dim)
        if dim != sum(self.widths):
            raise ValueError(f"Vectors are {dim} wide and the two chains {self.widths}; make them add up.")
        self.first, self.second = (ResidualVQ(part, dim=part.dim) for part in (config.first, config.second))
        self.sizes = (*self.first.sizes, *self.second.sizes)

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        one, other = vectors.split(self.widths, dim=-1)
        done = [self.first(one), self.second(other)]
        return Quantized(
            ids=torch.cat([quantized.ids for quantized in done], dim=-1),
            vectors=torch.cat([quantized.vectors for quantized in done], dim=-1),
            loss=done[0].loss + done[1].loss,
        )

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        one, other = ids.split([self.first.depth, self.second.depth], dim=-1)
        return torch.cat([self.first.lookup(one), self.second.lookup(other)], dim=-1)

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return (*self.first.code_vectors(), *self.second.code_vectors())
