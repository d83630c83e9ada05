"""Encoder socket: pixels `[B, 3, H, W]` to a grid of features `[B, D, rows, columns]`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import LocalBlock, ResidualBlock, SpaceToChannels, check_channels
from unimm.nn.positions import resized_table, sincos_2d

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
FAINT = 0.1  # of the range [-1, 1]: a lower contrast is noise, such as a decoder leaves on a plain ground
PALETTE_DIRECTIONS = 32


class EncoderOptions:
    """What the codec asks of any encoder's config besides `width` and `downsample`."""

    @property
    def latents(self) -> int:
        """Channels of the latents of another autoencoder that are read in place of pixels; 0 for pixels."""
        return 0

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.latents or 3

    @property
    def drops_margin(self) -> bool:
        """Whether pixels beyond the last whole cell, at the right and below, are left out."""
        return False


@dataclass(frozen=True)
class ConvEncoderConfig(EncoderOptions):
    """Residual convolutions; the first fold is `patch`, every further stage halves the grid.

    Args:
        patch: pixels per side of the first fold.
        channels: width of each stage; their number fixes the downsampling, `patch * 2 ** (len(channels) - 1)`.
        blocks: residual blocks per stage.
    """

    patch: int = 4
    channels: tuple[int, ...] = (64, 128, 256)
    blocks: int = 2

    @property
    def downsample(self) -> int:
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def width(self) -> int:
        return self.channels[-1]


class ConvEncoder(nn.Module):
    """The convolutional encoder of VQGAN (2012.09841) without its full-resolution stages."""

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__()
        check_channels(config.channels)
        widths = (3, *config.channels)
        layers: list[nn.Module] = []
        for stage, width in enumerate(config.channels):
            layers.append(SpaceToChannels(widths[stage], width, config.patch if stage == 0 else 2))
            layers.extend(ResidualBlock(width) for _ in range(config.blocks))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values)


