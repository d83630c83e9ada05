"""No quantiser: latents stay continuous, and a position has no ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.codec.quantizers.base import Quantized, Quantizer

LOG_VARIANCES = (-30.0, 20.0)


@dataclass(frozen=True)
class ContinuousConfig:
    """Has no options."""


class Continuous(Quantizer):
    """Passes vectors on; `ids` have no slots."""

    def __init__(self, config: ContinuousConfig, *, dim: int) -> None:
        super().__init__()
        self.sizes = ()

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        return self._without_ids(vectors, vectors.new_zeros(()))

    def _without_ids(self, vectors: torch.Tensor, loss: torch.Tensor) -> Quantized:
        ids = torch.zeros(*vectors.shape[:2], 0, dtype=torch.int64, device=vectors.device)
        return Quantized(ids, vectors, loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Refuses every input.

        Raises:
            ValueError: always.
        """
        raise ValueError("This codec has continuous latents, which no ids stand for.")

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return ()


@dataclass(frozen=True)
class GaussianConfig:
    """Latents of a variational autoencoder (1312.6114).

    Args:
        divergence: weight of the Kullback-Leibler divergence of a picture's latents from a standard normal.
        project: whether a linear map gives mean and log variance; without it they are the halves of the channels.
    """

    divergence: float = 1e-6
    project: bool = True


class Gaussian(Continuous):
    """Latents with a mean and a log variance, which are drawn in training, else the mean.

    Raises:
        ValueError: channels that have no halves.
    """

    def __init__(self, config: GaussianConfig, *, dim: int) -> None:
        super().__init__(ContinuousConfig(), dim=dim)
        self.divergence = config.divergence
        self.project = config.project
        if not config.project and dim % 2:
            raise ValueError(f"quantizer.project is False and vectors have {dim} channels; halves take an even number.")
        self.to_moments: nn.Module = nn.Linear(dim, 2 * dim) if config.project else nn.Identity()

    def out_dim(self, dim: int) -> int:
        return dim if self.project else dim // 2

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        mean, log_variance = self.to_moments(vectors).chunk(2, dim=-1)
        log_variance = log_variance.clamp(*LOG_VARIANCES)
        excess = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        loss = self.divergence * excess.sum(dim=(1, 2)).mean()
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        return self._without_ids(drawn, loss)
