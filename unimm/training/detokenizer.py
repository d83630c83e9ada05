"""The detokenizer stage: rectified flow from noise to the pictures that a trained codec's codes stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from tqdm import tqdm

from unimm.codec import VisualCodecModel
from unimm.codec.decoders import ConvDecoderConfig
from unimm.codec.resamplers import GridResampler
from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.detokenizer import CodesToImagePipeline, CodesToImageTransformer2DModel
from unimm.files import atomic_write
from unimm.scorers.reconstruction import psnr
from unimm.training.loop import ON_CPU, Critic, LoggingConfig, LoopConfig, run_loop
from unimm.training.optimizer import OptimizerConfig
from unimm.training.plots import contact_sheet
from unimm.training.pool import Pool, PoolConfig, prepare_pool
from unimm.training.run_directory import RunConfig, RunDirectory

HELD_OUT = 24  # pictures per world, or of the source, each drawn in `VALIDATION_STEPS` steps
VALIDATION_STEPS = 8
SHEET_SIZE = 8
ENCODE_BATCH = 100


@dataclass(frozen=True)
class DetokenizerRecipe:
    """A recipe with `task: detokenizer`.

    Args:
        codec: a saved codec.
        model: keys of `CodesToImageTransformer2DModel` other than those that the codec decides.
        drop_codes: share of pictures drawn without their codes, so that guidance has something to lean on.
        bf16: whether to compute in it; None where the processor is fast in it.
        ema_decay: of a moving average of the weights, which is what is judged and saved; None for none.
    """

    task: str
    run: RunConfig
    data: PoolConfig
    optimizer: OptimizerConfig
    codec: str
    model: dict[str, Any] = field(default_factory=dict)
    drop_codes: float = 0.1
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    bf16: bool | None = None
    ema_decay: float | None = None


class DetokenizerTask:
    """Velocity error at noise levels drawn logit-normally (2403.03206), and figures on held-out scenes.

    Args:
        recipe: of the stage.
        codec: frozen.
        pool: pictures to learn from, and some that are held out.
        codes: int64 `[S, N, K]`, of the pool.
    """

    def __init__(self, recipe: DetokenizerRecipe, codec: VisualCodecModel, pool: Pool, codes: torch.Tensor) -> None:
        self.recipe, self.codec, self.pool, self.codes = recipe, codec, pool.pictures, codes
        self.held_out = pool.held_out
        self.transformer = begin_transformer(recipe, codec)
        self.model: nn.Module = self.transformer
        self.critic: Critic | None = None

    def losses(self, model: nn.Module, step: int, rank: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.recipe.run.seed, step, rank])
        picked = np.sort(rng.integers(len(self.pool), size=self.recipe.data.batch_size))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        device = self.transformer.device
        pixels = to_pixel_values(self.pool[picked]).to(device)
        noise = torch.randn(pixels.shape, generator=generator).to(device)
        sigma = torch.randn(len(pixels), generator=generator).sigmoid().to(device)
        drop = (torch.rand(len(pixels), generator=generator) < self.recipe.drop_codes).to(device)
        noisy = torch.lerp(pixels, noise, sigma.view(-1, 1, 1, 1))
        timestep = sigma * self.transformer.config.num_train_timesteps
        velocity = model(noisy, timestep, self.codes[picked].to(device), drop).sample
        return {"loss": (velocity.float() - (noise - pixels)).square().mean()}

    def validate(self) -> dict[str, float]:
        """PSNR of pictures drawn from codes, beside that of the codec's own decoder."""
        figures = {}
        for name, pixels in self.held_out.items():
            drawn, decoded = self._draw(pixels)
            figures[f"psnr_{name}"] = float(psnr(drawn, pixels).mean())
            figures[f"codec_psnr_{name}"] = float(psnr(decoded, pixels).mean())
        return figures

    def draw_sheet(self, path: Path) -> None:
        """Originals, the codec's decoding, and the detokenizer's drawing, one above the other."""
        shown = torch.cat([pixels[: SHEET_SIZE // len(self.held_out) + 1] for pixels in self.held_out.values()])
        drawn, decoded = self._draw(shown)
        contact_sheet([p for row in (shown, decoded, drawn) for p in to_pictures(row)], path, columns=len(shown))

    def save(self, path: Path) -> None:
        self.pipeline().save_pretrained(path)

    def pipeline(self) -> CodesToImagePipeline:
        """The transformer, in its present state, with a stock scheduler."""
        pipeline = CodesToImagePipeline(self.transformer, FlowMatchEulerDiscreteScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _draw(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drawings and decodings of the codes of `pixels` `[B, 3, H, W]`, on the CPU in [-1, 1]."""
        self.transformer.eval()
        codes = self.codec.encode(pixels.to(self.codec.device))
        generator = torch.Generator().manual_seed(0)
        images = self.pipeline()(
            codes, num_inference_steps=VALIDATION_STEPS, generator=generator, output_type="pt"
        ).images
        self.transformer.train()
        return images.cpu() * 2 - 1, self.codec.pictures(codes).cpu()


def begin_transformer(recipe: DetokenizerRecipe, codec: VisualCodecModel) -> CodesToImageTransformer2DModel:
    """A denoiser of the codec's sizes, whose code embeddings begin as the codec's vectors at unit variance.

    Where the codec draws by convolutions on the grid of its codes, they are the sketch, held fast with the embeddings
    that it reads: the untrained denoiser then predicts the codec's own decoding. Any other sketch learns from nothing.
    """
    side = codec.config.image_size
    parts = _convolutions(codec)
    transformer = CodesToImageTransformer2DModel(
        **recipe.model,
        **({} if parts is None else {"sketch_channels": parts[1].channels, "sketch_blocks": parts[1].blocks}),
        sample_size=side,
        codebook_sizes=codec.spec_without_fingerprint.sizes,
        code_dim=codec.dim,
        code_grid=side // codec.config.downsample,
    )
    means, scales = [], []
    for embedding, vectors in zip(transformer.code_embeddings, codec.code_vectors(), strict=True):
        assert isinstance(embedding, nn.Embedding)
        mean, scale = vectors.mean(dim=0), vectors.std().clamp_min(1e-6)
        embedding.weight.data.copy_((vectors - mean) / scale)
        means.append(mean)
        scales.append(scale.expand_as(mean))
    if parts is not None:
        to_grid, _ = parts
        mean, scale = torch.cat(means), torch.cat(scales)
        transformer.sketch_in.weight.data.copy_(to_grid.weight * scale)
        transformer.sketch_in.bias.data.copy_(to_grid.bias + to_grid.weight @ mean)
        transformer.sketch.load_state_dict(codec.decoder.state_dict())
        for module in (transformer.code_embeddings, transformer.sketch_in, transformer.sketch):
            module.requires_grad_(False)
    return transformer


def _convolutions(codec: VisualCodecModel) -> tuple[nn.Linear, ConvDecoderConfig] | None:
    """The linear map from codes to a convolutional decoder, and that decoder's sizes, of a codec that has both and
    draws in [-1, 1], as a denoiser does.
    """
    options = codec.decoder_options
    if not isinstance(options, ConvDecoderConfig) or not isinstance(codec.resampler, GridResampler):
        return None
    if not codec.shows_as_it_reads:
        return None
    to_grid = codec.resampler.to_grid
    return (to_grid, options) if isinstance(to_grid, nn.Linear) else None


def encode_pool(codec: VisualCodecModel, pool: np.ndarray, path: Path) -> torch.Tensor:
    """Codes `[S, N, K]` of a pool, encoded once and kept in `path`."""
    if not path.exists():
        starts = tqdm(range(0, len(pool), ENCODE_BATCH), desc="encoding")
        batches = [codec.encode(to_pixel_values(pool[i : i + ENCODE_BATCH]).to(codec.device)).ids for i in starts]
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, torch.cat(batches).cpu().numpy())
    return torch.from_numpy(np.load(path))


def train_detokenizer(recipe: DetokenizerRecipe) -> RunDirectory:
    """Train a detokenizer and save it as a diffusers pipeline under `model/` of the run directory."""
    torch.manual_seed(recipe.run.seed)
    directory = RunDirectory(recipe.run)
    loop = LoopConfig(recipe.run, recipe.optimizer, recipe.logging, recipe.bf16, recipe.ema_decay)
    codec = VisualCodecModel.from_pretrained(recipe.codec).eval()
    pool = prepare_pool(recipe.data, codec.config, directory, seed=recipe.run.seed, held_out=HELD_OUT)
    with PartialState(cpu=ON_CPU).local_main_process_first():
        codes = encode_pool(codec, pool.pictures, directory.root / "codes.npy")
    return run_loop(DetokenizerTask(recipe, codec, pool, codes), loop, recipe)
