"""Small networks that read what a codec's codes stand for as features of frozen models, so that codes come to mean
something (VA-VAE, 2501.01423; GigaTok, 2504.08736).

One head serves three objectives: alignment of all vectors, of one branch of a product (FQGAN, 2411.16681), and of the
first codes of a sequence (ReToK, 2601.01535). Heads learn beside the codec, by the same optimizer, and stay in the
checkpoints: the saved codec has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec import CodecOutput, VisualCodecConfig, VisualCodecModel, socket_config
from unimm.nn.blocks import CrossAttention, TransformerBlock
from unimm.training.objectives import CellFeatures, FeatureConfig, cosine_loss

SPREAD = 0.02  # of fresh queries and positions
HEAD_WIDTH = 64  # of an attention head
CHANNELS = 4096  # of a picture whose times need no shift


@dataclass(frozen=True)
class AlignmentConfig(FeatureConfig):
    """Features of a frozen vision transformer that a head reads from the vectors of the codes.

    Args:
        slot: the branch of a product whose vectors alone are read; None for all.
        prefixes: numbers of codes that are read alone, and the share of each in the loss; empty for all codes.
        noised: whether they are read from vectors on their way to noise, by `noised`, so that a flow over them means
            something at every step (RecTok, 2512.13421).
        mapper: transformer blocks in which the cells meet before each is read, so that the vectors need not lie as the
            features do to tell them (Send-VAE); 0 reads each cell by itself.

    Raises:
        ValueError: no model, shares that are none, or fewer than no blocks.
    """

    weight: float = 0.5
    slot: int | None = None
    prefixes: dict[int, float] = field(default_factory=dict)
    noised: bool = False
    mapper: int = 0

    def __post_init__(self) -> None:
        if self.mapper < 0:
            raise ValueError(f"mapper is {self.mapper}; give a number of blocks, 0 for none.")
        if not self.model:
            raise ValueError("An alignment names no model; give align.NAME.model=PATH, a vision model of transformers.")
        if any(share <= 0 for share in self.prefixes.values()):
            raise ValueError(f"prefixes are {self.prefixes}; give each length a share above 0.")


def check_alignment(name: str, config: AlignmentConfig, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where a codec has no such vectors to align."""
    check_length(f"align.{name}", codec)
    if config.slot is not None:
        check_branches(f"align.{name}.slot is {config.slot}", codec)
        slots = len(socket_config("quantizer", codec.quantizer).sizes)
        if not 0 <= config.slot < slots:
            raise ValueError(f"align.{name}.slot is {config.slot}; the product has branches 0 to {slots - 1}.")
    length = codec.length_policy
    if config.prefixes and (length.layout != "sequence" or length.min_length == length.max_length):
        raise ValueError(
            f"align.{name}.prefixes name {', '.join(map(str, config.prefixes))} codes, and this codec has one length "
            "only; take a sequence with length.prefixes: true, or leave them out."
        )
    for codes in config.prefixes:
        if not length.min_length <= codes <= length.max_length:
            raise ValueError(
                f"align.{name}.prefixes name {codes} codes; this codec has {length.min_length} to {length.max_length}."
            )


