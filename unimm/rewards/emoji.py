"""Reward of emoji pictures: is the nearest of all glyphs the one that was asked for?"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from unimm.rewards.base import Drawing, Reward
from unimm.scorers.emoji import emoji_judge
from unimm.scorers.facts import SceneFacts


def is_single_emoji(facts: SceneFacts) -> bool:
    return len(facts.objects) == 1 and facts.objects[0].colour is None


def _identity(images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
    judge = emoji_judge()
    return [
        float(judge.name(image) == drawing.facts.objects[0].name)
        for image, drawing in zip(images, drawings, strict=True)
    ]


emoji = Reward("emoji", 0.0, 1.0, is_single_emoji, _identity)
