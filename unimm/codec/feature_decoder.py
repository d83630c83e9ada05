"""Decoders that give features rather than pixels, for a diffusion model or another decoder to draw from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.nn.blocks import TransformerBlock
from unimm.nn.positions import resized_table
from unimm.nn.pyramid import PyramidBlock


class FeatureOptions(DecoderOptions):
    """What decoders of features share."""

    @property
    def upsample(self) -> int:
        return 1

    @property
    def makes_pixels(self) -> bool:
        return False

    @property
    def makes_features(self) -> bool:
        return True


@dataclass(frozen=True)
class FeatureDecoderConfig(FeatureOptions):
    """`blocks` residual convolution blocks of `width` (X-Omni, 2507.22058)."""

    width: int = 1536
    blocks: int = 2

    @property
    def in_width(self) -> int:
        return self.width


class FeatureDecoder(nn.Module):
    """`[B, width, rows, columns]` to the same."""

    def __init__(self, config: FeatureDecoderConfig) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(PyramidBlock(config.width, config.width, activation="gelu", eps=1e-5) for _ in range(config.blocks))
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.blocks(features)


@dataclass(frozen=True)
class FeatureViTConfig(FeatureOptions):
    """A transformer over looked-up codes that rebuilds the features of a vision tower (TA-Tok, 2506.18898).

    Args:
        dim: width of a looked-up code.
        width, depth, num_heads, mlp_width: of the transformer, and of the features.
        eps: of every norm.
        table_side: learned positions of a square grid of this side, resized to the grid of the codes.
        class_token: whether a learned token, with the first row of the table, stands before the codes.
        tanh_gelu: whether GELU is computed by its tanh formula (SigLIP).
    """

    dim: int = 1152
    width: int = 1152
    depth: int = 3
    num_heads: int = 12
    mlp_width: int = 3072
    eps: float = 1e-6
    table_side: int = 16
    class_token: bool = False
    tanh_gelu: bool = True

    @property
    def in_width(self) -> int:
        return self.dim


class FeatureViT(nn.Module):
    """`[B, dim, rows, columns]` to features `[B, rows * columns, width]`."""

    def __init__(self, config: FeatureViTConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(config.dim, config.width)
        self.table = nn.Parameter(torch.randn(config.table_side**2 + config.class_token, config.width) * 0.02)
        self.class_token: nn.Parameter | None = None
        if config.class_token:
            self.class_token = nn.Parameter(torch.randn(1, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.width,
                config.num_heads,
                mlp_width=config.mlp_width,
                eps=config.eps,
                tanh_gelu=config.tanh_gelu,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, config.width)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows, columns = features.shape[2:]
        hidden = self.embed(features.flatten(2).transpose(1, 2))
        before = 0 if self.class_token is None else 1
        hidden = hidden + resized_table(self.table[before:], rows, columns, antialias=True)
        if self.class_token is not None:
            class_token = (self.class_token + self.table[:1]).expand(len(hidden), 1, -1)
            hidden = torch.cat([class_token, hidden], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden[:, before:]))


@dataclass(frozen=True)
class EmbeddingDecoderConfig(FeatureOptions):
    """Codes to one vector of the whole picture, which an unCLIP pipeline draws from (SEED, 2307.08041).

    Args:
        dim: width of a looked-up code.
        tokens: codes of a picture.
        width, depth, num_heads: of the transformer over them.
        eps: of every norm.
        narrowing: widths through which each position shrinks before all are read together.
        out_dim: width of the vector.
    """

    dim: int = 32
    tokens: int = 32
    width: int = 768
    depth: int = 4
    num_heads: int = 12
    eps: float = 1e-6
    narrowing: tuple[int, ...] = (256, 128, 32)
    out_dim: int = 1024

    def __post_init__(self) -> None:
        if not self.narrowing or min(self.narrowing) < 1:
            raise ValueError(f"narrowing is {self.narrowing}; name at least one positive width.")

    @property
    def in_width(self) -> int:
        return self.dim


class EmbeddingDecoder(nn.Module):
    """`[B, tokens, dim]` to `[B, out_dim]`."""

    def __init__(self, config: EmbeddingDecoderConfig) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(config.dim, config.dim), nn.Tanh(), nn.Linear(config.dim, config.width))
        self.positions = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.num_heads, eps=config.eps) for _ in range(config.depth)
        )
        self.narrow = nn.Sequential()
        width = config.width
        for narrower in config.narrowing:
            if len(self.narrow):
                self.narrow.append(nn.ReLU())
            self.narrow.append(nn.Linear(width, narrower, bias=False))
            width = narrower
        self.head = nn.Linear(config.tokens * width, config.out_dim)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(vectors) + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.narrow(hidden).flatten(1))


@dataclass(frozen=True)
class NoDecoderConfig(FeatureOptions):
    """Codes are looked up, and what draws from them is not part of the codec.

    Args:
        dim: width of a looked-up code.
        drawn_by: what draws from the codes, as the refusal to decode names it.
    """

    dim: int = 256
    drawn_by: str = "another model"

    @property
    def in_width(self) -> int:
        return self.dim


class NoDecoder(nn.Module):
    """Refuses every input.

    Raises:
        ValueError: always, with what would draw.
    """

    def __init__(self, config: NoDecoderConfig) -> None:
        super().__init__()
        self.drawn_by = config.drawn_by

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        raise ValueError(
            f"This codec has no decoder: {self.drawn_by} draws from its codes. lookup(codes) gives what that reads."
        )


@dataclass(frozen=True)
class PromptDecoderConfig(FeatureOptions):
    """Codes that are words of a frozen text-to-image model, whose pipeline takes them as `prompt_embeds` (Visual
    Lexicon, 2412.06774).

    Args:
        dim: width of a looked-up code, and of the model's words.
    """

    dim: int = 768

    @property
    def in_width(self) -> int:
        return self.dim


class PromptDecoder(nn.Module):
    """`[B, N, dim]`, or `[B, dim, rows, columns]` line by line, as words `[B, N, dim]`."""

    def __init__(self, config: PromptDecoderConfig) -> None:
        super().__init__()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if vectors.ndim == 3 else vectors.flatten(2).transpose(1, 2)
