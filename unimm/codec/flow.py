"""Codes drawn by a rectified flow (FlexTok, 2502.13967): what remains of a picture when codes are few is imagined.

At time t a sample is (1 - t) * picture + t * noise, and its velocity is noise - picture; drawing goes from t = 1 to 0
in equal steps. The picture may be the latents of another autoencoder. Codes join its patches in one transformer, and
missing ones are a learned vector, so that any number of the first codes can be drawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.nn.conv import SpaceToChannels
from unimm.nn.gated import ModulatedGatedBlock, normed
from unimm.nn.positions import time_features

SPREAD = 0.02  # of freshly drawn vectors and positions
TIME_FEATURES, TIME_SCALE, TIME_PERIOD = 256, 1000.0, 256.0
SEED = 0  # of the noise that is drawn from where no generator is given


@dataclass(frozen=True)
class ProjectedGuidance:
    """Guidance without oversaturation (2410.02416), and with `parallel` 1 and the rest 0, the classifier-free one.

    The difference between the predictions with and without codes is summed over steps, cut to a norm, and split into
    what is parallel to the prediction with codes and what is not.

    Args:
        scale: 1 follows the codes as learned; above 1 exaggerates them, at twice the cost.
        momentum: weight of the differences of earlier steps.
        norm_threshold: largest norm of the difference; 0 for any.
        parallel: share of the parallel part that is kept.
    """

    scale: float = 7.5
    momentum: float = -0.5
    norm_threshold: float = 2.5
    parallel: float = 0.0

    def apply(
        self, with_codes: torch.Tensor, without_codes: torch.Tensor, earlier: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The guided prediction and what `earlier`, zeros at first, is at the next step; all `[B, C, H, W]`."""
        direction = F.normalize(with_codes.flatten(1), dim=1)
        summed = (with_codes - without_codes).flatten(1) + self.momentum * earlier.flatten(1)
        update = summed
        if self.norm_threshold:
            update = update * (self.norm_threshold / update.norm(dim=1, keepdim=True)).clamp(max=1)
        parallel = (update * direction).sum(dim=1, keepdim=True) * direction
        update = update + (self.parallel - 1) * parallel
        return with_codes + (self.scale - 1) * update.view_as(with_codes), summed.view_as(with_codes)


@dataclass(frozen=True)
class FlowOptions(DecoderOptions):
    """Of any flow.

    Args:
        dim: width of a looked-up code.
        rows, columns: of the grid of patches.
        patch: pixels, or latents, per side of a patch.
        latent_channels: of the latents of another autoencoder, which are drawn in place of pixels; 0 for pixels.
        width, depth, num_heads: of the transformer.
        steps: evaluations of the velocity per picture.
    """

    dim: int = 6
    rows: int = 16
    columns: int = 16
    patch: int = 2
    latent_channels: int = 0
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    steps: int = 25

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @property
    def upsample(self) -> int:
        return self.patch

    @property
    def in_width(self) -> int:
        return self.dim

    @property
    def makes_pixels(self) -> bool:
        return not self.latent_channels

    @property
    def latents(self) -> int:
        return self.latent_channels

    @property
    def channels(self) -> int:
        """Of what is drawn."""
        return self.latent_channels or 3

    @property
    def noise_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of what is drawn."""
        return self.channels, self.rows * self.patch, self.columns * self.patch


@dataclass(frozen=True)
class FlowDecoderConfig(FlowOptions):
    """A transformer over noisy patches and codes.

    Args:
        tokens: the most codes of a picture.
        mlp_width: of the transformer.
        drop_rate: share of pictures that are learned without any codes, for guidance.
        guidance: of each step.
    """

    tokens: int = 256
    mlp_width: int = 2048
    drop_rate: float = 0.1
    guidance: ProjectedGuidance = field(default_factory=ProjectedGuidance)


@dataclass
class Denoised:
    """A training step of a flow.

    Args:
        picture: `[B, C, H, W]`, the clean picture as it follows from one prediction.
        loss: scalar, the mean squared error of the velocity.
    """

    picture: torch.Tensor
    loss: torch.Tensor


Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of a noisy picture and the share of noise, `[B]`


def check_steps(steps: int) -> None:
    """Raise `ValueError` where there are none."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; a picture takes at least 1, and 25 is usual.")


def noise_of(vectors: torch.Tensor, size: tuple[int, int, int], generator: torch.Generator | None) -> torch.Tensor:
    """What a batch is drawn from, `[B, *size]`; without a generator the same always."""
    if generator is None:  # one noise for all, so that a picture does not depend on those beside it
        fixed = torch.randn(1, *size, generator=torch.Generator().manual_seed(SEED))
        noise = fixed.expand(len(vectors), -1, -1, -1)
    else:
        noise = torch.randn(len(vectors), *size, generator=generator, device=generator.device)
    return noise.to(vectors)


