"""No quantiser: latents stay continuous, and a position has no ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unimm.codec.quantizers.base import Quantized, Quantizer


@dataclass(frozen=True)
class ContinuousConfig:
    """Has no options."""


class Continuous(Quantizer):
    """Passes vectors on; `ids` have no slots."""

    def __init__(self, config: ContinuousConfig, *, dim: int) -> None:
        super().__init__()
        self.sizes = ()

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        ids = torch.zeros(*vectors.shape[:2], 0, dtype=torch.int64, device=vectors.device)
        return Quantized(ids, vectors, vectors.new_zeros(()))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Refuses every input.

        Raises:
            ValueError: always.
        """
        raise ValueError("This codec has continuous latents, which no ids stand for.")

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return ()
