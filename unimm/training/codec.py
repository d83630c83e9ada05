"""The codec stage: reconstruct rendered pictures through a few dozen codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel
from unimm.codec.dual import TwoSidedDecoder
from unimm.codec.quantizers import VQ
from unimm.codec.streams import StreamsDecoder
from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.scorers.reconstruction import psnr
from unimm.training.loop import Critic, LoggingConfig, LoopConfig, run_loop
from unimm.training.objectives import (
    CriticConfig,
    FeatureConfig,
    FrozenFeatures,
    PixelCritic,
    distillation_loss,
    perceptual_loss,
)
from unimm.training.optimizer import OptimizerConfig
from unimm.training.plots import contact_sheet
from unimm.training.pool import Pool, PoolConfig, prepare_pool
from unimm.training.run_directory import RunConfig, RunDirectory

SHEET_SIZE = 16
HELD_OUT = 96  # pictures per world, or of the source
COUNTED, COUNT_BATCH = 2_000, 50  # pictures whose codes say which rows stay, and how many are encoded at once


@dataclass(frozen=True)
class CodecLossConfig:
    """Weights of squared error, absolute error, and absolute error of the differences between neighbouring pixels."""

    squared: float = 1.0
    absolute: float = 0.1
    edges: float = 0.1


@dataclass(frozen=True)
class CodecRecipe:
    """A recipe with `task: codec`.

    Args:
        model: keys of `VisualCodecConfig`; `encoder.tower` may name a saved vision model.
        perceptual: a frozen model whose features of the copy should be those of the picture.
        distill: a frozen model whose features the codec's own decoder of features rebuilds.
        critic: a network that learns to tell copies from pictures.
        lengths: numbers of codes, one of which is drawn at each step, so that few codes stand for a picture too
            (nested dropout, 1402.0915); empty for the codec's own.
        bf16: whether to compute in it; None where the processor is fast in it.
    """

    task: str
    run: RunConfig
    data: PoolConfig
    optimizer: OptimizerConfig
    model: dict[str, Any] = field(default_factory=dict)
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    perceptual: FeatureConfig = field(default_factory=FeatureConfig)
    distill: FeatureConfig = field(default_factory=FeatureConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    lengths: tuple[int, ...] = ()
    bf16: bool | None = None


class CodecTask:
    """Reconstruction losses, and figures on held-out scenes."""

    def __init__(self, recipe: CodecRecipe, pool: Pool) -> None:
        self.recipe = recipe
        self.pool = pool.pictures
        self.codec = begun_codec(recipe.model).to(memory_format=torch.channels_last)
        self.model: nn.Module = self.codec
        side = self.codec.config.image_size
        self.held_out = {name: resized(pixels, side) for name, pixels in pool.held_out.items()}
        self.perceptual = FrozenFeatures(recipe.perceptual) if recipe.perceptual.model else None
        self.distill = FrozenFeatures(recipe.distill) if recipe.distill.model else None
        if self.distill is not None and not self.codec.decoder_options.makes_features:
            raise ValueError(
                "distill names a model, and this codec rebuilds no features; take a decoder of kind 'dual'."
            )
        self.judge = PixelCritic(recipe.critic) if recipe.critic.weight else None
        self.critic: Critic | None = self.judge

    def losses(self, model: nn.Module, step: int, rank: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.recipe.run.seed, step, rank])
        picked = np.sort(rng.integers(len(self.pool), size=self.recipe.data.batch_size))
        pixels = resized(to_pixel_values(self.pool[picked]), self.codec.config.image_size)
        pixels = pixels.to(self.codec.device, memory_format=torch.channels_last)
        length = int(rng.choice(self.recipe.lengths)) if self.recipe.lengths else None
        output = model(self.codec.from_shown(pixels), num_tokens=length)
        drawn = self.codec.to_shown(output.reconstruction.float())
        losses = reconstruction_losses(drawn, pixels, self.recipe.loss)
        losses["quantizer"] = output.quantizer_loss
        total = losses["loss"] + output.quantizer_loss
        if output.velocity_loss is not None:
            losses["velocity"] = output.velocity_loss
            total = total + output.velocity_loss
        if output.halting_loss is not None:
            losses["halting"] = output.halting_loss
            total = total + output.halting_loss
        if self.perceptual is not None:
            losses["perceptual"] = perceptual_loss(self.perceptual, drawn, pixels)
            total = total + self.recipe.perceptual.weight * losses["perceptual"]
        if self.distill is not None:
            losses["distill"] = distillation_loss(self.distill, output.features, pixels)
            total = total + self.recipe.distill.weight * losses["distill"]
        if self.judge is not None:
            losses["judged"] = self.judge.judgement(drawn, pixels, total, last_weight(self.codec.decoder), step)
            total = total + losses["judged"]
        return losses | {"loss": total}

    def validate(self) -> dict[str, float]:
        self.codec.eval()
        figures, used = {}, []
        for name, pixels in self.held_out.items():
            codes = self.codec.encode(self.codec.from_shown(pixels.to(self.codec.device)))
            figures[f"psnr_{name}"] = float(psnr(self.codec.pictures(codes).cpu(), pixels).mean())
            used.append(codes.ids.flatten(0, 1))
        self.codec.train()
        spec = self.codec.spec_without_fingerprint
        if spec.sizes:
            figures["codes_used_in_validation"] = spec.share_used(torch.cat(used))
        return figures

    def draw_sheet(self, path: Path) -> None:
        """Originals above their reconstructions, for every world."""
        self.codec.eval()
        shown = torch.cat([pixels[: SHEET_SIZE // len(self.held_out) + 1] for pixels in self.held_out.values()])
        codes = self.codec.encode(self.codec.from_shown(shown.to(self.codec.device)))
        rows = [shown, self.codec.pictures(codes).cpu()]
        self.codec.train()
        contact_sheet([p for row in rows for p in to_pictures(row)], path, columns=len(shown))

    def save(self, path: Path) -> None:
        retire_duplicates(self.codec.eval(), self.pool[:COUNTED])
        self.codec.to(memory_format=torch.contiguous_format).save_pretrained(path)
        VisualCodecImageProcessor.for_codec(self.codec.config).save_pretrained(path)


def begun_codec(fields: dict[str, Any]) -> VisualCodecModel:
    """A codec with fresh weights; where `encoder.tower` is a folder or Hub name, around that model."""
    tower = fields.get("encoder", {}).get("tower")
    if isinstance(tower, str):
        return VisualCodecModel.from_tower(tower, **fields)
    return VisualCodecModel(VisualCodecConfig(**fields))


def retire_duplicates(codec: VisualCodecModel, pictures: np.ndarray) -> None:
    """Leave one of every group of rows that cannot be told apart: the one that occurs most in uint8 `[M, H, W, 3]`."""
    books = [part for part in codec.quantizer.modules() if isinstance(part, VQ) and part.config.ema_decay is not None]
    if not books:
        return
    batches = [pictures[start : start + COUNT_BATCH] for start in range(0, len(pictures), COUNT_BATCH)]
    side = codec.config.image_size
    shown = (resized(to_pixel_values(batch), side).to(codec.device) for batch in batches)
    ids = torch.cat([codec.encode(codec.from_shown(pixels)).ids.flatten(0, 1) for pixels in shown])
    for book, slot in zip(books, ids.unbind(dim=1), strict=True):
        book.retire_duplicates(torch.bincount(slot, minlength=book.config.size))


def resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Rendered pictures `[B, 3, H, W]` at the size of a codec."""
    if pixels.shape[2:] == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


