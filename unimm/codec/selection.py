"""Codes where a picture needs them (LaVIT, 2309.04669): cells are kept or dropped, and what is kept absorbs the rest.

`SelectResampler` decides per cell and merges; `CrossViTDecoder` reads any number of codes back into a full grid. How
many codes a picture has depends on what it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.feature_decoder import FeatureOptions
from unimm.codec.resamplers import SequenceResampler
from unimm.nn.blocks import MLP, CrossAttention, SelfAttention, check_heads

EPS = 1e-5
POLICY_EPS = 1e-6
SPREAD = 0.02  # of freshly drawn queries and positions


@dataclass(frozen=True)
class SelectResamplerConfig:
    """A selector and a merger, both as wide as the encoder.

    Args:
        dim: width of the vectors that are quantised.
        depth, num_heads, mlp_width: of the merger.
    """

    dim: int = 32
    depth: int = 12
    num_heads: int = 16
    mlp_width: int = 6144


def policy_softmax(scores: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """Attention weights `[B, heads, N, M]` in which a column counts as much as `policy`, in [0, 1], says.

    The policy may carry a gradient. A row whose columns are all out attends to all alike (DynamicViT, 2106.02034).
    """
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * policy
    return (weights + POLICY_EPS / scores.shape[-1]) / (weights.sum(dim=-1, keepdim=True) + POLICY_EPS)


class KeptAttention(nn.Module):
    """Causal self-attention among kept cells; a dropped cell sees itself besides the kept ones before it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` under `keep` `[B, N]`."""
        length = hidden.shape[1]
        query, key, value = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        itself = torch.eye(length, device=hidden.device, dtype=hidden.dtype)
        policy = (keep[:, None] + (1 - keep[:, None]) * itself).tril()  # [B, N, N]
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        attended = policy_softmax(scores, policy[:, None]) @ value
        return self.out(attended.transpose(1, 2).flatten(2))


class DroppedAttention(nn.Module):
    """Attention of every cell to the features of the dropped ones."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: torch.Tensor, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` and features `[B, N, D]` under `keep` `[B, N]`."""
        query, key, value = (
            project(sequence).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]
            for project, sequence in ((self.query, hidden), (self.key, features), (self.value, features))
        )
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        attended = policy_softmax(scores, 1 - keep[:, None, None]) @ value
        return self.out(attended.transpose(1, 2).flatten(2))


class MergerBlock(nn.Module):
    """Norm and attention among the kept, norm and attention to the dropped, norm and MLP, each with a residual."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.kept_norm = nn.LayerNorm(width, eps=EPS)
        self.kept = KeptAttention(width, num_heads)
        self.dropped_norm = nn.LayerNorm(width, eps=EPS)
        self.dropped = DroppedAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, mlp_width)

    def forward(self, hidden: torch.Tensor, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.kept(self.kept_norm(hidden), keep)
        hidden = hidden + self.dropped(self.dropped_norm(hidden), features, keep)
        return hidden + self.mlp(self.mlp_norm(hidden))


class Selector(nn.Module):
    """A cell's features, half its own and half averaged over the picture, to log-probabilities of keep and drop.

    Raises:
        ValueError: a width that cannot be halved twice.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"The encoder is {width} wide; a selector halves that twice; choose a multiple of 4.")
        self.before = nn.Sequential(nn.LayerNorm(width, eps=EPS), nn.Linear(width, width), nn.GELU())
        self.after = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` to `[B, N, 2]`."""
        own, shared = self.before(cells).chunk(2, dim=-1)
        both = torch.cat([own, shared.mean(dim=1, keepdim=True).expand_as(own)], dim=-1)
        return self.after(both).log_softmax(dim=-1)


class Merger(nn.Module):
    """Cells after the kept ones have absorbed the dropped."""

    def __init__(self, width: int, config: SelectResamplerConfig) -> None:
        super().__init__()
        self.features_norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(MergerBlock(width, config.num_heads, config.mlp_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, cells: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Cells `[B, N, D]` under a choice `[B, N]`."""
        features, hidden = self.features_norm(cells), cells
        for block in self.blocks:
            hidden = block(hidden, features, keep)
        return self.norm(hidden)


class SelectResampler(SequenceResampler):
    """Features `[B, D, rows, columns]` to a position per cell `[B, N, dim]`, of which `select` says which count."""

    def __init__(self, config: SelectResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.selector = Selector(encoder_width)
        self.merger = Merger(encoder_width, config)
        self.to_positions = nn.Sequential(
            nn.Linear(encoder_width, encoder_width), nn.Tanh(), nn.Linear(encoder_width, config.dim)
        )

    def select(self, features: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Which cells are kept, float `[B, N]` of zeros and ones, at least one per picture.

        The likelier choice, or, with a `generator`, one drawn with its probability. In training it is drawn, and
        carries the gradient of the probability (Gumbel softmax, 1611.01144).
        """
        scores = self.selector(features.flatten(2).transpose(1, 2))
        if self.training:
            return self._at_least_one(F.gumbel_softmax(scores, hard=True)[..., 0], scores)
        if generator is None:
            return self.choose(scores)
        uniform = torch.rand(scores.shape, generator=generator, device=generator.device).to(scores)
        return self.choose(scores, -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log())

    def choose(self, scores: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Kept cells `[B, N]` by scores `[B, N, 2]` and, for a choice by chance, Gumbel noise of the same shape."""
        chosen = scores if noise is None else scores + noise
        return self._at_least_one((chosen.argmax(dim=-1) == 0).to(scores), scores)

    def _at_least_one(self, keep: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`keep`, and the likeliest cell of a picture of which nothing is kept."""
        likeliest = F.one_hot(scores[..., 0].argmax(dim=-1), scores.shape[1]).to(scores)
        return torch.where(keep.sum(dim=1, keepdim=True) == 0, likeliest, keep)

    def merge(self, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Positions `[B, N, dim]` under a choice `[B, N]`; those of dropped cells stand for nothing."""
        cells = features.flatten(2).transpose(1, 2)
        return self.to_positions(self.merger(cells, keep))

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        assert pool == 1, "kept cells have no grid to pool"
        return self.merge(features, self.select(features))


def padded(kept: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept positions of all pictures in a row, `[M, ...]`, one picture per row and zeros on the right.

    Args:
        kept: in the order of the ones of `keep`.
        keep: bool `[B, N]`.

    Returns:
        `[B, longest, ...]`, and bool `[B, longest]`, True where a position exists.
    """
    lengths = keep.sum(dim=1)
    mask = torch.arange(int(lengths.max()), device=keep.device) < lengths[:, None]
    rows = kept.new_zeros(*mask.shape, *kept.shape[1:])
    rows[mask] = kept
    return rows, mask


@dataclass(frozen=True)
class CrossViTConfig(FeatureOptions):
    """Queries of a full grid that read codes, for a diffusion model to draw from.

    Args:
        dim: width of a looked-up code.
        tokens: queries, and the most codes of a picture.
        width, depth, num_heads, mlp_width: of the transformer.
        feature_width: of the features that are rebuilt.
        out_dim: width of what is given, a linear map of them; 0 gives the features.
    """

    dim: int = 32
    tokens: int = 256
    width: int = 1408
    depth: int = 12
    num_heads: int = 16
    mlp_width: int = 6144
    feature_width: int = 1408
    out_dim: int = 768

    @property
    def in_width(self) -> int:
        return self.dim


class CrossViTBlock(nn.Module):
    """Norm and self-attention, norm and attention to the codes, norm and MLP, each with a residual."""

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=EPS)
        self.attention = SelfAttention(config.width, config.num_heads)
        self.cross_norm = nn.LayerNorm(config.width, eps=EPS)
        self.cross = CrossAttention(config.width, config.num_heads, context_width=config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, hidden: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        hidden = hidden + self.cross(self.cross_norm(hidden), codes, mask)
        return hidden + self.mlp(self.mlp_norm(hidden))


class CrossViTDecoder(nn.Module):
    """Codes `[B, N, dim]`, of which those under `mask` `[B, N]` exist, to `[B, tokens, out_dim]` or features."""

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.dim, config.width)
        self.positions = nn.Parameter(torch.randn(config.tokens, config.width) * SPREAD)
        self.queries = nn.Parameter(torch.randn(config.tokens, config.width) * SPREAD)
        self.blocks = nn.ModuleList(CrossViTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, config.feature_width)
        )
        self.out = nn.Linear(config.feature_width, config.out_dim) if config.out_dim else nn.Identity()

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = vectors.shape
        codes = self.embed(vectors) + self.positions[:length]
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=vectors.device)
        hidden = self.queries.expand(batch, -1, -1)
        for block in self.blocks:
            hidden = block(hidden, codes, mask[:, None, None])
        return self.out(self.head(self.norm(hidden)))