@dataclass(frozen=True)
class LocalEncoderConfig(ConvEncoderConfig):
    """Convolutions that see little beyond their own cell, so that what looks alike has the same codes everywhere.

    Args:
        kernels: odd side of the convolutions of each stage; 1 mixes channels only.
    """

    blocks: int = 1
    kernels: tuple[int, ...] = (3, 3, 1)

    def __post_init__(self) -> None:
        if len(self.kernels) != len(self.channels) or any(side < 1 or side % 2 == 0 for side in self.kernels):
            raise ValueError(f"kernels are {self.kernels}; name one odd side for each of channels {self.channels}.")

    @property
    def reach(self) -> int:
        """Pixels beyond its own cell that a code can depend on."""
        strides = [self.patch * 2**stage for stage in range(len(self.channels))]
        return sum(self.blocks * (side // 2) * stride for side, stride in zip(self.kernels, strides, strict=True))


class LocalEncoder(nn.Module):
    """A code says what its cell shows, wherever the cell lies and whatever lies far from it."""

    def __init__(self, config: LocalEncoderConfig) -> None:
        super().__init__()
        check_channels(config.channels)
        widths = (3, *config.channels)
        layers: list[nn.Module] = []
        for stage, (width, kernel) in enumerate(zip(config.channels, config.kernels, strict=True)):
            layers.append(SpaceToChannels(widths[stage], width, config.patch if stage == 0 else 2))
            layers.extend(LocalBlock(width, kernel) for _ in range(config.blocks))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values)


@dataclass(frozen=True)
class ViTEncoderConfig(EncoderOptions):
    """Transformer over square patches.

    Args:
        patch: pixels per side of a patch, and so the downsampling.
        width: D.
        depth: blocks.
        num_heads: attention heads.
        mlp_width: of the blocks; None for 4 times `width`.
        eps: of every norm.
        table_side: learned positions of a square grid of this side, resized to the grid of the picture (X-Omni,
            2507.22058); 0 for sines and cosines, which have no size.
        final_norm: whether a norm ends the tower.
        final_eps: of that norm; None for `eps`.
        class_token: whether a learned token, with the first row of the table, stands before the patches.
        keep_class_token: whether its feature is given too, before those of the patches; the features then are one row
            `[B, D, 1, 1 + rows * columns]`, for resamplers that attend to them (SEED, 2307.08041).
        tanh_gelu: whether GELU is computed by its tanh formula (SigLIP).
        channel_scales: whether the updates of every block are scaled by channel.
        drop_margin: leave out the pixels beyond the last whole patch, as SigLIP does with 384 of them in patches of 14.
        mean, std: of pixels; the tower sees their distance from `mean` in units of `std`.
    """

    patch: int = 16
    width: int = 256
    depth: int = 6
    num_heads: int = 4
    mlp_width: int | None = None
    eps: float = 1e-5
    table_side: int = 0
    final_norm: bool = True
    final_eps: float | None = None
    class_token: bool = False
    keep_class_token: bool = False
    tanh_gelu: bool = False
    channel_scales: bool = False
    drop_margin: bool = False
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.class_token and not self.table_side:
            raise ValueError("class_token has a row of the learned table; set table_side, or class_token: false.")
        if self.keep_class_token and not self.class_token:
            raise ValueError("keep_class_token is true and there is none; set class_token: true.")

    @property
    def downsample(self) -> int:
        return self.patch

    @property
    def drops_margin(self) -> bool:
        return self.drop_margin


@dataclass(frozen=True)
class TowerOptions(EncoderOptions):
    """Of encoders whose cells are those of a vision tower."""

    tower: ViTEncoderConfig = field(default_factory=ViTEncoderConfig)

    @property
    def downsample(self) -> int:
        return self.tower.downsample

    @property
    def drops_margin(self) -> bool:
        return self.tower.drops_margin


class ViTEncoder(nn.Module):
    """The ViT encoder of ViT-VQGAN (2110.04627), with positions for any grid."""

    def __init__(self, config: ViTEncoderConfig) -> None:
        super().__init__()
        self.patches = SpaceToChannels(3, config.width, config.patch)
        self.mean, self.std = config.mean, config.std
        self.table: nn.Parameter | None = None
        if config.table_side:
            self.table = nn.Parameter(torch.randn(config.table_side**2 + config.class_token, config.width) * 0.02)
        self.class_token: nn.Parameter | None = None
        if config.class_token:
            self.class_token = nn.Parameter(torch.randn(1, config.width) * 0.02)
        self.keep_class_token = config.keep_class_token
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.width,
                config.num_heads,
                mlp_width=config.mlp_width,
                eps=config.eps,
                tanh_gelu=config.tanh_gelu,
                scaled=config.channel_scales,
            )
            for _ in range(config.depth)
        )
        final_eps = config.eps if config.final_eps is None else config.final_eps
        self.norm = nn.LayerNorm(config.width, eps=final_eps) if config.final_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden, grid = self.begin(pixel_values)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden).transpose(1, 2)
        if self.keep_class_token:
            return hidden[:, :, None]
        return hidden[:, :, 0 if self.class_token is None else 1 :].unflatten(2, grid)

    def begin(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """What the first block reads, `[B, N, D]`, and the (rows, columns) of the patches."""
        grid = self.patches((pixel_values - self.mean) / self.std)  # [B, D, rows, columns]
        batch, width, rows, columns = grid.shape
        if self.table is None:
            positions = sincos_2d(rows, columns, width, grid.device)
        else:
            positions = resized_table(self.table[0 if self.class_token is None else 1 :], rows, columns)
        hidden = grid.flatten(2).transpose(1, 2) + positions.to(grid.dtype)
        if self.table is not None and self.class_token is not None:
            class_token = (self.class_token + self.table[:1]).expand(batch, 1, -1)
            hidden = torch.cat([class_token, hidden], dim=1)
        return hidden, (rows, columns)


@dataclass(frozen=True)
class PatchEncoderConfig(EncoderOptions):
    """One linear map of square patches of `patch` pixels a side; what looks at them together is the resampler.

    Args:
        patch: side of a patch.
        width: D.
        latent_channels: of the latents of another autoencoder, which are read in place of pixels; 0 for pixels.
    """

    patch: int = 16
    width: int = 512
    latent_channels: int = 0

    @property
    def downsample(self) -> int:
        return self.patch

    @property
    def latents(self) -> int:
        return self.latent_channels


class PatchEncoder(nn.Module):
    """Patches and nothing else."""

    def __init__(self, config: PatchEncoderConfig) -> None:
        super().__init__()
        self.patches = SpaceToChannels(config.in_channels, config.width, config.patch)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.patches(pixel_values)


@dataclass(frozen=True)
class GivenConfig(EncoderOptions):
    """Features of a model that is no part of the codec, of `latent_channels` channels; 0 for pixels as they are."""

    latent_channels: int = 0

    @property
    def downsample(self) -> int:
        return 1

    @property
    def latents(self) -> int:
        return self.latent_channels

    @property
    def width(self) -> int:
        return self.in_channels


class GivenEncoder(nn.Module):
    """Passes on what it is given."""

    def __init__(self, config: GivenConfig) -> None:
        super().__init__()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@dataclass(frozen=True)
class FormAndPaletteConfig(EncoderOptions):
    """Two branches over one grid of cells.

    Args:
        patch: pixels per side of a cell, and so the downsampling.
        branch_width: channels of each branch.
        blocks: residual blocks of each branch.
    """

    patch: int = 16
    branch_width: int = 256
    blocks: int = 2

    @property
    def downsample(self) -> int:
        return self.patch

    @property
    def width(self) -> int:
        return 2 * self.branch_width


class FormAndPaletteEncoder(nn.Module):
    """What lies where in a cell, and which colours it has, in two halves of the channels that never meet.

    The form branch sees the cell's luminance stretched to [0, 1], which is the same for a red disc and a blue one. The
    palette branch sees how far the cell's colours reach along learned directions of colour space, a maximum over its
    pixels as in PointNet (1612.00593), which is the same for a disc and a square. Under a quantizer of two parts, a
    language model that knows a shape from one colour and a colour from another shape knows the codes of both together.
    """

    def __init__(self, config: FormAndPaletteConfig) -> None:
        super().__init__()
        check_channels((config.branch_width,))
        self.patch = config.patch
        self.form = nn.Sequential(
            SpaceToChannels(1, config.branch_width, config.patch),
            *(LocalBlock(config.branch_width, 1) for _ in range(config.blocks)),
        )
        self.directions = nn.Conv2d(3, PALETTE_DIRECTIONS, 1)
        self.palette = nn.Sequential(
            nn.Conv2d(PALETTE_DIRECTIONS, config.branch_width, 1),
            *(LocalBlock(config.branch_width, 1) for _ in range(config.blocks)),
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        form = self.form(stretched_luminance(pixel_values, self.patch))
        palette = self.palette(F.max_pool2d(self.directions(pixel_values), self.patch))
        return torch.cat([form, palette], dim=1)


def stretched_luminance(pixel_values: torch.Tensor, patch: int) -> torch.Tensor:
    """Luminance `[B, 1, H, W]` of pixels in [-1, 1], linear from 0 at a cell's darkest pixel to 1 at its brightest.

    A cell of one colour, or of a contrast below `FAINT`, is 0 everywhere.
    """
    luminance = torch.einsum("bchw,c->bhw", pixel_values, pixel_values.new_tensor(LUMINANCE))[:, None]
    brightest = F.max_pool2d(luminance, patch)
    darkest = -F.max_pool2d(-luminance, patch)
    contrast = brightest - darkest
    stretch = torch.where(contrast < FAINT, 0.0, 1 / contrast.clamp_min(FAINT))
    scale, shift = (F.interpolate(cells, scale_factor=patch) for cells in (stretch, darkest))
    return (luminance - shift) * scale
