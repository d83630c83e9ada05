"""Vector quantisation (1711.00937): the id is the nearest row of a learned codebook."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.quantizers.base import Quantized, Quantizer, straight_through

SEARCH_CHUNK = 4096  # rows of the distance matrix held at once


@dataclass(frozen=True)
class VQConfig:
    """Nearest-row quantizer.

    Args:
        size: rows of the codebook.
        dim: width of a row; vectors are projected to it, which keeps the search cheap (2110.04627).
        normalize: L2-normalise vectors and rows, so that the nearest row is the one of largest cosine.
        ema_decay: rows follow a moving average of the vectors they stand for (1906.00446); None trains them by
            gradient.
        commitment: weight of the pull of the vectors towards their rows.
        restart_below: a row that an EMA codebook used less than this (average count per step) moves to a random
            vector of the batch; 0 never restarts.
    """

    size: int = 1024
    dim: int = 8
    normalize: bool = True
    ema_decay: float | None = None
    commitment: float = 0.25
    restart_below: float = 0.0


class VQ(Quantizer):
    """One code per position.

    Raises:
        ValueError: fewer than two rows, or a restart threshold without EMA counts.
    """

    usage: torch.Tensor
    sums: torch.Tensor

    def __init__(self, config: VQConfig, *, dim: int) -> None:
        super().__init__()
        if config.size < 2:
            raise ValueError(f"size is {config.size}; a codebook needs at least 2 rows.")
        if config.restart_below and config.ema_decay is None:
            raise ValueError("restart_below counts usage by EMA; set ema_decay (for example 0.99) or restart_below: 0.")
        self.config = config
        self.sizes = (config.size,)
        self.to_rows = nn.Linear(dim, config.dim)
        self.to_vectors = nn.Linear(config.dim, dim)
        self.codebook = nn.Parameter(torch.randn(config.size, config.dim), requires_grad=config.ema_decay is None)
        if config.ema_decay is not None:
            self.register_buffer("usage", torch.ones(config.size))
            self.register_buffer("sums", self.codebook.detach().clone())

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        latents, rows = self._normalized(self.to_rows(vectors)), self._normalized(self.codebook)
        ids = nearest_rows(latents.detach().flatten(0, 1), rows.detach()).view(latents.shape[:2])
        chosen = F.embedding(ids, rows)
        loss = self.config.commitment * F.mse_loss(latents, chosen.detach())
        if self.config.ema_decay is None:
            loss = loss + F.mse_loss(chosen, latents.detach())
        elif self.training:
            self._follow(latents.detach().flatten(0, 1), ids.flatten(), self.config.ema_decay)
        return Quantized(ids[..., None], self.to_vectors(straight_through(latents, chosen)), loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.to_vectors(F.embedding(ids[..., 0], self._normalized(self.codebook)))

    def _normalized(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows, dim=-1) if self.config.normalize else rows

    @torch.no_grad()
    def _follow(self, latents: torch.Tensor, ids: torch.Tensor, decay: float) -> None:
        counts = torch.bincount(ids, minlength=self.config.size).to(latents.dtype)
        batch_sums = torch.zeros_like(self.sums).index_add_(0, ids, latents)
        self.usage.lerp_(counts, 1 - decay)
        self.sums.lerp_(batch_sums, 1 - decay)
        self.codebook.copy_(self.sums / self.usage.clamp_min(1e-5)[:, None])
        dead = (self.usage < self.config.restart_below).nonzero().flatten()
        if dead.numel():
            picks = latents[torch.randint(len(latents), (dead.numel(),), device=latents.device)]
            self.codebook[dead], self.sums[dead], self.usage[dead] = picks, picks, 1.0


def nearest_rows(vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Index of the row of smallest Euclidean distance, int64 `[M]`, for `[M, D]` vectors and `[S, D]` rows."""
    half_norms = rows.square().sum(dim=1) / 2
    return torch.cat([(chunk @ rows.T - half_norms).argmax(dim=1) for chunk in vectors.split(SEARCH_CHUNK)])
