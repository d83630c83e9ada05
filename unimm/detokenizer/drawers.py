"""One way to draw codes, whatever diffusion model does it: what a codec decodes to goes to a diffusers pipeline.

A detokenizer is a saved diffusers pipeline with `drawing.json`, its settings as published, beside it. The class that
its `model_index.json` names says which drawer hands it what it reads.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    SanaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPImg2ImgPipeline,
)
from PIL import Image
from safetensors.torch import load_file

from unimm.codec import VisualCodecModel
from unimm.codes import VisualCodes
from unimm.config import from_dict
from unimm.detokenizer.flux import FeaturesToFluxPipeline
from unimm.detokenizer.pipeline import CodesToImagePipeline
from unimm.detokenizer.sdxl import PooledCondition
from unimm.nn.stored import SMALL, store_linears

STORED = ("transformer", "unet", "text_encoder", "text_encoder_2")
SETTINGS, UNCONDITIONAL, CONDITION = "drawing.json", "unconditional.safetensors", "condition"


@dataclass(frozen=True)
class DrawingSettings:
    """As published.

    Args:
        num_inference_steps: evaluations of the denoiser.
        guidance_scale: strength of the pipeline's own guidance.
    """

    num_inference_steps: int
    guidance_scale: float


class Drawer(ABC):
    """Draws one picture at a time.

    Args:
        pipeline: loaded.
        folder: that it lies in.
    """

    pipeline_class: type[DiffusionPipeline]
    settings = DrawingSettings(8, 1.0)

    def __init__(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        self.pipeline = pipeline
        if (folder / SETTINGS).is_file():
            fields = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            self.settings = from_dict(DrawingSettings, fields, where=str(folder / SETTINGS))

    @abstractmethod
    def draw(
        self, codes: VisualCodes, codec: VisualCodecModel, *, prompt: str, steps: int, generator: torch.Generator | None
    ) -> Image.Image:
        """The picture of `codes`.

        Args:
            codes: of one picture.
            codec: that they are of.
            prompt: that the picture was drawn for; only some models read it.
            steps: evaluations of the denoiser; 0 for the published number.
            generator: of the noise.
        """

    def sampling(self, steps: int, generator: torch.Generator | None) -> dict[str, Any]:
        """How the pipeline samples: as published, but for a number of steps that is given."""
        return {
            "num_inference_steps": steps or self.settings.num_inference_steps,
            "guidance_scale": self.settings.guidance_scale,
            "generator": generator,
        }


class CodesDrawer(Drawer):
    """Our own detokenizer, which reads codes."""

    pipeline_class = CodesToImagePipeline

    def draw(
        self, codes: VisualCodes, codec: VisualCodecModel, *, prompt: str, steps: int, generator: torch.Generator | None
    ) -> Image.Image:
        return self.pipeline(codes, **self.sampling(steps, generator)).images[0]


class FluxDrawer(Drawer):
    """X-Omni (2507.22058): features of every token and the prompt."""

    pipeline_class = FeaturesToFluxPipeline

    def draw(
        self, codes: VisualCodes, codec: VisualCodecModel, *, prompt: str, steps: int, generator: torch.Generator | None
    ) -> Image.Image:
        assert codes.grid is not None
        return self.pipeline(
            codec.decode(codes).flatten(2).transpose(1, 2),
            codes.grid[0],
            prompt=prompt,
            **self.sampling(steps, generator),
        ).images[0]


class UnCLIPDrawer(Drawer):
    """SEED (2310.01218): one image embedding, without noise on it."""

    pipeline_class = StableUnCLIPImg2ImgPipeline
    settings = DrawingSettings(20, 10.0)

    def draw(
        self, codes: VisualCodes, codec: VisualCodecModel, *, prompt: str, steps: int, generator: torch.Generator | None
    ) -> Image.Image:
        return self.pipeline(
            prompt="",
            image_embeds=codec.decode(codes).to(self.pipeline.dtype),
            noise_level=0,
            **self.sampling(steps, generator),
        ).images[0]


class StableDiffusionDrawer(Drawer):
    """LaVIT (2309.04669): features in the place of a prompt's, against stored features of no picture."""

    pipeline_class = StableDiffusionPipeline
    settings = DrawingSettings(50, 5.0)

    def __init__(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        super().__init__(pipeline, folder)
        self.unconditional = load_file(folder / UNCONDITIONAL)["features"]

    def draw(
        self, codes: VisualCodes, codec: VisualCodecModel, *, prompt: str, steps: int, generator: torch.Generator | None
    ) -> Image.Image:
        features = codec.decode(codes).to(self.pipeline.dtype)
        return self.pipeline(
            prompt_embeds=features,
            negative_prompt_embeds=self.unconditional.to(features).expand_as(features),
            **self.sampling(steps, generator),
        ).images[0]


class StableDiffusionXLDrawer(Drawer):
    """LaVIT (2309.04669), large: features in the place of two prompts', against zeros."""

    pipeline_class = StableDiffusionXLPipeline
    settings = DrawingSettings(25, 7.0)

    def __init__(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        super().__init__(pipeline, folder)
        self.condition = PooledCondition.from_pretrained(folder / CONDITION).eval()

    def draw(
        self, codes: VisualCodes, codec: VisualCodecModel, *, prompt: str, steps: int, generator: torch.Generator | None
    ) -> Image.Image:
        features = codec.decode(codes)
        states, pooled = (part.to(self.pipeline.dtype) for part in self.condition.to(features.device)(features.float()))
        return self.pipeline(
            prompt_embeds=states,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=torch.zeros_like(states),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
            **self.sampling(steps, generator),
        ).images[0]


class SanaDrawer(Drawer):
    """Tar (2506.18898): features in the place of a prompt's, against zeros."""

    pipeline_class = SanaPipeline
    settings = DrawingSettings(20, 4.0)

    def draw(
        self, codes: VisualCodes, codec: VisualCodecModel, *, prompt: str, steps: int, generator: torch.Generator | None
    ) -> Image.Image:
        features = codec.decode(codes).to(self.pipeline.dtype)
        mask = torch.ones(features.shape[:2], dtype=torch.int64, device=features.device)
        side = self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor
        return self.pipeline(
            prompt_embeds=features,
            prompt_attention_mask=mask,
            negative_prompt=None,
            negative_prompt_embeds=torch.zeros_like(features),
            negative_prompt_attention_mask=mask,
            height=side,
            width=side,
            **self.sampling(steps, generator),
            use_resolution_binning=False,
        ).images[0]


DRAWERS: dict[str, type[Drawer]] = {
    drawer.pipeline_class.__name__: drawer
    for drawer in (CodesDrawer, FluxDrawer, UnCLIPDrawer, StableDiffusionDrawer, StableDiffusionXLDrawer, SanaDrawer)
}


def load_drawer(folder: Path, *, dtype: torch.dtype, weights: str | None = None) -> Drawer:
    """The detokenizer in `folder`.

    Args:
        dtype: of its weights.
        weights: `int8` or `nf4` stores the linear layers of denoiser and text encoders so, and the rest in bfloat16.

    Raises:
        ValueError: its pipeline is one that no drawer knows.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = index["_class_name"]
    if name not in DRAWERS:
        raise ValueError(f"{folder} holds a {name}; drawers exist for {', '.join(DRAWERS)}.")
    drawer = DRAWERS[name]
    absent = {part: None for part, place in index.items() if place == [None, None]}  # those of prompts, mostly
    stored = [part for part in STORED if index.get(part, [None])[0]]
    small = weights if weights in SMALL else None
    pipeline = drawer.pipeline_class.from_pretrained(folder, dtype=torch.bfloat16 if small else dtype, **absent)
    if small:
        for part in stored:
            store_linears(getattr(pipeline, part), small)
    pipeline.set_progress_bar_config(disable=True)
    return drawer(pipeline, folder)
