"""Reward of any picture by an image classifier of transformers that was trained on what people like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from unimm.rewards.base import Drawing, Reward

LABEL = "aesthetic"


class AestheticScore:
    """Probability that a classifier gives to `aesthetic`; of a model with a single output, its sigmoid.

    Args:
        model: image classifier.
        processor: of the model.

    Raises:
        ValueError: several labels, none of which is `aesthetic`.
    """

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        labels = [str(model.config.id2label[index]).lower() for index in range(model.config.num_labels)]
        if len(labels) > 1 and LABEL not in labels:
            raise ValueError(
                f"judges.aesthetic has the labels {', '.join(labels[:8])}; name a model with one output or a label "
                f"'{LABEL}'. Preference models of CLIP's kind go to alignment_model."
            )
        self.label = labels.index(LABEL) if len(labels) > 1 else None

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
        """One number in [0, 1] per picture; prompts do not count."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        logits = self.model(**inputs).logits.float()  # [B, labels]
        if self.label is None:
            return logits[:, 0].sigmoid().tolist()
        return logits.softmax(dim=1)[:, self.label].tolist()


def aesthetic(model: PreTrainedModel, processor: BaseImageProcessor) -> Reward:
    """The reward of a model that is loaded already, in [0, 1]."""
    return Reward("aesthetic", 0.0, 1.0, lambda facts: True, AestheticScore(model, processor))


def load_aesthetic(name: str, device: str | torch.device = "cpu") -> Reward:
    """The reward of a model folder or Hub name."""
    model = AutoModelForImageClassification.from_pretrained(name).to(device)
    return aesthetic(model, AutoImageProcessor.from_pretrained(name))
