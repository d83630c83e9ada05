"""Transformer blocks that rotate queries and keys by where a row lies on several axes (RoFormer, 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import QuickGELUActivation

from unimm.nn.blocks import check_heads
from unimm.nn.gated import GatedMLP

EPS = 1e-6
BASE = 10000.0


def check_axes(axes: Sequence[int], head_width: int) -> None:
    """Raise `ValueError` where the parts of a head, one per axis, are odd or do not make up the head."""
    if sum(axes) != head_width or any(part < 2 or part % 2 for part in axes):
        raise ValueError(f"axes are {tuple(axes)}; they must be even and add up to the width of a head, {head_width}.")


def axis_angles(coordinates: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Angles `[N, sum(axes)]` of rows at `coordinates` `[N, A]`; each one stands twice in a row."""
    frequencies = (
        BASE ** -(torch.arange(0, part, 2, device=coordinates.device, dtype=torch.float32) / part) for part in axes
    )
    angles = [axis[:, None] * part for axis, part in zip(coordinates.unbind(dim=1), frequencies, strict=True)]
    return torch.cat(angles, dim=1).repeat_interleave(2, dim=1)


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


def rotate_halves(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pair channel i of `[..., N, D]` with channel i + D / 2 and turn each of the two by its own angle, `[N, D]`.

    Where the two angles differ, as those of `axis_angles` do, this is no rotation of the pair.
    """
    first, second = vectors.chunk(2, dim=-1)
    return vectors * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def rotate_pairs(vectors: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn channels 2 i and 2 i + 1 of `[..., N, D]` together by angle i of `[N, D / 2]`."""
    first, second = vectors.unflatten(-1, (-1, 2)).unbind(dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class TurnedAttention(nn.Module):
    """Multi-head self-attention with biases whose queries and keys are turned as they are.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` to the same, under angles `[N, D / heads]`."""
        query, key, value = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotate_halves(query, angles), rotate_halves(key, angles)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class TurnedBlock(nn.Module):
    """LayerNorm, attention, residual; LayerNorm, MLP with a quick GELU, residual (Qwen2-VL, 2409.12191)."""

    def __init__(self, width: int, num_heads: int, *, mlp_width: int | None = None) -> None:
        super().__init__()
        mlp_width = mlp_width or 4 * width
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = TurnedAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), QuickGELUActivation(), nn.Linear(mlp_width, width))

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), angles)
        return hidden + self.mlp(self.mlp_norm(hidden))


class RotaryAttention(nn.Module):
    """Multi-head self-attention without biases; queries and keys are normalised, then turned.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.key_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` to the same, under angles `[N, D / heads]`."""
        qkv = self.qkv(hidden).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        query, key = rotate_halves(self.query_norm(query), angles), rotate_halves(self.key_norm(key), angles)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    """RMSNorm, attention, residual; RMSNorm, gated MLP, residual."""

    def __init__(self, width: int, num_heads: int, *, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=EPS)
        self.attention = RotaryAttention(width, num_heads)
        self.mlp_norm = nn.RMSNorm(width, eps=EPS)
        self.mlp = GatedMLP(width, mlp_width)

    def forward(self, hidden: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), angles)
        return hidden + self.mlp(self.mlp_norm(hidden))
