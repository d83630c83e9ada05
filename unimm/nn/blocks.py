"""Pre-norm transformer blocks over `[B, N, D]`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def check_heads(width: int, num_heads: int) -> None:
    """Raise `ValueError` where `width` is not a multiple of `num_heads`."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"Width {width} is not a multiple of num_heads {num_heads}; choose one that divides it.")


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, N, D]` to the same; `mask` is bool, True where a row may see a column, and fits `[B, heads, N, N]`."""
        batch, length, width = hidden.shape
        qkv = self.qkv(hidden).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another, which may have another width.

    Args:
        out_width: of what is given; None for `width`.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int, *, context_width: int, out_width: int | None = None) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.out = nn.Linear(width, out_width or width)

    def forward(self, hidden: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, N, D]` and `[B, M, C]` to `[B, N, out_width]`; `mask` is bool and fits `[B, heads, N, M]`."""
        query, key, value = (
            project(sequence).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N or M, D / heads]
            for project, sequence in ((self.query, hidden), (self.key, context), (self.value, context))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, exact or by its tanh formula."""

    def __init__(self, width: int, hidden_width: int | None = None, *, tanh_gelu: bool = False) -> None:
        super().__init__()
        self.approximate = "tanh" if tanh_gelu else "none"
        hidden_width = hidden_width or 4 * width
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(hidden), approximate=self.approximate))


class PackedGatedMLP(nn.Module):
    """One half of a linear map gates the other before a second map (SwiGLU, 2002.05202), both with biases."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden_width)
        self.down = nn.Linear(hidden_width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(hidden).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class ChannelScale(nn.Module):
    """Every channel times a learned number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden


class TransformerBlock(nn.Module):
    """LayerNorm, attention, residual; LayerNorm, MLP, residual. The MLP is `mlp_width` wide, by default 4 `width`.

    With `gated` it is one of `PackedGatedMLP`; with `scaled` both updates are scaled by channel (2103.17239).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_width: int | None = None,
        eps: float = 1e-5,
        tanh_gelu: bool = False,
        gated: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = (
            PackedGatedMLP(width, mlp_width or 4 * width) if gated else MLP(width, mlp_width, tanh_gelu=tanh_gelu)
        )
        self.attention_scale: nn.Module = ChannelScale(width) if scaled else nn.Identity()
        self.mlp_scale: nn.Module = ChannelScale(width) if scaled else nn.Identity()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, N, D]` to the same; `mask` as in `SelfAttention`."""
        hidden = hidden + self.attention_scale(self.attention(self.attention_norm(hidden), mask))
        return hidden + self.mlp_scale(self.mlp(self.mlp_norm(hidden)))
