"""Q-Former (BLIP-2, 2301.12597): learned queries read the picture by cross-attention and become its codes.

With causal queries (SEED, 2307.08041) a code depends on the picture and on earlier queries alone, so that codes have an
order that suits a model which writes them from left to right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.codec.resamplers import Resampler
from unimm.nn.blocks import MLP, CrossAttention, SelfAttention

SPREAD = 0.02  # of freshly drawn queries


@dataclass(frozen=True)
class QFormerResamplerConfig:
    """Queries beside the picture.

    Args:
        tokens: queries, and so codes.
        dim: width of the vectors that are quantised.
        width, depth, num_heads, mlp_width: of the transformer.
        cross_every: the queries look at the picture in layers 0, `cross_every`, 2 `cross_every` and so on.
        causal: whether a query sees itself and earlier queries only.
        eps: of every norm.
    """

    tokens: int = 32
    dim: int = 32
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    cross_every: int = 2
    causal: bool = True
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.cross_every < 1:
            raise ValueError(f"cross_every is {self.cross_every}; the queries must look at the picture, at least 1.")


class QFormerLayer(nn.Module):
    """BERT's layer (1810.04805), a norm after every sum: self-attention, attention to the picture where asked, MLP."""

    def __init__(self, config: QFormerResamplerConfig, *, features_width: int | None) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.cross: CrossAttention | None = None
        if features_width is not None:
            self.cross = CrossAttention(config.width, config.num_heads, context_width=features_width)
            self.cross_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, config.mlp_width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, hidden: torch.Tensor, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden = self.attention_norm(hidden + self.attention(hidden, mask))
        if self.cross is not None:
            hidden = self.cross_norm(hidden + self.cross(hidden, features))
        return self.mlp_norm(hidden + self.mlp(hidden))


class QFormerResampler(Resampler):
    """Features `[B, D, rows, columns]` to `[B, tokens, dim]`.

    Raises:
        ValueError: a decoder that does not read `dim` channels.
    """

    def __init__(self, config: QFormerResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        if decoder_width != config.dim:
            raise ValueError(f"dim is {config.dim} and the decoder reads {decoder_width} channels; make them equal.")
        self.causal = config.causal
        self.queries = nn.Parameter(torch.randn(config.tokens, config.width) * SPREAD)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.layers = nn.ModuleList(
            QFormerLayer(config, features_width=None if layer % config.cross_every else encoder_width)
            for layer in range(config.depth)
        )
        self.to_positions = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, config.dim)
        )

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        assert pool == 1, "queries have no grid to pool"
        cells = features.flatten(2).transpose(1, 2)
        hidden = self.norm(self.queries).expand(len(cells), -1, -1)
        mask = None
        if self.causal:
            length = len(self.queries)
            mask = torch.ones(length, length, dtype=torch.bool, device=cells.device).tril()
        for layer in self.layers:
            hidden = layer(hidden, cells, mask)
        return self.to_positions(hidden)

    def restore(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The vectors themselves, `[B, N, dim]`."""
        return vectors
