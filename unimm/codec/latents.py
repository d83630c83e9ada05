"""One-dimensional latents (TiTok, 2406.07550): a picture read by, and drawn from, a short sequence of tokens.

`LatentResampler` lets learned latents attend to the cells of the picture and keeps the latents alone; `MaskViTDecoder`
lets a grid of mask tokens attend to looked-up codes and keeps the grid alone. A picture of fewer codes is decoded by
the same network over a shorter sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.pyramid import PyramidDecoder, PyramidDecoderConfig
from unimm.codec.resamplers import SequenceResampler
from unimm.nn.blocks import TransformerBlock

SPREAD = 0.02  # of freshly drawn tokens and positions


@dataclass(frozen=True)
class LatentResamplerConfig:
    """Queries that join the cells in one transformer.

    Args:
        tokens: latents, and so codes.
        rows, columns: of the encoder's grid.
        dim: width of the vectors that are quantised.
        depth, num_heads: of the transformer, which is as wide as the encoder.
        scramble: project as TiTok's two-stage checkpoints and One-D-Piece do: the `[N, D]` latents are read as `[D, N]`
            without being transposed, so that a code mixes the channels of several latents.
        condition_tokens, condition_width: size of the text features that join the sequence, so that the codes need not
            say what the text does (TexTok, 2412.05796); 0 for none.
    """

    tokens: int = 32
    rows: int = 16
    columns: int = 16
    dim: int = 12
    depth: int = 8
    num_heads: int = 8
    scramble: bool = False
    condition_tokens: int = 0
    condition_width: int = 0


class TextTokens(nn.Module):
    """Features of a text `[B, L, in_width]` as tokens of a transformer, `[B, L, width]`."""

    def __init__(self, length: int, in_width: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_width, width)
        self.positions = nn.Parameter(torch.randn(length, width) * SPREAD)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.embed(text) + self.positions


class TokenTransformer(nn.Module):
    """A class token and a grid with learned positions, then further tokens; pre-norm blocks between two norms."""

    def __init__(self, width: int, depth: int, num_heads: int, *, cells: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, width) * SPREAD)
        self.positions = nn.Parameter(torch.randn(cells + 1, width) * SPREAD)
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, cells: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, cells, D]` and `[B, T, D]` to `[B, 1 + cells + T, D]`."""
        class_token = self.class_token.expand(len(cells), 1, -1)
        hidden = torch.cat([torch.cat([class_token, cells], dim=1) + self.positions, tokens], dim=1)
        hidden = self.norm_in(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm_out(hidden)


class LatentResampler(SequenceResampler):
    """Full attention among class token, cells, latents and text, if there is one; only the latents go on."""

    def __init__(self, config: LatentResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.scramble = config.scramble
        self.num_cells = config.rows * config.columns
        self.transformer = TokenTransformer(encoder_width, config.depth, config.num_heads, cells=self.num_cells)
        self.latents = nn.Parameter(torch.randn(config.tokens, encoder_width) * SPREAD)
        self.latent_positions = nn.Parameter(torch.randn(config.tokens, encoder_width) * SPREAD)
        self.to_positions = nn.Linear(encoder_width, config.dim)
        if config.condition_width:
            self.condition_size = (config.condition_tokens, config.condition_width)
            self.text = TextTokens(*self.condition_size, encoder_width)

    def sample(self, features: torch.Tensor, pool: int = 1, condition: torch.Tensor | None = None) -> torch.Tensor:
        assert pool == 1, "latents have no grid to pool"
        cells = features.flatten(2).transpose(1, 2)
        latents = (self.latents + self.latent_positions).expand(len(cells), -1, -1)
        tokens = latents if condition is None else torch.cat([latents, self.text(condition)], dim=1)
        start = 1 + self.num_cells
        hidden = self.transformer(cells, tokens)[:, start : start + latents.shape[1]]  # [B, N, D]
        if self.scramble:
            batch, length, width = hidden.shape
            hidden = hidden.reshape(batch, width, length).transpose(1, 2)
        return self.to_positions(hidden)


@dataclass(frozen=True)
class SoftCodebookConfig:
    """A second codebook between the transformer and a pixel decoder; the decoder reads the expected row.

    Args:
        size: rows.
        pyramid: the decoder of the rows.
    """

    size: int = 1024
    pyramid: PyramidDecoderConfig = field(default_factory=PyramidDecoderConfig)


@dataclass(frozen=True)
class MaskViTDecoderConfig(DecoderOptions):
    """Mask tokens that become a picture.

    Args:
        dim: width of a looked-up code.
        tokens: the most codes of a picture.
        rows, columns: of the grid of mask tokens.
        patch: pixels per side of a cell, for the direct head.
        width, depth, num_heads: of the transformer.
        soft_codebook: draw through a second codebook (two-stage TiTok); None predicts pixels.
        condition_tokens, condition_width: size of the text features that join the sequence (TA-TiTok, 2501.07730);
            0 for none.
    """

    dim: int = 12
    tokens: int = 32
    rows: int = 16
    columns: int = 16
    patch: int = 16
    width: int = 512
    depth: int = 8
    num_heads: int = 8
    soft_codebook: SoftCodebookConfig | None = None
    condition_tokens: int = 0
    condition_width: int = 0

    @property
    def upsample(self) -> int:
        return self.patch if self.soft_codebook is None else self.soft_codebook.pyramid.factor

    @property
    def in_width(self) -> int:
        return self.dim

    @property
    def condition_size(self) -> tuple[int, int] | None:
        return (self.condition_tokens, self.condition_width) if self.condition_width else None


class PixelHead(nn.Module):
    """Each cell to its patch, then one 3x3 convolution over the picture."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.to_patches = nn.Conv2d(width, patch * patch * 3, 1)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return self.smooth(F.pixel_shuffle(self.to_patches(grid), self.patch))


class SoftCodebookHead(nn.Module):
    """Scores over a second codebook, the expected row under them, and its own pixel decoder."""

    def __init__(self, width: int, config: SoftCodebookConfig) -> None:
        super().__init__()
        self.to_scores = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, config.size, 1))
        self.rows = nn.Parameter(torch.randn(config.size, config.pyramid.code_channels))
        self.pixels = PyramidDecoder(config.pyramid)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return self.pixels(self.expected_rows(self.to_scores(grid)))

    def expected_rows(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[B, size, rows, columns]` to `[B, code_channels, rows, columns]`."""
        return torch.einsum("bshw,sd->bdhw", scores.softmax(dim=1), self.rows).contiguous()


class MaskViTDecoder(nn.Module):
    """Codes `[B, N, dim]`, N at most `tokens`, and text `[B, L, condition_width]` where conditioned, to pixels."""

    def __init__(self, config: MaskViTDecoderConfig) -> None:
        super().__init__()
        self.grid = (config.rows, config.columns)
        self.embed = nn.Linear(config.dim, config.width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, config.width) * SPREAD)
        cells = config.rows * config.columns
        self.transformer = TokenTransformer(config.width, config.depth, config.num_heads, cells=cells)
        self.code_positions = nn.Parameter(torch.randn(config.tokens, config.width) * SPREAD)
        if config.condition_width:
            self.text = TextTokens(config.condition_tokens, config.condition_width, config.width)
        self.head: nn.Module = (
            PixelHead(config.width, config.patch)
            if config.soft_codebook is None
            else SoftCodebookHead(config.width, config.soft_codebook)
        )

    def forward(self, vectors: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = vectors.shape
        tokens = self.embed(vectors) + self.code_positions[:length]
        if condition is not None:
            tokens = torch.cat([tokens, self.text(condition)], dim=1)
        cells = self.mask_token.expand(batch, self.grid[0] * self.grid[1], -1)
        hidden = self.transformer(cells, tokens)[:, 1 : 1 + cells.shape[1]]
        return self.head(hidden.transpose(1, 2).contiguous().unflatten(2, self.grid))
