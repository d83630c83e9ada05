"""As many codes as a picture needs for the error that is allowed (KARL, 2507.07995), told in one pass.

`PatchesAndCodesEncoder` sees a picture as patches and as the codes of a frozen VQGAN. `HaltingResampler` lets latents
read it under the allowed error, and each latent says whether it halts. `KeptViTDecoder` draws from those that do not:
scores over the VQGAN's codes, the expected row under them, and the VQGAN's own decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec.decoders import DecoderOptions
from unimm.codec.encoders import EncoderOptions
from unimm.codec.latents import SPREAD, SoftCodebookConfig, SoftCodebookHead
from unimm.codec.pyramid import PyramidEncoder, PyramidEncoderConfig
from unimm.codec.quantizers import Quantized, Quantizer
from unimm.codec.quantizers.vector import nearest_rows
from unimm.codec.resamplers import SequenceResampler
from unimm.codec.selection import padded
from unimm.codes import VisualCodes
from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import SpaceToChannels
from unimm.nn.positions import nearest_table


@dataclass(frozen=True)
class PatchesAndCodesConfig(EncoderOptions):
    """A picture seen twice.

    Args:
        patch: pixels per side of a cell.
        patch_width: channels that a linear map makes of a patch; those of the code stand behind them.
        base: encoder of the VQGAN, with cells of the same size.
        base_codes: rows of its codebook.
    """

    patch: int = 16
    patch_width: int = 768
    base: PyramidEncoderConfig = field(default_factory=PyramidEncoderConfig)
    base_codes: int = 1024

    def __post_init__(self) -> None:
        if self.base.factor != self.patch:
            raise ValueError(f"patch is {self.patch} and base divides sizes by {self.base.factor}; make them equal.")

    @property
    def downsample(self) -> int:
        return self.patch

    @property
    def width(self) -> int:
        return self.patch_width + self.base.code_channels


class PatchesAndCodesEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` to `[B, patch_width + code_channels, rows, columns]`; the VQGAN does not learn."""

    def __init__(self, config: PatchesAndCodesConfig) -> None:
        super().__init__()
        self.patches = SpaceToChannels(3, config.patch_width, config.patch)
        self.base = PyramidEncoder(config.base).requires_grad_(False)
        rows = torch.randn(config.base_codes, config.base.code_channels)
        self.base_rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.beside(pixel_values, self.base_features(pixel_values))

    @torch.no_grad()
    def base_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The VQGAN's codes of a picture as rows of its codebook, `[B, code_channels, rows, columns]`."""
        cells = self.base(pixel_values).movedim(1, 3).contiguous()
        ids = nearest_rows(cells.flatten(0, 2), self.base_rows)
        return F.embedding(ids.view(cells.shape[:3]), self.base_rows).movedim(3, 1)

    def beside(self, pixel_values: torch.Tensor, base_features: torch.Tensor) -> torch.Tensor:
        """The patches of pixels beside features of the same cells."""
        return torch.cat([self.patches(pixel_values), base_features], dim=1)


@dataclass(frozen=True)
class HaltingResamplerConfig:
    """Latents that read a picture under an allowed error, and halt where it can be kept without them.

    Args:
        tokens: the most latents.
        dim: width of the vectors that are quantised.
        depth, num_heads: of the transformer, which is as wide as the encoder.
        table_side: learned positions of a square grid of this side, of which every grid takes the nearest.
        allowed_errors: the errors that can be asked for, rising, each of which has a learned vector; an error is a mean
            absolute difference between pixels, as a share of their range. What is asked for is the first of them that
            is not below it.
        allowed_error: what is asked for unless `encode` is told.
        halting_width: of the network that tells whether a latent halts.
        threshold: the highest probability of halting at which a latent is kept.
    """

    tokens: int = 512
    dim: int = 12
    depth: int = 8
    num_heads: int = 8
    table_side: int = 64
    allowed_errors: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    allowed_error: float = 0.05
    halting_width: int = 512
    threshold: float = 0.75

    def __post_init__(self) -> None:
        errors = self.allowed_errors
        if not errors or any(low >= high for low, high in zip((0.0, *errors), errors, strict=False)):
            raise ValueError(f"allowed_errors are {errors}; name positive errors that rise.")
        self.check_error(self.allowed_error)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it must be a probability between 0 and 1.")

    def check_error(self, error: float) -> None:
        """Raise `ValueError` where an error cannot be asked for."""
        if not 0 <= error <= self.allowed_errors[-1]:
            raise ValueError(f"allowed_error is {error}; this codec takes 0 to {self.allowed_errors[-1]:g}.")


