"""The detokenizer as a diffusers pipeline: visual codes to pictures by rectified flow.

The scheduler is the stock `FlowMatchEulerDiscreteScheduler`: at noise level sigma a sample is
(1 - sigma) * picture + sigma * noise, and its velocity is noise - picture.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from unimm.codes import VisualCodes
from unimm.detokenizer.transformer import CodesToImageTransformer2DModel

OUTPUT_TYPES = ("pil", "np", "pt")


class CodesToImagePipeline(DiffusionPipeline):
    """Draw pictures from visual codes.

    Args:
        transformer: the denoiser.
        scheduler: its steps from noise to picture.
    """

    model_cpu_offload_seq = "transformer"

    transformer: CodesToImageTransformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(self, transformer: CodesToImageTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        codes: VisualCodes,
        *,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One picture per image of `codes`.

        Args:
            codes: of the codec that the transformer was trained on, on its grid.
            num_inference_steps: evaluations of the transformer.
            guidance_scale: 1 follows the codes as learned; above 1 exaggerates them, at twice the cost.
            generator: of the noise; one per picture makes a picture independent of its batch.
            output_type: pil, np (`[B, H, W, 3]` in [0, 1]) or pt (`[B, 3, H, W]` in [0, 1]).

        Raises:
            ValueError: codes of another grid or codebook, or a wrong number of steps, generators or output type.
        """
        self.check_inputs(codes, num_inference_steps, generator, output_type)
        ids = codes.ids.to(self._execution_device)  # [B, N, K]
        latents = self.prepare_latents(len(codes), generator)
        # Equal steps that end on 1 / steps: the scheduler's own choice spends its last evaluation next to zero noise.
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=latents.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            velocity = self.predict_velocity(latents, timestep.expand(len(codes)), ids, guidance_scale)
            latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        images = self.image_processor.postprocess(latents.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def check_inputs(
        self,
        codes: VisualCodes,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
    ) -> None:
        """Raise `ValueError` naming the first input that cannot be drawn."""
        self._check_codes(codes)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; at least 1 is needed, 8 is usual.")
        if isinstance(generator, list) and len(generator) != len(codes):
            raise ValueError(f"There are {len(generator)} generators for {len(codes)} pictures; give one for each.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}.")

    def _check_codes(self, codes: VisualCodes) -> None:
        side, sizes = self.transformer.config.code_grid, self.transformer.config.codebook_sizes
        if len(codes) == 0 or codes.ids.shape[2] != len(sizes):
            raise ValueError(
                f"Codes are {tuple(codes.ids.shape)}; this pipeline takes [B, N, {len(sizes)}] with B at least 1."
            )
        square = codes.grid is not None and set(codes.grid) == {(side, side)}
        if not square or codes.ids.shape[1] != side * side:
            raise ValueError(
                f"Codes have grid {codes.grid} and {codes.ids.shape[1]} positions; this pipeline draws {side} x {side} "
                "codes. Encode square pictures with the codec that it was trained on."
            )
        for size, slot in zip(sizes, codes.ids.unbind(dim=-1), strict=True):
            low, high = int(slot.min()), int(slot.max())
            if not 0 <= low <= high < size:
                raise ValueError(
                    f"Codes range over [{low}, {high}]; this pipeline knows ids 0 to {size - 1}. "
                    "Were they offset into a vocabulary, or made by another codec?"
                )

    def prepare_latents(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """Noise `[B, 3, H, W]`."""
        side = self.transformer.config.sample_size
        shape = (batch_size, 3, side, side)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.transformer.dtype)

    def predict_velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """Velocity `[B, 3, H, W]`; guidance moves it away from what the transformer predicts without codes."""
        if guidance_scale == 1:
            return self.transformer(latents, timestep, ids).sample
        drop = torch.arange(2, device=ids.device).repeat_interleave(len(ids)).bool()  # [2 * B]
        doubled = self.transformer(torch.cat([latents] * 2), timestep.repeat(2), ids.repeat(2, 1, 1), drop).sample
        with_codes, without_codes = doubled.chunk(2)
        return without_codes + guidance_scale * (with_codes - without_codes)
