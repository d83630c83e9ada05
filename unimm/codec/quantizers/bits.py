"""Binary latents (Instella-T2I, 2506.21022): each position is a row of independent bits, each bit a slot of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.codec.quantizers.base import Quantized, Quantizer, straight_through


@dataclass(frozen=True)
class BitsConfig:
    """Bits that are on or off.

    Args:
        bits: of a position, and so slots of size 2.
        temperature: of the chance of a bit, by which it is drawn in training; else it is on where that passes a half.
        doubt: weight of p (1 - p), which pushes chances away from a half.
    """

    bits: int = 64
    temperature: float = 1.0
    doubt: float = 0.1


class BitQuantizer(Quantizer):
    """A position stands for the sum of the rows whose bits are on.

    Raises:
        ValueError: no bits.
    """

    def __init__(self, config: BitsConfig, *, dim: int) -> None:
        super().__init__()
        if config.bits < 1:
            raise ValueError(f"bits is {config.bits}; a position needs at least 1.")
        self.config = config
        self.sizes = (2,) * config.bits
        self.to_bits = nn.Linear(dim, config.bits)
        self.rows = nn.Parameter(torch.randn(config.bits, dim) * config.bits**-0.5)

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        chances = (self.to_bits(vectors) / self.config.temperature).sigmoid()
        bits = (torch.bernoulli(chances.detach()) if self.training else chances > 0.5).to(chances.dtype)
        loss = self.config.doubt * (chances * (1 - chances)).mean()
        return Quantized(bits.long(), straight_through(chances, bits) @ self.rows, loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.to(self.rows.dtype) @ self.rows

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.stack([torch.zeros_like(row), row]) for row in self.rows)
