"""A message about a picture, rewritten crop by crop by the network that draws from it (COMiT, 2602.20731).

`CropsEncoder` cuts a picture, or its latents, into crops that overlap. `MessageFlow` holds the one network: of a crop,
where it lies and the message so far it writes the next message, and of a noisy picture and a message it tells the
velocity of a rectified flow. `MessageResampler` says how a message begins. The codes are those of the last message;
what drawing needs beside them is where the last crop lay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.encoders import EncoderOptions
from unimm.codec.flow import (
    SPREAD,
    TIME_FEATURES,
    TIME_SCALE,
    Denoised,
    FlowOptions,
    denoised,
    drawn,
    noise_of,
)
from unimm.codec.length import LengthPolicy
from unimm.codec.quantizers import Quantized, Quantizer
from unimm.codec.resamplers import SequenceResampler
from unimm.codes import VisualCodes
from unimm.nn.conv import SpaceToChannels
from unimm.nn.modulated import PLAIN, ModulatedBlock, normed
from unimm.nn.positions import sincos_2d, time_features

TIME_PERIOD = 10000.0
CELLS, MESSAGE = 0, 1  # kinds of tokens


@dataclass(frozen=True)
class CropsConfig(EncoderOptions):
    """Square crops in raster order.

    Args:
        latent_channels: of the latents of another autoencoder, which are cut in place of pixels; 0 for pixels.
        patch: pixels, or latents, per side of a patch.
        crop: patches per side of a crop; the whole picture where it has fewer.
        stride: patches from one crop to the next; the last ones end with the picture.
    """

    latent_channels: int = 0
    patch: int = 2
    crop: int = 6
    stride: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.crop:
            raise ValueError(
                f"stride is {self.stride} and crop {self.crop}; crops cover the picture at strides of 1 to {self.crop}."
            )

    @property
    def latents(self) -> int:
        return self.latent_channels

    @property
    def downsample(self) -> int:
        return self.patch

    @property
    def width(self) -> int:
        return self.in_channels


class CropsEncoder(nn.Module):
    """Cuts; the network that reads the crops is the one that draws."""

    def __init__(self, config: CropsConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, picture: torch.Tensor, cell: int) -> torch.Tensor:
        """`[B, C, H, W]` to crops `[B, S, C, side, side]`, where a patch has `cell` pixels, or latents, per side."""
        rows, columns = (self._starts(side // cell) for side in picture.shape[2:])
        side = self.config.crop * cell
        crops = [picture[..., r * cell :, c * cell :][..., :side, :side] for r in rows for c in columns]
        return torch.stack(crops, dim=1)

    def offsets(self, rows: int, columns: int) -> torch.Tensor:
        """Where the middle of each crop of a picture of `rows` x `columns` patches lies, float32 `[S, 2]` of row and
        column: 0 in the middle of the picture, -1 and 1 at its edges.
        """
        down, right = (
            (torch.tensor(self._starts(side)) * 2 + min(self.config.crop, side)) / side - 1 for side in (rows, columns)
        )
        return torch.cartesian_prod(down, right)

    def _starts(self, side: int) -> list[int]:
        """The first patch of each crop along a side of so many."""
        last = max(side - self.config.crop, 0)
        return [min(start, last) for start in range(0, last + self.config.stride, self.config.stride)]


@dataclass(frozen=True)
class MessageResamplerConfig:
    """How a message is written.

    Args:
        tokens: codes of a message.
        dim: width of the vectors that are quantised.
        adaptive: whether the crop that is read next is the one that the message so far draws worst, in one step; else
            crops are read in raster order.
    """

    tokens: int = 256
    dim: int = 6
    adaptive: bool = False


class MessageResampler(SequenceResampler):
    """What a message says before anything is read; `write_message` goes on from there."""

    def __init__(self, config: MessageResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config, self.dim = config, config.dim

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        """Zeros `[B, tokens, dim]`, which the code in the middle of finite scalar quantisation stands for."""
        assert pool == 1, "messages have no grid to pool"
        return features.new_zeros(len(features), self.config.tokens, self.config.dim)


@dataclass(frozen=True)
class MessageFlowConfig(FlowOptions):
    """The network.

    Args:
        tokens: codes of a message.
        mlp_width: of the transformer.
        hides: whether what is written is invisible to all but itself, and there what comes later. Where it is not, what
            would be invisible counts for less by a factor of e: so the released network computes, whose mask is added
            to the scores.
    """

    tokens: int = 256
    mlp_width: int = 3072
    steps: int = 10
    hides: bool = True


def check_one_network(
    encoder: CropsConfig, resampler: MessageResamplerConfig, length: LengthPolicy, decoder: MessageFlowConfig
) -> None:
    """Raise `ValueError` where what one network does is said in several ways."""
    for name, reads, draws in (
        ("patch", encoder.patch, decoder.patch),
        ("latent_channels", encoder.latent_channels, decoder.latent_channels),
        ("tokens", resampler.tokens, decoder.tokens),
    ):
        if reads != draws:
            raise ValueError(f"{name} is {reads} where messages are read and {draws} in the decoder; make them equal.")
    sizes = (length.layout, length.min_length, length.max_length, length.grids())
    if sizes != ("sequence", decoder.tokens, decoder.tokens, [(decoder.rows, decoder.columns)]):
        raise ValueError(
            f"A message has {decoder.tokens} codes of {decoder.rows} x {decoder.columns} patches, and length is "
            f"{length}; set length: {{kind: sequence, tokens: {decoder.tokens}, rows: {decoder.rows}, columns: "
            f"{decoder.columns}}}."
        )


@dataclass
class Passed:
    """What the network makes of a picture.

    Args:
        velocity: noise minus picture, `[B, C, H, W]`.
        written: the next message, `[B, N, dim]`, to be quantised.
        offset: where it guesses that the crop lies, `[B, 2]` in (-1, 1).
    """

    velocity: torch.Tensor
    written: torch.Tensor
    offset: torch.Tensor


def reader_writer_mask(read: int, written: int, device: torch.device) -> torch.Tensor:
    """Bool `[read + written, read + written]`, True where the row may see the column: all see what is read, and what is
    written sees itself as far as it is written.
    """
    mask = torch.ones(read + written, read + written, dtype=torch.bool, device=device)
    mask[:, read:] = False
    mask[read:, read:] = torch.ones(written, written, dtype=torch.bool, device=device).tril()
    return mask


class MessageFlow(nn.Module):
    """A transformer over a place, the patches of a picture, the message so far and the one to be written."""

    positions: torch.Tensor

    def __init__(self, config: MessageFlowConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.place = _two_layers(2, width)
        self.place_position = nn.Parameter(torch.randn(width) * SPREAD)
        self.patches = SpaceToChannels(config.channels, width, config.patch)
        self.register_buffer("positions", sincos_2d(config.rows, config.columns, width, torch.device("cpu")))
        self.embed = _two_layers(config.dim, width)
        self.message_positions = nn.Parameter(torch.randn(config.tokens, width) * SPREAD)
        self.blank = nn.Parameter(torch.randn(width) * SPREAD)
        self.blank_positions = nn.Parameter(torch.randn(config.tokens, width) * SPREAD)
        self.time = _two_layers(TIME_FEATURES, width)
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, config.num_heads, mlp_width=config.mlp_width, kinds=2) for _ in range(config.depth)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.to_patches = nn.Linear(width, config.channels * config.patch**2)
        self.to_message = nn.Linear(width, config.dim)
        self.to_place = nn.Linear(width, 2).requires_grad_(False)  # nothing here is learnt from it

    def write(self, crop: torch.Tensor, message: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The next message `[B, N, dim]`, to be quantised.

        Args:
            crop: `[B, C, h, w]`, no larger than the picture.
            message: that so far, `[B, N, dim]`.
            offset: where the crop lies, `[B, 2]`.
        """
        return self.passed(crop, crop.new_zeros(len(crop)), message, offset).written

    def velocity(
        self, noisy: torch.Tensor, time: torch.Tensor, message: torch.Tensor, offset: torch.Tensor
    ) -> torch.Tensor:
        """Velocity, noise minus picture, of `noisy` `[B, C, H, W]` with a share `time` `[B]` of noise."""
        return self.passed(noisy, time, message, offset).velocity

    def passed(self, noisy: torch.Tensor, time: torch.Tensor, message: torch.Tensor, offset: torch.Tensor) -> Passed:
        """All that the network says; of inputs as those of `velocity`."""
        cells = self.patches(noisy)
        rows, columns = cells.shape[2:]
        table = self.positions.view(self.config.rows, self.config.columns, -1)[:rows, :columns].flatten(0, 1)
        parts = [
            (self.place(offset.to(noisy.dtype)) + self.place_position)[:, None],
            cells.flatten(2).transpose(1, 2) + table,
            self.embed(message) + self.message_positions,
            (self.blank + self.blank_positions).expand(len(noisy), -1, -1),
        ]
        lengths = [part.shape[1] for part in parts]
        kind = torch.tensor([PLAIN, CELLS, MESSAGE, MESSAGE]).repeat_interleave(torch.tensor(lengths)).to(noisy.device)
        mask = reader_writer_mask(sum(lengths[:3]), lengths[3], noisy.device)
        mask = mask if self.config.hides else mask.to(noisy.dtype)
        passed = time_features((1 - time) * TIME_SCALE, TIME_FEATURES, TIME_PERIOD)  # the network counts from noise
        condition = self.time(passed.to(noisy.dtype))
        hidden = torch.cat(parts, dim=1)
        for block in self.blocks:
            hidden = block(hidden, condition, kind, mask)
        place, cells, _, written = normed(hidden).split(lengths, dim=1)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=2)
        patches = self.to_patches(cells * (1 + scale) + shift).transpose(1, 2).unflatten(2, (rows, columns))
        return Passed(
            velocity=-F.pixel_shuffle(patches, self.config.patch),
            written=self.to_message(written),
            offset=self.to_place(place[:, 0]).tanh(),
        )

    def forward(
        self, message: torch.Tensor, offset: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Pictures `[B, C, H, W]` of messages `[B, N, dim]` that were last written at `offset` `[B, 2]`.

        Without a generator the same message always gives the same picture.
        """
        return self.sample(message, offset, noise_of(message, self.config.noise_size, generator))

    def sample(
        self, message: torch.Tensor, offset: torch.Tensor, noise: torch.Tensor, *, steps: int | None = None
    ) -> torch.Tensor:
        """Pictures that begin as `noise` `[B, C, H, W]`; by default in the configuration's steps.

        Raises:
            ValueError: no steps.
        """
        velocity = partial(self.velocity, message=message, offset=offset)
        return drawn(velocity, noise, self.config.steps if steps is None else steps)

    def denoise(self, message: torch.Tensor, offset: torch.Tensor, picture: torch.Tensor) -> Denoised:
        """One training step at random times."""
        return denoised(partial(self.velocity, message=message, offset=offset), picture)


def _two_layers(into: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(into, width), nn.SiLU(), nn.Linear(width, width))


@dataclass
class Written:
    """The last message.

    Args:
        quantized: its codes; the loss is the mean over all messages.
        offset: where the crop lay that it was written from, `[B, 2]`.
    """

    quantized: Quantized
    offset: torch.Tensor


def write_message(
    crops: torch.Tensor,
    offsets: torch.Tensor,
    encoder: CropsEncoder,
    resampler: MessageResampler,
    quantizer: Quantizer,
    network: MessageFlow,
) -> Written:
    """Read every crop once, each with the message that the ones before it led to.

    Args:
        crops: `[B, S, C, h, w]`.
        offsets: where they lie, `[S, 2]`.
    """
    batch, steps = crops.shape[:2]
    every = torch.arange(batch, device=crops.device)
    message = resampler.sample(crops[:, 0])
    unread = torch.ones(batch, steps, dtype=torch.bool, device=crops.device)
    chosen = torch.zeros(batch, dtype=torch.int64, device=crops.device)
    losses = []
    for step in range(steps):
        if step:
            wrong = _missed(crops, message, offsets[chosen], encoder, network) if resampler.config.adaptive else None
            chosen = torch.full_like(chosen, step) if wrong is None else wrong.masked_fill(~unread, -1).argmax(dim=1)
        unread[every, chosen] = False
        quantized = quantizer(network.write(crops[every, chosen], message, offsets[chosen]))
        message = quantized.vectors
        losses.append(quantized.loss)
    return Written(Quantized(quantized.ids, message, torch.stack(losses).mean()), offsets[chosen])


@torch.no_grad()
def _missed(
    crops: torch.Tensor, message: torch.Tensor, offset: torch.Tensor, encoder: CropsEncoder, network: MessageFlow
) -> torch.Tensor:
    """How far each crop is from what the message draws in one step, mean squared differences `[B, S]`."""
    noise = noise_of(message, network.config.noise_size, None)
    picture = network.sample(message, offset, noise, steps=1)
    return (encoder(picture, encoder.config.patch) - crops).square().flatten(2).mean(dim=2)


def offset_of(codes: VisualCodes, default: torch.Tensor) -> torch.Tensor:
    """Where the last crops lay, float32 `[B, 2]`; `default`, `[2]`, where the codes do not say.

    Raises:
        ValueError: offsets of another shape or type, or outside the picture.
    """
    offset = codes.side_info.get("offset")
    if offset is None:
        return default.to(codes.ids.device).expand(len(codes), -1)
    if offset.shape != (len(codes), 2) or not offset.is_floating_point():
        seen = f"{offset.dtype} {tuple(offset.shape)}"
        raise ValueError(f"side_info['offset'] is {seen}; give floats {(len(codes), 2)}, as encode does.")
    if not bool((offset.abs() <= 1).all()):
        raise ValueError(f"side_info['offset'] is {offset.tolist()}; rows and columns range over [-1, 1].")
    return offset.float()
