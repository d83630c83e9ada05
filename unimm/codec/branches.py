"""A pyramid that ends in branches (FQGAN, 2411.16681): a transformer and a codebook for each factor of a picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.pyramid import PyramidEncoderConfig, PyramidTrunk
from unimm.nn.blocks import TransformerBlock
from unimm.nn.pyramid import EPS, GROUPS


@dataclass(frozen=True)
class BranchEncoderConfig(PyramidEncoderConfig):
    """A pyramid whose coarsest grid is read by several branches.

    Args:
        branches: how many; the features are theirs side by side, `code_channels` of each.
        rows, columns: of the coarsest grid, whose cells have learned positions in each branch.
        depth, num_heads: of the transformer of a branch, which is as wide as the coarsest level.
    """

    branches: int = 2
    rows: int = 16
    columns: int = 16
    depth: int = 6
    num_heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 1:
            raise ValueError(f"branches is {self.branches}; name at least 1.")

    @property
    def width(self) -> int:
        return self.branches * self.code_channels


class Branch(nn.Module):
    """What one factor sees in the coarsest grid: `[B, D, rows, columns]` to `[B, code_channels, rows, columns]`."""

    def __init__(self, config: BranchEncoderConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.positions = nn.Parameter(torch.randn(config.rows * config.columns, width) * width**-0.5)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TransformerBlock(width, config.num_heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width)
        self.norm = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.out = nn.Conv2d(width, config.code_channels, config.out_kernel, padding=config.out_kernel // 2)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        hidden = self.norm_in(grid.flatten(2).transpose(1, 2) + self.positions)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm_out(hidden).transpose(1, 2).contiguous().unflatten(2, grid.shape[2:])
        return self.out(F.silu(self.norm(hidden)))


class BranchEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` to `[B, branches * code_channels, rows, columns]`, one branch after the other."""

    def __init__(self, config: BranchEncoderConfig) -> None:
        super().__init__()
        self.trunk = PyramidTrunk(config)
        self.branches = nn.ModuleList(Branch(config) for _ in range(config.branches))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        grid = self.trunk(pixel_values)
        return torch.cat([branch(grid) for branch in self.branches], dim=1)
