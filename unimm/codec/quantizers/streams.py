"""Two codebooks in one alphabet, for codes of two kinds in one sequence (DualViTok, 2504.01934)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from unimm.codec.quantizers.base import Quantized, Quantizer
from unimm.codec.quantizers.vector import VQ, VQConfig


@dataclass(frozen=True)
class StreamsVQConfig:
    """The codebook of either stream; the ids of the second begin behind those of the first."""

    first: VQConfig = field(default_factory=lambda: VQConfig(dim=32, project=False))
    second: VQConfig = field(default_factory=lambda: VQConfig(dim=32, project=False))


class StreamsVQ(Quantizer):
    """Vectors `[B, N, 1 + D]`, whose first channel is 0 in the first stream and 1 in the second, which is behind it."""

    def __init__(self, config: StreamsVQConfig, *, dim: int) -> None:
        super().__init__()
        self.first, self.second = VQ(config.first, dim=dim - 1), VQ(config.second, dim=dim - 1)
        self.sizes = (config.first.size + config.second.size,)

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        length = int((vectors[0, :, 0] == 0).sum())
        first, second = self.first(vectors[:, :length, 1:]), self.second(vectors[:, length:, 1:])
        drawn = torch.cat([vectors[..., :1], torch.cat([first.vectors, second.vectors], dim=1)], dim=2)
        ids = torch.cat([first.ids, second.ids + self.first.sizes[0]], dim=1)
        return Quantized(ids, drawn, first.loss + second.loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([*self.first.code_vectors(), *self.second.code_vectors()])
        stream = (ids >= self.first.sizes[0]).to(rows.dtype)
        return torch.cat([stream, rows[ids[..., 0]]], dim=2)