@dataclass
class Latents:
    """What the latents of a picture became.

    Args:
        positions: `[B, N, dim]`, to be quantised.
        halting: logits of the probability that a latent halts, `[B, N]`.
    """

    positions: torch.Tensor
    halting: torch.Tensor


class HaltingResampler(SequenceResampler):
    """Full attention among the allowed error, the cells and the latents."""

    def __init__(self, config: HaltingResamplerConfig, *, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        self.errors = nn.Parameter(torch.randn(len(config.allowed_errors), encoder_width) * SPREAD)
        self.positions = nn.Parameter(torch.randn(config.table_side**2, encoder_width) * SPREAD)
        self.queries = nn.Parameter(torch.randn(config.tokens, encoder_width) * SPREAD)
        self.norm_in = nn.LayerNorm(encoder_width)
        self.blocks = nn.ModuleList(TransformerBlock(encoder_width, config.num_heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(encoder_width)
        self.to_positions = nn.Linear(encoder_width, config.dim)
        self.norm_halting = nn.LayerNorm(encoder_width)
        self.to_halting = nn.Sequential(
            nn.Linear(encoder_width, config.halting_width), nn.Tanh(), nn.Linear(config.halting_width, 1)
        )

    def read(self, features: torch.Tensor, tokens: int, errors: torch.Tensor) -> torch.Tensor:
        """The sequence after the last block: allowed error, cells, latents, `[B, 1 + cells + tokens, D]`.

        Args:
            features: `[B, D, rows, columns]`.
            tokens: latents.
            errors: allowed of each picture, `[B]`; beyond the largest that can be asked for it is that one.
        """
        table = torch.tensor(self.config.allowed_errors, device=features.device)
        levels = torch.bucketize(errors.to(table), table).clamp_max(len(table) - 1)  # the first not below
        cells = features.flatten(2).transpose(1, 2) + nearest_table(self.positions, *features.shape[2:])
        latents = self.queries[:tokens].expand(len(cells), -1, -1)
        hidden = self.norm_in(torch.cat([self.errors[levels][:, None], cells, latents], dim=1))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def latents(self, features: torch.Tensor, tokens: int, errors: torch.Tensor) -> Latents:
        """What becomes of the latents; arguments as of `read`."""
        hidden = self.read(features, tokens, errors)[:, -tokens:]
        return Latents(self.to_positions(self.norm_out(hidden)), self.to_halting(self.norm_halting(hidden))[..., 0])

    def keep(self, halting: torch.Tensor) -> torch.Tensor:
        """Which latents go on, bool `[B, N]`, by logits `[B, N]`; at least the one of a picture that halts least."""
        last = F.one_hot(halting.argmin(dim=1), halting.shape[1]).bool()
        return (halting.sigmoid() <= self.config.threshold) | last

    def sample(self, features: torch.Tensor, pool: int = 1) -> torch.Tensor:
        assert pool == 1, "latents have no grid to pool"
        errors = features.new_full((len(features),), self.config.allowed_error)
        return self.latents(features, self.config.tokens, errors).positions


@dataclass(frozen=True)
class KeptViTConfig(DecoderOptions):
    """Mask tokens that become a picture by codes of which some are missing.

    Args:
        dim: width of a looked-up code.
        tokens: places that a code can have.
        rows, columns: of the grid of mask tokens.
        width, depth, num_heads: of the transformer.
        table_side: as of the resampler.
        soft_codebook: the VQGAN that is drawn through.
    """

    dim: int = 12
    tokens: int = 512
    rows: int = 16
    columns: int = 16
    width: int = 1024
    depth: int = 8
    num_heads: int = 8
    table_side: int = 64
    soft_codebook: SoftCodebookConfig = field(default_factory=SoftCodebookConfig)

    @property
    def upsample(self) -> int:
        return self.soft_codebook.pyramid.factor

    @property
    def in_width(self) -> int:
        return self.dim


class KeptViTDecoder(nn.Module):
    """Codes `[B, N, dim]` to pixels.

    A code's place among the latents of its picture, `places` int64 `[B, N]`, is part of what it says; by default they
    are the first ones. What `mask`, bool `[B, N]`, leaves out is seen by nothing.
    """

    def __init__(self, config: KeptViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.dim, config.width)
        self.code_positions = nn.Parameter(torch.randn(config.tokens, config.width) * SPREAD)
        self.mask_token = nn.Parameter(torch.randn(1, config.width) * SPREAD)
        self.positions = nn.Parameter(torch.randn(config.table_side**2, config.width) * SPREAD)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.num_heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.width)
        self.head = SoftCodebookHead(config.width, config.soft_codebook)

    def forward(
        self, vectors: torch.Tensor, mask: torch.Tensor | None = None, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.head(self.cells(vectors, mask, places))

    def cells(
        self, vectors: torch.Tensor, mask: torch.Tensor | None = None, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the mask tokens became, `[B, width, rows, columns]`."""
        batch, length, _ = vectors.shape
        rows, columns = self.config.rows, self.config.columns
        codes = self.embed(vectors) + self.code_positions[slice(length) if places is None else places]
        grid = (self.mask_token + nearest_table(self.positions, rows, columns)).expand(batch, -1, -1)
        # What a missing code sees is read by nothing either, so that leaving it out as a column is enough.
        visible = None if mask is None else F.pad(mask, (rows * columns, 0), value=True)[:, None, None]
        hidden = self.norm_in(torch.cat([grid, codes], dim=1))
        for block in self.blocks:
            hidden = block(hidden, visible)
        cells = self.norm_out(hidden[:, : rows * columns])
        return cells.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()


def encode_unhalted(
    resampler: HaltingResampler, quantizer: Quantizer, features: torch.Tensor, tokens: int, error: float | None
) -> VisualCodes:
    """Codes of the latents that do not halt, with their places.

    Args:
        features: `[B, D, rows, columns]`.
        tokens: latents that a picture may have.
        error: that is allowed; None for the resampler's own.

    Raises:
        ValueError: an error that cannot be asked for.
    """
    error = resampler.config.allowed_error if error is None else error
    resampler.config.check_error(error)
    latents = resampler.latents(features, tokens, features.new_full((len(features),), error))
    keep = resampler.keep(latents.halting)
    ids, mask = padded(quantizer(latents.positions).ids[keep], keep)
    places, _ = padded(keep.nonzero()[:, 1], keep)
    return VisualCodes(ids, mask, side_info={"places": places})


def places_of(codes: VisualCodes, most: int) -> torch.Tensor | None:
    """Which of at most `most` latents the codes are of, int64 `[B, N]`; None for the first.

    Raises:
        ValueError: places of another shape or type, or beyond the latents.
    """
    places = codes.side_info.get("places")
    if places is None:
        return None
    if places.shape != codes.mask.shape or places.dtype != torch.int64:
        seen = f"{places.dtype} {tuple(places.shape)}"
        raise ValueError(f"side_info['places'] is {seen}; give int64 {tuple(codes.mask.shape)}, as encode does.")
    if not 0 <= int(places.min()) <= int(places.max()) < most:
        raise ValueError(f"side_info['places'] names latents {places.tolist()}; there are 0 to {most - 1}.")
    return places


@dataclass
class HaltingStep:
    """What a step of training made.

    Args:
        drawn: pixels `[B, 3, H, W]`.
        quantized: the latents that they are drawn from.
        loss: scalar, whether those halted that the copy did without.
    """

    drawn: torch.Tensor
    quantized: Quantized
    loss: torch.Tensor


def learn_to_halt(
    resampler: HaltingResampler,
    quantizer: Quantizer,
    decoder: KeptViTDecoder,
    features: torch.Tensor,
    pixel_values: torch.Tensor,
    *,
    span: float,
    tokens: int,
) -> HaltingStep:
    """Draw with some latents under the smallest error; then, with all of them and asked for the error that was made,
    draw with as many and teach the others to halt (2507.07995).

    Args:
        features: `[B, D, rows, columns]` of `pixel_values` `[B, 3, H, W]`.
        span: of the range of pixels.
        tokens: latents that a picture may have.
    """
    enough = int(torch.randint(1, tokens + 1, ()))
    with torch.no_grad():
        latents = resampler.latents(features, enough, features.new_zeros(len(features)))
        missed = decoder(quantizer(latents.positions).vectors) - pixel_values
        errors = missed.abs().mean(dim=(1, 2, 3)) / span
    latents = resampler.latents(features, tokens, errors)
    quantized = quantizer(latents.positions[:, :enough])
    halts = (torch.arange(tokens, device=features.device) >= enough).to(latents.halting).expand_as(latents.halting)
    loss = F.binary_cross_entropy_with_logits(latents.halting, halts)
    return HaltingStep(decoder(quantized.vectors), quantized, loss)
