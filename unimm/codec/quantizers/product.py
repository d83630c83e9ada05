"""Product quantisation: the channels are cut into K parts with a codebook each (FQGAN, 2411.16681)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from unimm.codec.quantizers.base import Quantized, Quantizer
from unimm.codec.quantizers.vector import VQ, VQConfig


@dataclass(frozen=True)
class ProductVQConfig(VQConfig):
    """`sizes` rows per part; the other options hold for every part, and `size` is not read."""

    sizes: tuple[int, ...] = (1024, 1024)


class ProductVQ(Quantizer):
    """K codes per position, slot k from the k-th of K equal parts of the channels.

    Raises:
        ValueError: fewer than two parts, or channels that do not divide into them.
    """

    def __init__(self, config: ProductVQConfig, *, dim: int) -> None:
        super().__init__()
        if len(config.sizes) < 2 or dim % len(config.sizes):
            raise ValueError(
                f"sizes are {config.sizes} for {dim} channels; name at least two, whose number divides the channels."
            )
        self.sizes = config.sizes
        self.parts = nn.ModuleList(
            VQ(replace(config, size=size), dim=dim // len(config.sizes)) for size in config.sizes
        )

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        chunks = vectors.chunk(len(self.parts), dim=-1)
        done = [part(chunk) for part, chunk in zip(self.parts, chunks, strict=True)]
        return Quantized(
            ids=torch.cat([quantized.ids for quantized in done], dim=-1),
            vectors=torch.cat([quantized.vectors for quantized in done], dim=-1),
            loss=torch.stack([quantized.loss for quantized in done]).sum(),
        )

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        slots = ids.split(1, dim=-1)
        return torch.cat([part.lookup(slot) for part, slot in zip(self._parts, slots, strict=True)], dim=-1)

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return tuple(vectors for part in self._parts for vectors in part.code_vectors())

    @property
    def _parts(self) -> list[VQ]:
        return [part for part in self.parts if isinstance(part, VQ)]
