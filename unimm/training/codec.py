"""The codec stage: reconstruct rendered pictures through a few dozen codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel
from unimm.codec.quantizers import VQ
from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.scorers.reconstruction import psnr
from unimm.training.loop import LoggingConfig, LoopConfig, run_loop
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
    """A recipe with `task: codec`. `model` holds the keys of `VisualCodecConfig`."""

    task: str
    run: RunConfig
    data: PoolConfig
    optimizer: OptimizerConfig
    model: dict[str, Any] = field(default_factory=dict)
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    precision: str = "bf16"


class CodecTask:
    """Reconstruction losses, and figures on held-out scenes."""

    def __init__(self, recipe: CodecRecipe, pool: Pool) -> None:
        self.recipe = recipe
        self.pool = pool.pictures
        self.held_out = pool.held_out
        self.codec = VisualCodecModel(VisualCodecConfig(**recipe.model)).to(memory_format=torch.channels_last)
        self.model: nn.Module = self.codec

    def losses(self, model: nn.Module, step: int, rank: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.recipe.run.seed, step, rank])
        picked = np.sort(rng.integers(len(self.pool), size=self.recipe.data.batch_size))
        pixel_values = to_pixel_values(self.pool[picked]).to(self.codec.device, memory_format=torch.channels_last)
        output = model(pixel_values)
        losses = reconstruction_losses(output.reconstruction.float(), pixel_values, self.recipe.loss)
        return losses | {"loss": losses["loss"] + output.quantizer_loss, "quantizer": output.quantizer_loss}

    def validate(self) -> dict[str, float]:
        self.codec.eval()
        figures, used = {}, []
        for name, pixels in self.held_out.items():
            codes = self.codec.encode(pixels.to(self.codec.device))
            figures[f"psnr_{name}"] = float(psnr(self.codec.pictures(codes).cpu(), pixels).mean())
            used.append(codes.ids.flatten(0, 1))
        self.codec.train()
        return {**figures, "codes_used_in_validation": self.codec.spec_without_fingerprint.share_used(torch.cat(used))}

    def draw_sheet(self, path: Path) -> None:
        """Originals above their reconstructions, for every world."""
        self.codec.eval()
        shown = torch.cat([pixels[: SHEET_SIZE // len(self.held_out) + 1] for pixels in self.held_out.values()])
        rows = [shown, self.codec.reconstruct(shown.to(self.codec.device)).cpu()]
        self.codec.train()
        contact_sheet([p for row in rows for p in to_pictures(row)], path, columns=len(shown))

    def save(self, path: Path) -> None:
        retire_duplicates(self.codec.eval(), self.pool[:COUNTED])
        self.codec.to(memory_format=torch.contiguous_format).save_pretrained(path)
        VisualCodecImageProcessor.for_codec(self.codec.config).save_pretrained(path)


def retire_duplicates(codec: VisualCodecModel, pictures: np.ndarray) -> None:
    """Leave one of every group of rows that cannot be told apart: the one that occurs most in uint8 `[M, H, W, 3]`."""
    books = [part for part in codec.quantizer.modules() if isinstance(part, VQ) and part.config.ema_decay is not None]
    if not books:
        return
    batches = [pictures[start : start + COUNT_BATCH] for start in range(0, len(pictures), COUNT_BATCH)]
    ids = torch.cat([codec.encode(to_pixel_values(batch).to(codec.device)).ids.flatten(0, 1) for batch in batches])
    for book, slot in zip(books, ids.unbind(dim=1), strict=True):
        book.retire_duplicates(torch.bincount(slot, minlength=book.config.size))


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
    loop = LoopConfig(recipe.run, recipe.optimizer, recipe.logging, recipe.precision)
    return run_loop(CodecTask(recipe, pool), loop, recipe)
