"""Reward by the model's own reading: how sure it is that a picture shows its prompt (VQAScore, 2404.01291)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from unimm.rewards.base import Drawing, Reward
from unimm.sequence import UniMMProcessor
from unimm.unified import UniMMForConditionalGeneration

QUESTION = "Does this picture show {prompt}? Answer yes or no."


class SelfVqaScore:
    """Probability of "yes" against "no" as the first token of the answer.

    Args:
        model: reads pictures; kept as it is, while another copy is trained.
        processor: of the model.

    Raises:
        ValueError: both answers begin with the same token.
    """

    def __init__(self, model: UniMMForConditionalGeneration, processor: UniMMProcessor) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.answers = [processor.tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ("yes", "no")]
        if self.answers[0] == self.answers[1]:
            raise ValueError(
                f"'yes' and 'no' both begin with token {self.answers[0]}, which tells nothing; judge by another "
                "reward than self_vqascore."
            )

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
        """One probability per picture."""
        asked = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": QUESTION.format(prompt=drawing.prompt)},
                    ],
                }
            ]
            for image, drawing in zip(images, drawings, strict=True)
        ]
        inputs = self.processor.chat_inputs(asked).to(self.model.device)
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        logits = self.model(**inputs, position_ids=positions, logits_to_keep=1, use_cache=False).logits[:, -1]
        return logits[:, self.answers].float().softmax(dim=1)[:, 0].tolist()


def self_vqascore(model: UniMMForConditionalGeneration, processor: UniMMProcessor) -> Reward:
    """The reward of a model that is loaded already, in [0, 1]."""
    return Reward("self_vqascore", 0.0, 1.0, lambda facts: True, SelfVqaScore(model, processor))


def load_self_vqascore(name: str, device: str | torch.device = "cpu") -> Reward:
    """The reward of a model folder or Hub name."""
    model = UniMMForConditionalGeneration.from_pretrained(name).to(device)
    return self_vqascore(model, UniMMProcessor.from_pretrained(name))