def last_weight(decoder: nn.Module) -> torch.Tensor:
    """Of the layer that draws the pixels."""
    drawing = decoder.pixels if isinstance(decoder, (TwoSidedDecoder, StreamsDecoder)) else decoder
    return [weight for weight in drawing.parameters() if weight.ndim > 1][-1]


def reconstruction_losses(
    reconstruction: torch.Tensor, pixel_values: torch.Tensor, weights: CodecLossConfig
) -> dict[str, torch.Tensor]:
    """Named losses and their weighted sum, of two `[B, 3, H, W]`."""
    error = reconstruction - pixel_values
    squared, absolute = error.square().mean(), error.abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    loss = weights.squared * squared + weights.absolute * absolute + weights.edges * edges
    return {"loss": loss, "squared": squared, "absolute": absolute, "edges": edges}


def train_codec(recipe: CodecRecipe) -> RunDirectory:
    """Train a codec and save it, with its image processor, under `model/` of the run directory."""
    torch.manual_seed(recipe.run.seed)
    config = VisualCodecConfig(**recipe.model)
    pool = prepare_pool(recipe.data, config, RunDirectory(recipe.run), seed=recipe.run.seed, held_out=HELD_OUT)
    loop = LoopConfig(recipe.run, recipe.optimizer, recipe.logging, recipe.bf16)
    return run_loop(CodecTask(recipe, pool), loop, recipe)
