"""Reward of any picture: how near a CLIP-like model of transformers puts it to its prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from unimm.rewards.base import Drawing, Reward


class ImageTextAlignment:
    """Cosine between the embeddings of picture and prompt (Radford et al., 2021).

    Args:
        model: returns `image_embeds` and `text_embeds` `[B, D]`, as CLIP and SigLIP do.
        processor: of the model.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
        """One cosine in [-1, 1] per picture."""
        # Padded to the full length, since SigLIP was trained so and CLIP does not mind.
        inputs = self.processor(
            text=[drawing.prompt for drawing in drawings],
            images=list(images),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
        ).to(self.model.device)
        output = self.model(**inputs)
        return nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).tolist()


def alignment(model: PreTrainedModel, processor: ProcessorMixin) -> Reward:
    """The reward of a model that is loaded already."""
    return Reward("alignment", -1.0, 1.0, lambda facts: True, ImageTextAlignment(model, processor))


def load_alignment(name: str, device: str | torch.device = "cpu") -> Reward:
    """The reward of a model folder or Hub name."""
    return alignment(AutoModel.from_pretrained(name).to(device), AutoProcessor.from_pretrained(name))
