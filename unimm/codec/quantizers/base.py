"""The quantizer socket: vectors `[B, N, D]` to ids `[B, N, K]` and the vectors those ids stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Quantized:
    """What `quantize` returns.

    Args:
        ids: int64 `[B, N, K]`.
        vectors: float32 `[B, N, D]`, equal in value to `lookup(ids)`, with the gradient estimator attached.
        loss: scalar; zero where the quantizer needs no objective.
    """

    ids: torch.Tensor
    vectors: torch.Tensor
    loss: torch.Tensor


class Quantizer(nn.Module, ABC):
    """Runs in float32 whatever the dtype around it: ids must not depend on the precision of a load."""

    sizes: tuple[int, ...]

    def forward(self, vectors: torch.Tensor) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            return self.quantize(vectors.float())

    @abstractmethod
    def quantize(self, vectors: torch.Tensor) -> Quantized:
        """float32 `[B, N, D]` to `Quantized`."""

    @abstractmethod
    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 `[B, N, K]` to float32 `[B, N, D]`."""

    def out_dim(self, dim: int) -> int:
        """Width of the vectors that codes stand for, where those that are quantised are `dim` wide."""
        return dim

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        """What each code of each slot stands for, K times float32 `[size, D of the slot]`."""
        device = next((weight.device for weight in self.parameters()), torch.device("cpu"))
        return (self.lookup(torch.arange(self.sizes[0], device=device).view(1, -1, 1))[0],)


def straight_through(continuous: torch.Tensor, discrete: torch.Tensor) -> torch.Tensor:
    """The value of `discrete` with the gradient of `continuous` (1308.3432)."""
    return continuous + (discrete - continuous).detach()
