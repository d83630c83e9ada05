"""The convolutional pyramids of published visual tokenizers, as options of one encoder and one decoder.

Level 0 has the pixels' own size and every further level half of it. Named points of this space: VQGAN and LlamaGen
(attention in the middle and on the coarsest level), IBQ (attention by level), Open-MAGVIT2 (no attention, a decoder
conditioned on its codes), the pixel decoder of TiTok (no attention, its own shortcut).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.encoders import EncoderOptions
from unimm.nn.conv import ChannelsToSpace
from unimm.nn.pyramid import (
    EPS,
    GROUPS,
    AdaptiveNorm,
    Double,
    Fold,
    GridAttention,
    Halve,
    PyramidBlock,
    Unfold,
    grid_norm,
)

UPSAMPLING = ("nearest", "shuffle", "unfold")


@dataclass(frozen=True)
class PyramidConfig:
    """What encoder and decoder share.

    Args:
        channels: width of each level, fine to coarse.
        blocks: residual blocks per level.
        attention_levels: levels whose every block is followed by attention.
        middle_blocks: residual blocks on the coarsest grid, next to the codes.
        middle_attention: whether attention follows the first of them.
        bias: whether the convolutions of the blocks have one.
        code_channels: channels on the side of the codes.
        shortcut: what the 1x1 shortcuts read; see `PyramidBlock`.
        norm_channels: of a second input, by which every norm is scaled and shifted position by position; 0 for none.
    """

    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    middle_blocks: int = 2
    middle_attention: bool = True
    bias: bool = True
    code_channels: int = 256
    shortcut: str = "input"
    norm_channels: int = 0

    def __post_init__(self) -> None:
        if not self.channels or any(width < 1 or width % GROUPS for width in self.channels):
            raise ValueError(f"channels are {self.channels}; name one positive multiple of {GROUPS} per level.")
        if outside := [level for level in self.attention_levels if not 0 <= level < len(self.channels)]:
            raise ValueError(f"attention_levels name {outside}; there are levels 0 to {len(self.channels) - 1}.")

    @property
    def factor(self) -> int:
        """Pixels per cell of the coarsest grid, on each side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class PyramidEncoderConfig(PyramidConfig, EncoderOptions):
    """The encoder.

    Args:
        stem_channels: width of the first convolution.
        centred: whether halving pads all round rather than right and below.
        averaged: whether halving takes the mean of 2 x 2 positions, without a convolution.
        folded: whether it adds that mean to a convolution, and means of channels are added to the last one.
        out_kernel: side of the last convolution.
        mean, std: of each channel of the pixels, by which they are normalised; none for as they are.
    """

    stem_channels: int = 128
    centred: bool = False
    averaged: bool = False
    folded: bool = False
    out_kernel: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.averaged and self.centred:
            raise ValueError("averaged and centred are both true, and means pad nothing; set one of them.")
        if self.folded and (self.averaged or self.centred or self.channels[-1] % self.code_channels):
            raise ValueError(
                f"folded is true; it goes with neither averaged nor centred, and code_channels {self.code_channels} "
                f"must divide the last of channels {self.channels}."
            )
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, 3) or any(spread <= 0 for spread in self.std):
            raise ValueError(
                f"mean is {self.mean} and std {self.std}; name three of each, the second above 0, or none."
            )

    @property
    def downsample(self) -> int:
        return self.factor

    @property
    def width(self) -> int:
        return self.code_channels


