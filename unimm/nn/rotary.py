"""Transformer blocks with rotary positions on several axes, normalised queries and keys, and scaled updates.

Neighbouring channels of a head are turned by an angle that grows with the position (RoFormer, 2104.09864), an equal
share of the channels for each axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unimm.nn.blocks import MLP, check_heads

EPS = 1e-5


def rotary_angles(positions: torch.Tensor, head_width: int, period: float) -> torch.Tensor:
    """Angles, float32 `[N, head_width / 2]`, of positions float `[N, axes]`.

    Raises:
        ValueError: a width that does not give every axis pairs of channels.
    """
    axes = positions.shape[1]
    if head_width % (2 * axes):
        raise ValueError(f"A head is {head_width} wide; {axes} rotary axes need a multiple of {2 * axes}.")
    share = head_width // axes
    steps = torch.arange(0, share, 2, device=positions.device, dtype=torch.float64) / share
    return (positions.double()[..., None] * period**-steps).flatten(1).float()


def rotated(hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """`[..., N, D]` with every pair of neighbouring channels turned by the angles `[N, D / 2]`."""
    first, second = hidden.unflatten(-1, (-1, 2)).unbind(dim=-1)
    cosines, sines = angles.cos(), angles.sin()
    turned = torch.stack([first * cosines - second * sines, first * sines + second * cosines], dim=-1)
    return turned.flatten(-2).to(hidden.dtype)


class RotaryAttention(nn.Module):
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
        query, key = rotated(self.query_norm(query), angles), rotated(self.key_norm(key), angles)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    """Norm, attention, MLP, each update scaled by channel; the halves can be called one by one."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = RotaryAttention(width, num_heads)
        self.attention_scale = nn.Parameter(torch.ones(width))
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width)
        self.mlp_scale = nn.Parameter(torch.ones(width))

    def attend(self, hidden: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The first half; arguments as of `RotaryAttention`."""
        return hidden + self.attention_scale * self.attention(self.attention_norm(hidden), angles, mask)

    def feed(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half."""
        return hidden + self.mlp_scale * self.mlp(self.mlp_norm(hidden))

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.feed(self.attend(hidden, angles, mask))
