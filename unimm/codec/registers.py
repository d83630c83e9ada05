"""Registers (FlexTok, 2502.13967): learned tokens after the picture's cells, each of which sees the earlier ones.

Cells see cells alone and a register sees all cells and the registers up to itself, so that the first codes of a picture
are the same however many follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.codec.resamplers import SequenceResampler
from unimm.nn.gated import GatedBlock, normed

SPREAD = 0.02  # of freshly drawn registers and positions


@dataclass(frozen=True)
class RegisterResamplerConfig:
    """Registers that join the cells in one transformer.

    Args:
        tokens: registers, and so codes.
        rows, columns: of the encoder's grid.
        dim: width of the vectors that are quantised.
        depth, num_heads: of the transformer, which is as wide as the encoder.
        mlp_width: of its gated MLPs.
    """

    tokens: int = 256
    rows: int = 16
    columns: int = 16
    dim: int = 6
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 2048


def prefix_causal_mask(cells: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Bool `[cells + tokens, cells + tokens]`, True where the row may see the column."""
    mask = torch.ones(cells + tokens, cells + tokens, dtype=torch.bool, device=device).tril()
    mask[:cells, :cells] = True
    return mask


class RegisterResampler(SequenceResampler):
    """Features `[B, D, rows, columns]` to `[B, tokens, dim]`."""

    def __init__(self, config: RegisterResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(config.rows * config.columns, encoder_width) * SPREAD)
        self.registers = nn.Parameter(torch.randn(config.tokens, encoder_width) * SPREAD)
        self.blocks = nn.ModuleList(
            GatedBlock(encoder_width, config.num_heads, mlp_width=config.mlp_width) for _ in range(config.depth)
        )
        self.to_positions = nn.Linear(encoder_width, config.dim)

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        assert pool == 1, "registers have no grid to pool"
        cells = features.flatten(2).transpose(1, 2) + self.positions
        num_cells = cells.shape[1]
        hidden = torch.cat([cells, self.registers.expand(len(cells), -1, -1)], dim=1)
        mask = prefix_causal_mask(num_cells, len(self.registers), hidden.device)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.to_positions(normed(hidden[:, num_cells:]))