class PyramidLevel(nn.Module):
    """Residual blocks of one size, each followed by attention where asked."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, *, attention: bool, config: PyramidConfig
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            pyramid_block(out_channels if index else in_channels, out_channels, config) for index in range(blocks)
        )
        self.attention = nn.ModuleList(
            GridAttention(out_channels, config.norm_channels) for _ in range(blocks if attention else 0)
        )
        self.resize: nn.Module = nn.Identity()

    def forward(self, hidden: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, *condition)
            if len(self.attention):
                hidden = self.attention[index](hidden, *condition)
        return self.resize(hidden)


def pyramid_block(in_channels: int, out_channels: int, config: PyramidConfig) -> PyramidBlock:
    return PyramidBlock(
        in_channels,
        out_channels,
        bias=config.bias,
        shortcut=config.shortcut,
        norm_channels=config.norm_channels,
    )


def middle(config: PyramidConfig) -> nn.ModuleList:
    """The blocks on the coarsest grid."""
    width = config.channels[-1]
    layers: list[nn.Module] = [pyramid_block(width, width, config) for _ in range(config.middle_blocks)]
    if config.middle_attention:
        layers.insert(1, GridAttention(width, config.norm_channels))
    return nn.ModuleList(layers)


class PyramidTrunk(nn.Module):
    """Pixels `[B, 3, H, W]` to the features `[B, channels[-1], H / factor, W / factor]` of the coarsest grid."""

    def __init__(self, config: PyramidEncoderConfig) -> None:
        super().__init__()
        self.mean, self.std = config.mean, config.std
        self.stem = nn.Conv2d(3, config.stem_channels, 3, padding=1, bias=config.bias)
        self.levels = nn.ModuleList()
        width = config.stem_channels
        for level, channels in enumerate(config.channels):
            attention = level in config.attention_levels
            stage = PyramidLevel(width, channels, config.blocks, attention=attention, config=config)
            if level + 1 < len(config.channels):
                stage.resize = halving(config, channels)
            self.levels.append(stage)
            width = channels
        self.middle = middle(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.mean:
            mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
            pixel_values = (pixel_values - mean) / std
        hidden = self.stem(pixel_values)
        for level in self.levels:
            hidden = level(hidden)
        for layer in self.middle:
            hidden = layer(hidden)
        return hidden


class PyramidEncoder(PyramidTrunk):
    """Pixels `[B, 3, H, W]` to `[B, code_channels, H / factor, W / factor]`."""

    def __init__(self, config: PyramidEncoderConfig) -> None:
        super().__init__(config)
        width = config.channels[-1]
        self.norm = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.out = nn.Conv2d(width, config.code_channels, config.out_kernel, padding=config.out_kernel // 2)
        self.mean_width = width // config.code_channels if config.folded else 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.norm(super().forward(pixel_values)))
        if self.mean_width:
            return self.out(hidden) + hidden.unflatten(1, (-1, self.mean_width)).mean(dim=2)
        return self.out(hidden)


@dataclass(frozen=True)
class PyramidDecoderConfig(PyramidConfig, DecoderOptions):
    """The decoder; `channels` are fine to coarse here too.

    Args:
        upsampling: `nearest` and a convolution, a convolution and a `shuffle` of its channels into space, or an
            `unfold` of both beside each other, and of channels beside the first convolution.
        adaptive: whether every level begins with a norm conditioned on the decoder's input.
    """

    blocks: int = 3
    upsampling: str = "nearest"
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.upsampling not in UPSAMPLING:
            raise ValueError(f"upsampling is {self.upsampling!r}; it must be one of {', '.join(UPSAMPLING)}.")
        if self.upsampling == "unfold" and self.channels[-1] % self.code_channels:
            raise ValueError(
                f"code_channels is {self.code_channels}; under 'unfold' it must divide the last of {self.channels}."
            )

    @property
    def upsample(self) -> int:
        return self.factor

    @property
    def in_width(self) -> int:
        return self.code_channels


class PyramidDecoder(nn.Module):
    """`[B, code_channels, rows, columns]` to pixels `[B, 3, rows * factor, columns * factor]`."""

    def __init__(self, config: PyramidDecoderConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.stem = nn.Conv2d(config.code_channels, width, 3, padding=1)
        self.middle = middle(config)
        self.levels, self.adaptive = nn.ModuleList(), nn.ModuleList()  # coarse to fine
        for level in reversed(range(len(config.channels))):
            channels = config.channels[level]
            attention = level in config.attention_levels
            stage = PyramidLevel(width, channels, config.blocks, attention=attention, config=config)
            if level:
                stage.resize = doubling(config.upsampling, channels)
            self.adaptive.append(AdaptiveNorm(width, config.code_channels) if config.adaptive else nn.Identity())
            self.levels.append(stage)
            width = channels
        self.is_adaptive = config.adaptive
        self.repeats = config.channels[-1] // config.code_channels if config.upsampling == "unfold" else 0
        self.norm = grid_norm(width, config.norm_channels)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, features: torch.Tensor, *condition: torch.Tensor) -> torch.Tensor:
        """`condition` is the second input `[B, norm_channels, rows, columns]`, where the norms read one."""
        hidden = self.stem(features)
        if self.repeats:
            hidden = hidden + features.repeat_interleave(self.repeats, dim=1)
        for layer in self.middle:
            hidden = layer(hidden, *condition)
        for adapt, level in zip(self.adaptive, self.levels, strict=True):
            hidden = level(adapt(hidden, features) if self.is_adaptive else hidden, *condition)
        return self.out(F.silu(self.norm(hidden, *condition)))


def halving(config: PyramidEncoderConfig, channels: int) -> nn.Module:
    """What halves the sides of a grid."""
    if config.averaged:
        return nn.AvgPool2d(2)
    return Fold(channels) if config.folded else Halve(channels, centred=config.centred)


def doubling(upsampling: str, channels: int) -> nn.Module:
    """What doubles the sides of a grid, one of `UPSAMPLING`."""
    if upsampling == "shuffle":
        return ChannelsToSpace(channels, channels, 2)
    return Unfold(channels) if upsampling == "unfold" else Double(channels)
