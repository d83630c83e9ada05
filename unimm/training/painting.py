"""Codes that are words to a frozen text-to-image model, which learn from its loss alone (Visual Lexicon, 2412.06774).

The model is Stable Diffusion as diffusers saves it. Its denoiser reads the codec's vectors in the place of a prompt's
and is asked for the noise in the picture that they are of; what it does with them teaches the codec, and it stays as
it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from unimm.codec import VisualCodecConfig, socket_config
from unimm.codec.feature_decoder import PromptDecoderConfig
from unimm.codec.vae import Vae, VaeConfig, stock_fields

KIND = "StableDiffusionPipeline"


@dataclass(frozen=True)
class PaintingConfig:
    """A frozen text-to-image model.

    Args:
        model: folder of a saved Stable Diffusion; empty for none.
        weight: of its loss.
    """

    model: str = ""
    weight: float = 1.0


def check_painting(config: PaintingConfig, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where a codec makes no words, or none that the model can read."""
    decoder = socket_config("decoder", codec.decoder)
    if not isinstance(decoder, PromptDecoderConfig):
        raise ValueError(
            f"painting.model is {config.model}, and a decoder of kind {codec.decoder['kind']!r} makes no prompts; take "
            "kind: prompt."
        )
    found = DiffusionPipeline.load_config(config.model)["_class_name"]
    if found != KIND:
        raise ValueError(f"painting.model is {config.model}, a {found}; take a {KIND}.")
    width = UNet2DConditionModel.load_config(config.model, subfolder="unet")["cross_attention_dim"]
    if width != decoder.dim:
        raise ValueError(
            f"The words of {config.model} are {width} wide and those of the codec {decoder.dim}; make resampler.dim "
            "and decoder.dim equal to the former."
        )


class FrozenPainter:
    """The denoiser of a saved Stable Diffusion, its autoencoder and its noise."""

    def __init__(self, config: PaintingConfig) -> None:
        folder = Path(config.model)
        self.denoiser = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.denoiser.eval().requires_grad_(False)
        vae = VaeConfig(stock_fields(AutoencoderKL.load_config(folder / "vae")))
        self.vae = Vae(vae)
        self.vae.load(folder / "vae")
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        self.side = self.denoiser.config["sample_size"] * vae.factor

    def loss(self, words: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Mean squared error of what the denoiser finds in pictures `[B, 3, H, W]` in [-1, 1], each under noise of a
        random strength, from words `[B, N, D]`; a gradient reaches the words.
        """
        for part in (self.denoiser, self.vae):
            part.to(pixels.device)
        shown = F.interpolate(pixels, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        latents = self.vae.encode(shown)
        noise, steps = torch.randn_like(latents), self.scheduler.config["num_train_timesteps"]
        times = torch.randint(steps, (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, times)
        found = self.denoiser(noisy, times, encoder_hidden_states=words.float()).sample
        return F.mse_loss(found.float(), self._wanted(latents, noise, times))

    @torch.no_grad()
    def figure(self, words: torch.Tensor, pixels: torch.Tensor) -> float:
        """The loss under noise that is the same whenever it is asked for."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return float(self.loss(words, pixels.to(words.device)))

    def _wanted(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the denoiser was trained to find."""
        if self.scheduler.config["prediction_type"] == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, times)
        return latents if self.scheduler.config["prediction_type"] == "sample" else noise
