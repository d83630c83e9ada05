"""Codes drawn by a flow of each cell's pixels (UniFlow, 2510.10575).

The codes look at each other once; what each then is conditions a network that sees the noisy pixels of its own cell
alone. Steps are as cheap as that network, and cells are drawn independently of each other's noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.flow import TIME_FEATURES, TIME_SCALE, Denoised, Flow, FlowOptions, denoised, drawn
from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import SpaceToChannels
from unimm.nn.positions import time_features

SPREAD = 0.02  # of freshly drawn positions
EPS = 1e-6  # of the norms of the flow
PERIOD = 10000.0


@dataclass(frozen=True)
class CellFlowConfig(FlowOptions):
    """A transformer over codes, and a network of each cell.

    Args:
        flow_depth: layers of the latter, which is as wide as the former.
        gated_detail: whether a cell begins as what its code means, with a learned share of its noisy pixels, rather
            than as these alone; see `GatedDetail`.
    """

    dim: int = 64
    rows: int = 32
    columns: int = 32
    patch: int = 14
    width: int = 1024
    depth: int = 6
    num_heads: int = 16
    steps: int = 1
    flow_depth: int = 12
    gated_detail: bool = False


class ModulatedMLP(nn.Module):
    """An MLP whose norm is scaled and shifted, and whose update is gated, by a condition of every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` under `[B, N, D]`."""
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, dim=-1)
        return hidden + gate * self.down(F.silu(self.up(self.norm(hidden) * (1 + scale) + shift)))


class GatedDetail(nn.Module):
    """What a position means, and as much of its detail as a number that the meaning says (Cheers, 2603.12793).

    That number is 0 at first: meaning comes before detail.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(width, 1))
        self.norm = nn.LayerNorm(width)

    def forward(self, meaning: torch.Tensor, detail: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` and `[B, N, D]` to the same."""
        return self.norm(meaning + F.silu(self.up(meaning)) @ self.gate * detail)


class CellFlowDecoder(Flow):
    """Codes `[B, dim, rows, columns]` to pictures `[B, C, H, W]`."""

    def __init__(self, config: CellFlowConfig) -> None:
        super().__init__(config)
        self.steps, self.patch, width = config.steps, config.patch, config.width
        cells = config.rows * config.columns
        self.embed = nn.Sequential(nn.Linear(config.dim, width), nn.GELU(), nn.Linear(width, width))
        self.code_positions = nn.Parameter(torch.randn(cells, width) * SPREAD)
        self.blocks = nn.ModuleList(TransformerBlock(width, config.num_heads) for _ in range(config.depth))
        self.positions = nn.Parameter(torch.randn(cells, width) * SPREAD)
        self.to_condition = nn.Linear(width, width)
        self.patches = SpaceToChannels(config.channels, width, config.patch)
        self.detail = GatedDetail(width) if config.gated_detail else None
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(ModulatedMLP(width) for _ in range(config.flow_depth))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_patches = nn.Linear(width, config.channels * config.patch**2)

    def conditions(self, vectors: torch.Tensor) -> torch.Tensor:
        """What the cells are drawn from, `[B, rows * columns, D]`; the same at every step."""
        hidden = self.embed(vectors.flatten(2).transpose(1, 2)) + self.code_positions
        for block in self.blocks:
            hidden = block(hidden)
        return hidden + self.positions

    def velocity(self, noisy: torch.Tensor, time: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        """Velocity, noise minus picture, of `noisy` `[B, C, H, W]` with a share `time` `[B]` of noise."""
        cells = self.patches(noisy)  # [B, D, rows, columns]
        passed = time_features((1 - time) * TIME_SCALE, TIME_FEATURES, PERIOD)  # the network counts from noise
        condition = self.to_condition(conditions) + self.time(passed.to(noisy.dtype))[:, None]
        hidden = cells.flatten(2).transpose(1, 2)
        if self.detail is not None:
            hidden = self.detail(conditions, hidden)
        for layer in self.layers:
            hidden = layer(hidden, condition)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        patches = self.to_patches(self.norm(hidden) * (1 + scale) + shift).transpose(1, 2)
        return -F.pixel_shuffle(patches.unflatten(2, cells.shape[2:]), self.patch)

    def sample(self, vectors: torch.Tensor, noise: torch.Tensor, *, steps: int | None = None) -> torch.Tensor:
        """Pictures `[B, C, H, W]` of codes that begin as `noise`; by default in the configuration's steps.

        Raises:
            ValueError: no steps.
        """
        velocity = partial(self.velocity, conditions=self.conditions(vectors))
        return drawn(velocity, noise, self.steps if steps is None else steps)

    def denoise(self, vectors: torch.Tensor, picture: torch.Tensor) -> Denoised:
        """One training step at random times."""
        return denoised(partial(self.velocity, conditions=self.conditions(vectors)), picture)
