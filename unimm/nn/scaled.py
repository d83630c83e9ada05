"""Transformer blocks with rotary positions, biases, normalised queries and keys, and updates scaled by channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unimm.nn.blocks import MLP, check_heads
from unimm.nn.rotary import rotate_pairs

EPS = 1e-5


class ScaledAttention(nn.Module):
    """Multi-head self-attention whose normalised queries and keys are turned by their positions.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(width // num_heads, eps=EPS)
        self.key_norm = nn.LayerNorm(width // num_heads, eps=EPS)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, N, D]` to the same, under angles `[N, D / heads / 2]`; `mask` is bool and fits `[B, heads, N, N]`."""
        query, key, value = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (
            rotate_pairs(norm(part), angles).to(value.dtype)
            for norm, part in ((self.query_norm, query), (self.key_norm, key))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class ScaledBlock(nn.Module):
    """Norm, attention, MLP, each update scaled by channel; the halves can be called one by one."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = ScaledAttention(width, num_heads)
        self.attention_scale = nn.Parameter(torch.ones(width))
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width)
        self.mlp_scale = nn.Parameter(torch.ones(width))

    def attend(self, hidden: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The first half; arguments as of `ScaledAttention`."""
        return hidden + self.attention_scale * self.attention(self.attention_norm(hidden), angles, mask)

    def feed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half."""
        return hidden + self.mlp_scale * self.mlp(self.mlp_norm(hidden))

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.feed(self.attend(hidden, angles, mask))