def drawn(velocity: Velocity, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """What the flow makes of noise `[B, C, H, W]` in equal steps.

    Raises:
        ValueError: no steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler  # takes seconds to import, and few codecs draw by it

    check_steps(steps)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], device=noise.device)
    sample = noise
    for timestep, time in zip(scheduler.timesteps, scheduler.sigmas, strict=False):  # a last sigma ends the others
        sample = scheduler.step(velocity(sample, time.expand(len(sample))), timestep, sample).prev_sample
    return sample


def denoised(velocity: Velocity, picture: torch.Tensor) -> Denoised:
    """One training step at random times, more of them in the middle (logit-normal, 2403.03206)."""
    noise = torch.randn_like(picture)
    time = torch.randn(len(picture), device=picture.device).sigmoid()
    share = time.view(-1, 1, 1, 1).to(picture.dtype)
    noisy = torch.lerp(picture, noise, share)
    predicted = velocity(noisy, time)
    return Denoised(noisy - share * predicted, F.mse_loss(predicted, noise - picture))


class Flow(nn.Module, ABC):
    """Looked-up codes to pictures `[B, C, H, W]` by way of noise."""

    def __init__(self, config: FlowOptions) -> None:
        super().__init__()
        self.noise_size = config.noise_size

    @abstractmethod
    def sample(self, vectors: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pictures of codes that begin as `noise`, `[B, C, H, W]`, as the configuration says."""

    @abstractmethod
    def denoise(self, vectors: torch.Tensor, picture: torch.Tensor) -> Denoised:
        """One training step."""

    def forward(self, vectors: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Without a generator the same codes always give the same picture."""
        return self.sample(vectors, noise_of(vectors, self.noise_size, generator))


class FlowDecoder(Flow):
    """Codes `[B, N, dim]`, N at most `tokens`, drawn by one transformer over them and noisy patches."""

    def __init__(self, config: FlowDecoderConfig) -> None:
        super().__init__(config)
        self.config = config
        cells = config.rows * config.columns
        self.embed = nn.Linear(config.dim, config.width)
        self.code_positions = nn.Parameter(torch.randn(config.tokens, config.width) * SPREAD)
        self.missing = nn.Parameter(torch.randn(config.width) * SPREAD)
        self.dropped = nn.Parameter(torch.randn(config.width) * SPREAD)
        self.patches = SpaceToChannels(config.channels, config.width, config.patch)
        self.positions = nn.Parameter(torch.randn(cells, config.width) * SPREAD)
        self.time = nn.Sequential(
            nn.Linear(TIME_FEATURES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.blocks = nn.ModuleList(
            ModulatedGatedBlock(config.width, config.num_heads, mlp_width=config.mlp_width, kinds=2)
            for _ in range(config.depth)
        )
        self.to_patches = nn.Linear(config.width, config.channels * config.patch**2)

    def velocity(
        self, noisy: torch.Tensor, time: torch.Tensor, vectors: torch.Tensor, drop: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Velocity, noise minus picture, of the shape of `noisy`.

        Args:
            noisy: `[B, C, H, W]`.
            time: `[B]` in [0, 1], the share of noise.
            vectors: looked-up codes `[B, N, dim]`, N at most `tokens`.
            drop: bool `[B]`, True where the velocity is predicted without codes.
        """
        hidden = self.patches(noisy).flatten(2).transpose(1, 2) + self.positions
        num_cells = hidden.shape[1]
        hidden = torch.cat([hidden, self._code_tokens(vectors, drop)], dim=1)
        kind = (torch.arange(hidden.shape[1], device=hidden.device) >= num_cells).long()  # patches, then codes
        condition = self.time(time_features(time * TIME_SCALE, TIME_FEATURES, TIME_PERIOD).to(hidden.dtype))
        for block in self.blocks:
            hidden = block(hidden, condition, kind)
        patches = self.to_patches(normed(hidden[:, :num_cells])).transpose(1, 2)
        return F.pixel_shuffle(patches.unflatten(2, (self.config.rows, self.config.columns)), self.config.patch)

    def sample(
        self,
        vectors: torch.Tensor,
        noise: torch.Tensor,
        *,
        steps: int | None = None,
        guidance: ProjectedGuidance | None = None,
    ) -> torch.Tensor:
        """Pictures `[B, C, H, W]` of codes `[B, N, dim]` that begin as `noise`; by default as the configuration says.

        Raises:
            ValueError: no steps.
        """
        guidance = self.config.guidance if guidance is None else guidance
        earlier = torch.zeros_like(noise)

        def velocity(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            nonlocal earlier
            guided, earlier = self._guided(noisy, time, vectors, guidance, earlier)
            return guided

        return drawn(velocity, noise, self.config.steps if steps is None else steps)

    def denoise(self, vectors: torch.Tensor, picture: torch.Tensor) -> Denoised:
        """One training step, some pictures without their codes."""
        drop = torch.rand(len(picture), device=picture.device) < self.config.drop_rate
        return denoised(partial(self.velocity, vectors=vectors, drop=drop), picture)

    def _guided(
        self,
        sample: torch.Tensor,
        time: torch.Tensor,
        vectors: torch.Tensor,
        guidance: ProjectedGuidance,
        earlier: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocity of one step and the summed differences of the steps so far."""
        if guidance.scale == 1:
            return self.velocity(sample, time, vectors), earlier
        drop = torch.arange(2, device=sample.device).repeat_interleave(len(sample)).bool()  # [2 * B]
        doubled = self.velocity(sample.repeat(2, 1, 1, 1), time.repeat(2), vectors.repeat(2, 1, 1), drop)
        with_codes, without_codes = doubled.chunk(2)
        return guidance.apply(with_codes, without_codes, earlier)

    def _code_tokens(self, vectors: torch.Tensor, drop: torch.Tensor | None) -> torch.Tensor:
        """`[B, N, dim]` to `[B, tokens, D]`: missing ones are a learned vector, all of a dropped picture another."""
        batch, length, _ = vectors.shape
        tokens = self.embed(vectors) + self.code_positions[:length]
        tokens = torch.cat([tokens, self.missing.expand(batch, self.config.tokens - length, -1)], dim=1)
        return tokens if drop is None else torch.where(drop[:, None, None], self.dropped, tokens)
