"""X-Omni's detokenizer (2507.22058): a FLUX pipeline that draws what a codec decodes to, besides a prompt.

The transformer is the stock one. Features of the tokens, projected to its width, join the picture's states once,
between the blocks of two streams and those of one; the stock forward takes them as the residual of the last block of
two streams, where a ControlNet's would go in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

TOKENIZERS = ("tokenizer", "tokenizer_2")
DISTILLED_GUIDANCE = 1.0  # what the transformer's own guidance input is fed; the guidance of the sampler is a true one


class FeatureCondition(ModelMixin, ConfigMixin):
    """Features of tokens to the transformer's width.

    Args:
        in_features: width of a feature.
        width: of the transformer.
    """

    @register_to_config
    def __init__(self, in_features: int = 1536, width: int = 3072) -> None:
        super().__init__()
        self.project = nn.Linear(in_features, width, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[B, N, in_features]` to `[B, N, width]`."""
        return self.project(features)


class FeaturesToFluxPipeline(FluxPipeline):
    """Draw pictures from features of a grid of tokens and a prompt.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer: of a FLUX pipeline.
        condition: of the transformer's width.
        image_encoder, feature_extractor: of FLUX's own image prompts, which nothing here reads.
    """

    _optional_components = [*FluxPipeline._optional_components, "text_encoder", "text_encoder_2", *TOKENIZERS]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->condition->transformer->vae"

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: T5EncoderModel | None,
        tokenizer_2: T5TokenizerFast | None,
        transformer: FluxTransformer2DModel,
        condition: FeatureCondition,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ) -> None:
        parts = (text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer, image_encoder, feature_extractor)
        super().__init__(scheduler, vae, *parts)
        self.register_modules(condition=condition)

    @torch.no_grad()
    def __call__(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],
        *,
        prompt: str | list[str] = "",
        num_inference_steps: int = 28,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One picture per row of `features`.

        Args:
            features: `[B, rows * columns, in_features]` in raster order, of one grid.
            grid: (rows, columns); a token is a latent patch, 16 x 16 pixels of FLUX's own VAE.
            prompt: one for all, or one per picture.
            num_inference_steps: evaluations of the transformer.
            guidance_scale: 1 follows features and prompt as learned; another number moves the velocity from the one of
                no features and an empty prompt, at twice the cost.
            generator: of the noise; one per picture makes a picture independent of its batch.
            output_type: as in FLUX's pipeline.

        Raises:
            ValueError: features of another grid or width, or no step.
        """
        self.check_features(features, grid, num_inference_steps)
        device, batch = self._execution_device, len(features)
        prompts = [prompt] * batch if isinstance(prompt, str) else prompt
        embeds, pooled, _ = self.encode_prompt(prompts, prompts, device=device)
        negative = [""] * batch
        negative_embeds, negative_pooled, _ = self.encode_prompt(negative, negative, device=device)
        side = 2 * self.vae_scale_factor
        height, width = grid[0] * side, grid[1] * side
        channels = self.transformer.config.in_channels // 4
        latents, _ = self.prepare_latents(batch, channels, height, width, embeds.dtype, device, generator)
        latents = self.denoise(
            latents,
            features.to(device, embeds.dtype),
            grid,
            prompts=((embeds, pooled), (negative_embeds, negative_pooled)),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        images = self.vae.decode(latents, return_dict=False)[0]
        images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def check_features(self, features: torch.Tensor, grid: tuple[int, int], num_inference_steps: int) -> None:
        """Raise `ValueError` naming the first input that cannot be drawn."""
        wanted = (grid[0] * grid[1], self.condition.config.in_features)
        if features.ndim != 3 or tuple(features.shape[1:]) != wanted:
            raise ValueError(
                f"features are {tuple(features.shape)}; a grid of {grid[0]} x {grid[1]} needs [B, {wanted[0]}, "
                f"{wanted[1]}], what the codec decodes to."
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; at least 1 is needed, 28 is usual.")

    def denoise(
        self,
        latents: torch.Tensor,
        features: torch.Tensor,
        grid: tuple[int, int],
        *,
        prompts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        num_inference_steps: int,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Packed latents `[B, N, C]` from noise.

        Args:
            latents: noise.
            features: `[B, N, in_features]`.
            grid: (rows, columns).
            prompts: states and pooled state of the prompt, then of the empty one.
            num_inference_steps, guidance_scale: as in the call.
        """
        guided = guidance_scale != 1
        embeds, pooled = (torch.cat(both) if guided else both[0] for both in zip(*prompts, strict=True))
        features = torch.cat([features, torch.zeros_like(features)]) if guided else features
        condition = self.condition(features)
        image_ids = self._prepare_latent_image_ids(len(latents), *grid, latents.device, latents.dtype)
        text_ids = torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=latents.dtype)
        self._set_timesteps(num_inference_steps, latents)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            sample = torch.cat([latents] * 2) if guided else latents
            velocity = self.predict_velocity(
                sample, timestep.expand(len(sample)) / 1000, condition, embeds, pooled, text_ids, image_ids
            )
            if guided:
                prompted, empty = velocity.chunk(2)
                velocity = empty + guidance_scale * (prompted - empty)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    def predict_velocity(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        embeds: torch.Tensor,
        pooled: torch.Tensor,
        text_ids: torch.Tensor,
        image_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity `[B, N, C]` of packed latents at a timestep `[B]` in [0, 1], under a condition `[B, N, width]`."""
        if guidance is None and self.transformer.config.guidance_embeds:
            guidance = torch.full_like(timestep, DISTILLED_GUIDANCE)
        nothing = condition.new_zeros(1)
        blocks = len(self.transformer.transformer_blocks)
        return self.transformer(
            hidden_states=latents,
            timestep=timestep.to(latents.dtype),
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            controlnet_block_samples=[nothing] * (blocks - 1) + [condition],
            return_dict=False,
        )[0]

    def _set_timesteps(self, num_inference_steps: int, latents: torch.Tensor) -> None:
        options = self.scheduler.config
        mu = calculate_shift(
            latents.shape[1],
            options.base_image_seq_len,
            options.max_image_seq_len,
            options.base_shift,
            options.max_shift,
        )
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu, device=latents.device)
