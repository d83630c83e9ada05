"""Queries that read a picture, and queries that draw it (GigaTok, 2504.08736), both in the layers of DETR (2005.12872).

The latents begin as the picture averaged over ever finer grids; the cells of what is drawn all begin as the first code.
Positions are no part of what is read: every layer adds them to queries and keys alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.dual import TwoSidedDecoder
from unimm.codec.merging import level_grid, level_sizes
from unimm.codec.pyramid import PyramidDecoder, PyramidDecoderConfig
from unimm.codec.resamplers import SequenceResampler
from unimm.nn.blocks import MLP, check_heads

SPREAD = 0.02  # of freshly drawn positions


def averaged_levels(features: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Features `[B, D, rows, columns]` as their means over ever finer grids, `[B, sum(sizes), D]`, coarse to fine."""
    levels = [F.adaptive_avg_pool2d(features, level_grid(size)).flatten(2) for size in sizes]
    return torch.cat(levels, dim=2).transpose(1, 2)


class PlacedAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are three sequences of one width.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]`, `[B, M, D]` and `[B, M, D]` to `[B, N, D]`."""
        query, key, value = (
            F.linear(sequence, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for sequence, weight, bias in zip(
                (queries, keys, values), self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True
            )
        )  # each [B, heads, N or M, D / heads]
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """Norm and attention among queries, norm and attention to what they read, norm and MLP, each with a residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = PlacedAttention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross = PlacedAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, hidden: torch.Tensor, read: torch.Tensor, query_positions: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Queries `[B, N, D]` that read `[B, M, D]`, at positions `[N, D]` and `[M, D]`."""
        normed = self.attention_norm(hidden)
        placed = normed + query_positions
        hidden = hidden + self.attention(placed, placed, normed)
        placed = self.cross_norm(hidden) + query_positions
        hidden = hidden + self.cross(placed, read + positions, read)
        return hidden + self.mlp(self.mlp_norm(hidden))


class QueryReader(nn.Module):
    """Queries `[B, queries, width]` that read `[B, length, in_width]`, or the first of as many."""

    def __init__(self, in_width: int, width: int, *, depth: int, num_heads: int, queries: int, length: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(in_width)
        self.embed = nn.Linear(in_width, width)
        self.positions = nn.Parameter(torch.randn(length, width) * SPREAD)
        self.query_positions = nn.Parameter(torch.randn(queries, width) * SPREAD)
        self.layers = nn.ModuleList(QueryLayer(width, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def embedded(self, sequence: torch.Tensor) -> torch.Tensor:
        """What the queries read, and may begin as: `[B, length, in_width]` to `[B, length, width]`."""
        return self.embed(self.norm_in(sequence))

    def states(self, hidden: torch.Tensor, read: torch.Tensor) -> Iterator[torch.Tensor]:
        """The queries after each layer, from how they begin and what was embedded."""
        for layer in self.layers:
            hidden = layer(hidden, read, self.query_positions, self.positions[: read.shape[1]])
            yield hidden

    def forward(self, hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The queries after the last layer, normalised."""
        *_, last = self.states(hidden, read)
        return self.norm_out(last)


@dataclass(frozen=True)
class QueryResamplerConfig:
    """Latents that begin as averages of the picture and read it.

    Args:
        tokens: latents, and so codes; a power of two.
        padding: latents behind them that begin as the last so many of theirs do (ReToK, 2601.01535); see
            `length.padding`.
        rows, columns: of the encoder's grid, both whole multiples of those of the finest average.
        dim: width of the vectors that are quantised.
        width, depth, num_heads: of the transformer.
    """

    tokens: int = 256
    padding: int = 0
    rows: int = 16
    columns: int = 16
    dim: int = 8
    width: int = 768
    depth: int = 12
    num_heads: int = 12

    def __post_init__(self) -> None:
        if not 0 <= self.padding <= self.tokens:
            raise ValueError(f"padding is {self.padding}; it begins as the last of {self.tokens} averages do.")
        rows, columns = level_grid(level_sizes(self.tokens)[-1])
        if self.rows % rows or self.columns % columns:
            raise ValueError(
                f"tokens is {self.tokens}, whose finest average has {rows} x {columns} cells, and the encoder's grid "
                f"is {self.rows} x {self.columns}; its sides must be multiples of these."
            )


class QueryResampler(SequenceResampler):
    """Features `[B, D, rows, columns]` to `[B, tokens + padding, dim]`."""

    def __init__(self, config: QueryResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.sizes, self.padding = level_sizes(config.tokens), config.padding
        self.reader = QueryReader(
            encoder_width,
            config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            queries=config.tokens + config.padding,
            length=config.rows * config.columns,
        )
        self.to_queries = nn.Linear(config.width, config.width)
        self.to_positions = nn.Sequential(nn.Linear(config.width, encoder_width), nn.Linear(encoder_width, config.dim))

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        assert pool == 1, "latents have no grid to pool"
        cells = self.reader.embedded(features.flatten(2).transpose(1, 2))
        grid = cells.transpose(1, 2).unflatten(2, features.shape[2:])
        queries = self.to_queries(averaged_levels(grid, self.sizes))
        queries = torch.cat([queries, queries[:, queries.shape[1] - self.padding :]], dim=1)
        return self.to_positions(self.reader(queries, cells))


@dataclass(frozen=True)
class QueryDecoderConfig(DecoderOptions):
    """A grid of queries that read codes, and convolutions that draw it.

    Args:
        dim: width of a looked-up code.
        tokens: the most codes of a picture.
        rows, columns: of the grid.
        width, depth, num_heads: of the transformer.
        aligned_layer: the layer, counted from 1, whose states learn the features of a vision tower; 0 for none.
        feature_width: of these features.
        pixels: the pixel decoder behind it.
    """

    dim: int = 8
    tokens: int = 256
    rows: int = 16
    columns: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    aligned_layer: int = 0
    feature_width: int = 768
    pixels: PyramidDecoderConfig = field(default_factory=PyramidDecoderConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.aligned_layer <= self.depth:
            raise ValueError(f"aligned_layer is {self.aligned_layer}; name one of 1 to {self.depth}, or 0 for none.")

    @property
    def upsample(self) -> int:
        return self.pixels.factor

    @property
    def in_width(self) -> int:
        return self.dim

    @property
    def makes_features(self) -> bool:
        return self.aligned_layer > 0


class QueryDecoder(TwoSidedDecoder):
    """Codes `[B, N, dim]`, N at most `tokens`, to pixels; on request to features of cells, `[B, cells, width]`."""

    def __init__(self, config: QueryDecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.pixels.code_channels
        self.from_vectors = nn.Linear(config.dim, channels)
        self.reader = QueryReader(
            channels,
            config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            queries=config.rows * config.columns,
            length=config.tokens,
        )
        self.to_grid = nn.Conv2d(config.width, channels, 3, padding=1)
        self.pixels = PyramidDecoder(config.pixels)
        self.to_features: nn.Module = nn.Identity()
        if config.aligned_layer:
            hidden = 4 * config.width
            self.to_features = nn.Sequential(
                nn.Linear(config.width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, config.feature_width),
            )

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        hidden = self.reader(*self.begun(vectors)).transpose(1, 2)
        return self.pixels(self.to_grid(hidden.unflatten(2, (self.config.rows, self.config.columns)).contiguous()))

    def features(self, vectors: torch.Tensor) -> torch.Tensor:
        states = self.reader.states(*self.begun(vectors))
        for layer, hidden in enumerate(states, start=1):
            if layer == self.config.aligned_layer:
                return self.to_features(hidden)
        raise ValueError("aligned_layer is 0; this decoder makes no features.")

    def begun(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How the queries begin, and what they read."""
        codes = self.reader.embedded(self.from_vectors(vectors))
        return codes[:, :1].expand(-1, self.config.rows * self.config.columns, -1), codes
