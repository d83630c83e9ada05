"""Transformer parts of ViTamin (2404.02132) and tokenizers around it: MLPs gated by GELU, attention between widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unimm.nn.blocks import SelfAttention, check_heads

EPS = 1e-6


class GeGLU(nn.Module):
    """A norm, then one linear map that gates another before a third (2002.05202); GELU by its tanh formula."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.gate = nn.Linear(width, hidden_width)
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(hidden)
        return self.down(F.gelu(self.gate(hidden), approximate="tanh") * self.up(hidden))


class GeGLUBlock(nn.Module):
    """LayerNorm, attention, residual; LayerNorm, gated MLP of 2 `width`, residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = SelfAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = GeGLU(width, 2 * width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class ReshapingAttention(nn.Module):
    """Self-attention in the wider of two widths.

    Towards the narrow side the heads are averaged, and where a head has another width than the output, equal stretches
    of it are averaged too; towards the wide side they are laid side by side.

    Raises:
        ValueError: the wider of the two is not a multiple of `num_heads`.
    """

    def __init__(self, in_width: int, out_width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        inner = max(in_width, out_width)
        check_heads(inner, num_heads)
        self.num_heads, self.out_width, self.causal = num_heads, out_width, causal
        self.narrows = in_width > out_width
        self.qkv = nn.Linear(in_width, 3 * inner)
        self.out = nn.Linear(out_width, out_width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D of a head]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        if self.narrows:
            return self.out(F.adaptive_avg_pool1d(attended.mean(dim=1), self.out_width))
        return self.out(attended.transpose(1, 2).flatten(2))


class AttentionProjection(nn.Module):
    """`[B, N, in_width]` to `[B, N, out_width]`: attention beside a linear map, then an MLP (UniTok, 2502.20321)."""

    def __init__(self, in_width: int, out_width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(in_width)
        self.attention = ReshapingAttention(in_width, out_width, num_heads, causal=causal)
        self.shortcut_norm = nn.LayerNorm(in_width)
        self.shortcut = nn.Linear(in_width, out_width)
        self.mlp_norm = nn.LayerNorm(out_width)
        self.mlp = GeGLU(out_width, 2 * out_width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.shortcut(self.shortcut_norm(hidden)) + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))