def check_length(reader: str, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where pictures of a codec differ in their number of codes."""
    if codec.length_policy.ragged:
        raise ValueError(
            f"{reader} reads pictures of equally many codes, and this codec keeps as many of each as it needs; "
            "take another length.kind, or leave it out."
        )


def check_branches(wish: str, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where a codec has no branches."""
    if codec.quantizer["kind"] != "product":
        raise ValueError(
            f"{wish}, and a quantizer of kind {codec.quantizer['kind']!r} has no branches; take kind: product."
        )


def heads_of(width: int) -> int:
    """Attention heads of a width."""
    return width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 1


class CellReader(nn.Module):
    """Vectors `[B, n, D]` of the first codes of a sequence to `[B, cells, width]`: every cell asks them all once."""

    def __init__(self, dim: int, length: int, cells: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.randn(length, width) * SPREAD)
        self.queries = nn.Parameter(torch.randn(cells, width) * SPREAD)
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads_of(width), context_width=width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        codes = self.norm(self.embed(vectors) + self.positions[: vectors.shape[1]])
        queries = self.queries.expand(len(vectors), -1, -1)
        return queries + self.attention(queries, codes)


class CellGrid(nn.Module):
    """Vectors `[B, N, D]` of a square grid to `[B, cells, D]`, resized bilinearly."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.side = math.isqrt(cells)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(vectors.shape[1])  # pictures that a codec learns from are squares
        grid = vectors.transpose(1, 2).unflatten(2, (side, side))
        if side != self.side:
            grid = F.interpolate(grid, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return grid.flatten(2).transpose(1, 2)


class CellMapper(nn.Module):
    """Cells `[B, cells, D]` to `[B, cells, width]`, which have met in transformer blocks."""

    def __init__(self, dim: int, cells: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.positions = nn.Parameter(torch.randn(cells, width) * SPREAD)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads_of(width)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(self.embed(cells) + self.positions))


class AlignmentHead(nn.Module):
    """What the codes stand for, read as the features of a frozen model: three layers for each of its cells, after the
    blocks in which they meet.

    Args:
        length: codes of a picture.
        features: of which it is read.
    """

    def __init__(self, config: AlignmentConfig, codec: VisualCodecModel, length: int, features: CellFeatures) -> None:
        super().__init__()
        self.slot, self.prefixes = config.slot, config.prefixes or {length: 1.0}
        self.noised = config.noised
        self.num_slots = len(codec.quantizer.sizes) if config.slot is not None else 1
        dim, width = codec.dim // self.num_slots, features.width
        on_grid = codec.length.layout == "grid"
        self.cells = CellGrid(features.num_cells) if on_grid else CellReader(dim, length, features.num_cells, width)
        read = dim if on_grid else width
        self.mapper: nn.Module = nn.Identity()
        if config.mapper:
            self.mapper, read = CellMapper(read, features.num_cells, width, config.mapper), width
        self.layers = nn.Sequential(
            nn.Linear(read, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, vectors: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """How far what is read of vectors `[B, N, D]` is from the unit features `[B, cells, width]`, in [0, 2]."""
        if self.slot is not None:
            vectors = vectors.chunk(self.num_slots, dim=-1)[self.slot]
        if self.noised:
            vectors = noised(vectors)
        losses = [
            share * cosine_loss(self.layers(self.mapper(self.cells(vectors[:, :codes]))), wanted)
            for codes, share in self.prefixes.items()
        ]
        return torch.stack(losses).sum() / sum(self.prefixes.values())


def noised(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors `[B, N, D]` at times t of a flow to noise, (1 - t) * vectors + t * noise, t drawn for each picture.

    t is uniform and then shifted towards noise by s = sqrt(N * D / 4096), t to s * t / (1 + (s - 1) * t), since more
    channels take more noise to be hidden (2403.03206).
    """
    shift = math.sqrt(vectors[0].numel() / CHANNELS)
    time = torch.rand(len(vectors), 1, 1, device=vectors.device)
    time = shift * time / (1 + (shift - 1) * time)
    return torch.lerp(vectors, torch.randn_like(vectors), time.to(vectors.dtype))


def disentangling_loss(vectors: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Mean squared cosine between the branches of vectors `[B, N, D]`, over all pairs of them (FQGAN, 2411.16681)."""
    branches = [F.normalize(branch.float(), dim=-1) for branch in vectors.chunk(num_slots, dim=-1)]
    return torch.stack([(one * other).sum(dim=-1).square().mean() for one, other in combinations(branches, 2)]).mean()


class CodecWithHeads(nn.Module):
    """A codec and the heads that learn beside it, by name; what the optimizer and the checkpoints hold."""

    def __init__(self, codec: VisualCodecModel, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.codec, self.heads = codec, nn.ModuleDict(heads)

    def forward(
        self,
        pixel_values: torch.Tensor,
        num_tokens: int | torch.Tensor | None,
        wanted: dict[str, torch.Tensor],
        condition: torch.Tensor | None = None,
    ) -> tuple[CodecOutput, dict[str, torch.Tensor]]:
        """The codec's output, and the loss of every head towards what it is `wanted` to read."""
        output = self.codec(pixel_values, num_tokens=num_tokens, condition=condition)
        return output, {name: head(output.vectors, wanted[name]) for name, head in self.heads.items()}


@torch.no_grad()
def count_vectors(codec: VisualCodecModel) -> int:
    """Vectors that stand for one picture, by a trial."""
    training = codec.training
    side = codec.config.image_size
    size = codec.condition_size
    reading, _ = codec.conditions(None if size is None else torch.zeros(1, *size, device=codec.device))
    pixels = codec.from_shown(torch.zeros(1, 3, side, side, device=codec.device))
    codes = codec.eval().encode(pixels, condition=reading)
    length = codec.lookup(codes).shape[1]
    codec.train(training)
    return length
