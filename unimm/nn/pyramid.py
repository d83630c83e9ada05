"""The parts of VQGAN-like pyramids over `[B, D, H, W]`: residual blocks, attention over the grid, a conditioned norm.

Norms are group norms of 32 groups with an epsilon of 1e-6, as in every published descendant of VQGAN (2012.09841).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 32
EPS = 1e-6
SHORTCUTS = ("input", "update")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class SpatialNorm(nn.Module):
    """Group norm that is scaled and shifted, at every position, by another grid there (MoVQ, 2209.09002)."""

    def __init__(self, channels: int, condition_channels: int, *, eps: float = EPS) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=eps)
        self.to_scale = nn.Conv2d(condition_channels, channels, 1)
        self.to_shift = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """`[B, D, H, W]` under `[B, C, h, w]`, whose cells are repeated where they are fewer."""
        size = hidden.shape[2:]  # maps of single positions, so they are computed before these are repeated
        scale, shift = (F.interpolate(part(condition), size) for part in (self.to_scale, self.to_shift))
        return self.norm(hidden) * scale + shift


def grid_norm(channels: int, condition_channels: int = 0, *, eps: float = EPS) -> nn.Module:
    """A group norm, under a condition where that has channels."""
    if condition_channels:
        return SpatialNorm(channels, condition_channels, eps=eps)
    return nn.GroupNorm(GROUPS, channels, eps=eps)


class PyramidBlock(nn.Module):
    """Norm, activation, 3x3 convolution, twice, and a shortcut that is a 1x1 convolution where the width changes.

    Args:
        bias: whether the convolutions have one.
        shortcut: what the 1x1 convolution reads: the `input`, or the `update` itself, as the pixel decoder of TiTok
            (2406.07550) does, whose blocks that change the width have no path around them.
        first_kernel: side of the first convolution.
        norm_channels: of the condition of both norms, `SpatialNorm`s then; 0 for plain ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        shortcut: str = "input",
        activation: str = "silu",
        eps: float = EPS,
        first_kernel: int = 3,
        norm_channels: int = 0,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut is {shortcut!r}; it must be one of {', '.join(SHORTCUTS)}.")
        self.shortcut_reads_update = shortcut == "update"
        self.norm_in = grid_norm(in_channels, norm_channels, eps=eps)
        self.conv_in = nn.Conv2d(in_channels, out_channels, first_kernel, padding=first_kernel // 2, bias=bias)
        self.norm_out = grid_norm(out_channels, norm_channels, eps=eps)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(
                out_channels if self.shortcut_reads_update else in_channels, out_channels, 1, bias=bias
            )

    def forward(self, hidden: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        update = self.conv_in(self.activation(self.norm_in(hidden, *condition)))
        update = self.conv_out(self.activation(self.norm_out(update, *condition)))
        if self.shortcut_reads_update and not isinstance(self.shortcut, nn.Identity):
            return update + self.shortcut(update)
        return update + self.shortcut(hidden)


class GridAttention(nn.Module):
    """One head of self-attention over all positions of the grid, with a residual."""

    def __init__(self, channels: int, norm_channels: int = 0) -> None:
        super().__init__()
        self.norm = grid_norm(channels, norm_channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden, *condition)
        query, key, value = (
            project(normed).flatten(2).transpose(1, 2)[:, None]  # [B, 1, H W, D]
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return hidden + self.out(attended.transpose(1, 2).unflatten(2, hidden.shape[2:]))


class AdaptiveNorm(nn.Module):
    """Group norm without weights of its own: scale and shift come from another grid's spread and mean.

    The condition `[B, C, h, w]` may have any size; one value per channel is taken of it (Open-MAGVIT2, 2409.04410).
    """

    def __init__(self, channels: int, condition_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=EPS, affine=False)
        self.to_scale = nn.Linear(condition_channels, channels)
        self.to_shift = nn.Linear(condition_channels, channels)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        flat = condition.flatten(2)
        scale, shift = self.to_scale((flat.var(dim=-1) + EPS).sqrt()), self.to_shift(flat.mean(dim=-1))
        return self.norm(hidden) * scale[..., None, None] + shift[..., None, None]


class Halve(nn.Module):
    """A 3x3 convolution of stride 2; `centred` pads all round, else right and below only, as VQGAN does."""

    def __init__(self, channels: int, *, centred: bool) -> None:
        super().__init__()
        self.padding = (1, 1, 1, 1) if centred else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden, self.padding))


class Fold(nn.Module):
    """A 3x3 convolution whose 2 x 2 positions become channels, beside their mean (DC-AE, 2410.10733)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 4, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.pixel_unshuffle(self.conv(hidden), 2) + F.avg_pool2d(hidden, 2)


class Unfold(nn.Module):
    """A 3x3 convolution whose channels become 2 x 2 positions, beside the position that they come from."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.conv(hidden), 2) + F.interpolate(hidden, scale_factor=2.0, mode="nearest")


class Double(nn.Module):
    """Repeat every position 2 x 2 times, then a 3x3 convolution, to `out_channels` or as many as came in."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
