"""Transformer blocks without biases, or weights in their norms: normalised queries and keys, a gated MLP.

As in FlexTok (2502.13967): scores are scaled by 8 over the width of a head rather than by its root (muP, 2203.03466),
so that a learning rate found at one width holds at others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unimm.nn.blocks import check_heads

EPS = 1e-5
SCORE_SCALE = 8.0


def normed(hidden: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the last axis."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=EPS)


class NormedAttention(nn.Module):
    """Multi-head self-attention over normalised queries and keys.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.scale = SCORE_SCALE * num_heads / width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, N, D]` to the same; `mask` is bool, True where a row may see a column, and fits `[B, heads, N, N]`."""
        qkv = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        attended = F.scaled_dot_product_attention(normed(query), normed(key), value, attn_mask=mask, scale=self.scale)
        return self.out(attended.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """One linear map gates another before a third (SwiGLU, 2002.05202)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden_width, bias=False)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class GatedBlock(nn.Module):
    """Norm, attention, residual; norm, gated MLP, residual."""

    def __init__(self, width: int, num_heads: int, *, mlp_width: int) -> None:
        super().__init__()
        self.attention = NormedAttention(width, num_heads)
        self.mlp = GatedMLP(width, mlp_width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = hidden + self.attention(normed(hidden), mask)
        return hidden + self.mlp(normed(hidden))


class ModulatedGatedBlock(nn.Module):
    """A gated block whose norms are scaled and shifted, and whose updates are gated, by a condition (DiT, 2212.09748).

    Each of several kinds of tokens has scales, shifts and gates of its own.
    """

    def __init__(self, width: int, num_heads: int, *, mlp_width: int, kinds: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.attention = NormedAttention(width, num_heads)
        self.mlp = GatedMLP(width, mlp_width)
        self.modulation = nn.Linear(width, kinds * 6 * width)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` under a condition `[B, D]`, whose tokens are of the kinds int64 `[N]`."""
        modulation = self.modulation(F.silu(condition)).unflatten(1, (self.kinds, 6, -1))  # [B, kinds, 6, D]
        parts = (part[:, kind] for part in modulation.unbind(dim=2))  # six of [B, N, D]
        gate, mlp_gate, shift, scale, mlp_shift, mlp_scale = parts
        hidden = hidden + gate * self.attention(normed(hidden) * (1 + scale) + shift)
        return hidden + mlp_gate * self.mlp(normed(hidden) * (1 + mlp_scale) + mlp_shift)
