"""Q-Former (BLIP-2, 2301.12597): learned queries read the picture by cross-attention and become its codes.

With causal queries (SEED, 2307.08041) a code depends on the picture and on earlier queries alone, so that codes have an
order that suits a model which writes them from left to right. With slots (Slot-MLLM, 2505.17726) the queries compete
for the cells of the picture, so that a code tends to stand for one object.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.resamplers import SequenceResampler
from unimm.nn.blocks import MLP, CrossAttention, SelfAttention

SPREAD = 0.02  # of freshly drawn queries
SLOT_EPS = 1e-5  # of the norms inside a competition
SLOT_FLOOR = 1e-6  # of what a query takes of a cell, so that none divides by nothing


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
        project: whether maps lead from the queries to the vectors that are quantised; without them the two are the
            same, and `dim` must be `width`.
        slot_iterations: rounds in which the queries compete for the cells, in place of plain cross-attention; 0 for
            none. Competing queries know of each other, whatever `causal` says.
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
    project: bool = True
    slot_iterations: int = 0

    def __post_init__(self) -> None:
        if not self.project and self.dim != self.width:
            raise ValueError(f"dim is {self.dim} and width {self.width}; make them equal, or set project: true.")
        if self.slot_iterations < 0:
            raise ValueError(f"slot_iterations is {self.slot_iterations}; it must be 0 (no slots) or more.")
        if self.cross_every < 1:
            raise ValueError(f"cross_every is {self.cross_every}; the queries must look at the picture, at least 1.")


class SlotAttention(CrossAttention):
    """Queries `[B, N, D]` that compete for cells `[B, M, C]` over several rounds (slot attention, 2006.15055).

    What a cell gives adds up to one over all heads and queries together; a recurrent unit moves each query by what it
    was given.
    """

    def __init__(self, width: int, num_heads: int, *, context_width: int, iterations: int) -> None:
        super().__init__(width, num_heads, context_width=context_width)
        self.iterations = iterations
        self.norm = nn.LayerNorm(width, eps=SLOT_EPS)
        self.update = nn.GRUCell(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=SLOT_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, hidden: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, N, D]` and `[B, M, C]` to `[B, N, D]`; `mask` is not read."""
        heads = (self.num_heads, -1)
        key, value = (
            project(context).unflatten(2, heads).transpose(1, 2) for project in (self.key, self.value)
        )  # [B, heads, M, D / heads]
        for _ in range(self.iterations):
            query = self.query(self.norm(hidden)).unflatten(2, heads).transpose(1, 2)
            scores = query @ key.transpose(2, 3) * hidden.shape[1] ** -0.5  # [B, heads, N, M]
            shares = scores.flatten(1, 2).softmax(dim=1).view_as(scores) + SLOT_FLOOR
            given = F.normalize(shares, p=1.0, dim=-1) @ value
            given = given.transpose(1, 2).flatten(2)
            hidden = self.update(given.flatten(0, 1), hidden.flatten(0, 1)).view_as(hidden)
            hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return self.out(hidden)


class QFormerLayer(nn.Module):
    """BERT's layer (1810.04805), a norm after every sum: self-attention, attention to the picture where asked, MLP."""

    def __init__(self, config: QFormerResamplerConfig, *, features_width: int | None) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.cross: CrossAttention | None = None
        if features_width is not None:
            if config.slot_iterations:
                self.cross = SlotAttention(
                    config.width,
                    config.num_heads,
                    context_width=features_width,
                    iterations=config.slot_iterations,
                )
            else:
                self.cross = CrossAttention(config.width, config.num_heads, context_width=features_width)
            self.cross_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, config.mlp_width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, hidden: torch.Tensor, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        hidden = self.attention_norm(hidden + self.attention(hidden, mask))
        if self.cross is not None:
            hidden = self.cross_norm(hidden + self.cross(hidden, features))
        return self.mlp_norm(hidden + self.mlp(hidden))


class QFormerResampler(SequenceResampler):
    """Features `[B, D, rows, columns]` to `[B, tokens, dim]`."""

    def __init__(self, config: QFormerResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.causal = config.causal
        self.queries = nn.Parameter(torch.randn(config.tokens, config.width) * SPREAD)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.layers = nn.ModuleList(
            QFormerLayer(config, features_width=None if layer % config.cross_every else encoder_width)
            for layer in range(config.depth)
        )
        self.to_positions: nn.Module = nn.Identity()
        if config.project:
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
