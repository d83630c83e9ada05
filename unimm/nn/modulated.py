"""Transformer blocks that a condition modulates (DiT, 2212.09748), for tokens of several kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unimm.nn.blocks import MLP, SelfAttention

EPS = 1e-6
PLAIN = -1  # the kind of tokens that no condition reaches


def normed(hidden: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the last axis."""
    return F.layer_norm(hidden, hidden.shape[-1:], eps=EPS)


class ModulatedBlock(nn.Module):
    """A pre-norm block whose norms are scaled and shifted, and whose updates are gated, by a condition.

    Each kind of tokens has shifts, scales and gates of its own; those of kind `PLAIN` go through an ordinary block.
    """

    def __init__(self, width: int, num_heads: int, *, mlp_width: int, kinds: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.attention = SelfAttention(width, num_heads)
        self.mlp = MLP(width, mlp_width, tanh_gelu=True)
        self.modulation = nn.Linear(width, kinds * 6 * width)

    def forward(
        self, hidden: torch.Tensor, condition: torch.Tensor, kind: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, N, D]` under a condition `[B, D]`, whose tokens are of the kinds int64 `[N]`.

        `mask` fits `[B, heads, N, N]`: bool, True where a row may see a column, or floats that are added to scores.
        """
        modulation = self.modulation(F.silu(condition)).unflatten(1, (self.kinds, 6, -1))  # [B, kinds, 6, D]
        plain = modulation.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).view(1, 1, 6, 1)
        modulation = torch.cat([modulation, plain.expand(len(hidden), -1, -1, hidden.shape[2])], dim=1)
        parts = (part[:, kind] for part in modulation.unbind(dim=2))  # six of [B, N, D]; PLAIN is the last one
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        hidden = hidden + gate * self.attention(normed(hidden) * (1 + scale) + shift, mask)
        return hidden + mlp_gate * self.mlp(normed(hidden) * (1 + mlp_scale) + mlp_shift)
