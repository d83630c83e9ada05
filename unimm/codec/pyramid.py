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
from unimm.nn.pyramid import EPS, GROUPS, AdaptiveNorm, Double, GridAttention, Halve, PyramidBlock

UPSAMPLING = ("nearest", "shuffle")


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
    """

    channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    middle_blocks: int = 2
    middle_attention: bool = True
    bias: bool = True
    code_channels: int = 256
    shortcut: str = "input"

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
        out_kernel: side of the last convolution.
        mean, std: of each channel of the pixels, by which they are normalised; none for as they are.
    """

    stem_channels: int = 128
    centred: bool = False
    averaged: bool = False
    out_kernel: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.averaged and self.centred:
            raise ValueError("averaged and centred are both true, and means pad nothing; set one of them.")
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
        self, in_channels: int, out_channels: int, blocks: int, *, attention: bool, bias: bool, shortcut: str
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PyramidBlock(out_channels if index else in_channels, out_channels, bias=bias, shortcut=shortcut)
            for index in range(blocks)
        )
        self.attention = nn.ModuleList(GridAttention(out_channels) for _ in range(blocks if attention else 0))
        self.resize: nn.Module = nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if len(self.attention):
                hidden = self.attention[index](hidden)
        return self.resize(hidden)


def middle(config: PyramidConfig) -> nn.Sequential:
    """The blocks on the coarsest grid."""
    width = config.channels[-1]
    layers: list[nn.Module] = [
        PyramidBlock(width, width, bias=config.bias, shortcut=config.shortcut) for _ in range(config.middle_blocks)
    ]
    if config.middle_attention:
        layers.insert(1, GridAttention(width))
    return nn.Sequential(*layers)


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
            stage = PyramidLevel(
                width, channels, config.blocks, attention=attention, bias=config.bias, shortcut=config.shortcut
            )
            if level + 1 < len(config.channels):
                stage.resize = nn.AvgPool2d(2) if config.averaged else Halve(channels, centred=config.centred)
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
        return self.middle(hidden)


class PyramidEncoder(PyramidTrunk):
    """Pixels `[B, 3, H, W]` to `[B, code_channels, H / factor, W / factor]`."""

    def __init__(self, config: PyramidEncoderConfig) -> None:
        super().__init__(config)
        width = config.channels[-1]
        self.norm = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.out = nn.Conv2d(width, config.code_channels, config.out_kernel, padding=config.out_kernel // 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.out(F.silu(self.norm(super().forward(pixel_values))))


@dataclass(frozen=True)
class PyramidDecoderConfig(PyramidConfig, DecoderOptions):
    """The decoder; `channels` are fine to coarse here too.

    Args:
        upsampling: `nearest` and a convolution, or a convolution and a `shuffle` of its channels into space.
        adaptive: whether every level begins with a norm conditioned on the decoder's input.
    """

    blocks: int = 3
    upsampling: str = "nearest"
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.upsampling not in UPSAMPLING:
            raise ValueError(f"upsampling is {self.upsampling!r}; it must be one of {', '.join(UPSAMPLING)}.")

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
            stage = PyramidLevel(
                width,
                channels,
                config.blocks,
                attention=level in config.attention_levels,
                bias=config.bias,
                shortcut=config.shortcut,
            )
            if level:
                shuffled = config.upsampling == "shuffle"
                stage.resize = ChannelsToSpace(channels, channels, 2) if shuffled else Double(channels)
            self.adaptive.append(AdaptiveNorm(width, config.code_channels) if config.adaptive else nn.Identity())
            self.levels.append(stage)
            width = channels
        self.is_adaptive = config.adaptive
        self.norm = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.stem(features))
        for adapt, level in zip(self.adaptive, self.levels, strict=True):
            hidden = level(adapt(hidden, features) if self.is_adaptive else hidden)
        return self.out(F.silu(self.norm(hidden)))
