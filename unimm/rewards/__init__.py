"""Drawings in, numbers out: each reward is a plain function with a name and a range.

In: a picture, its prompt and the facts that it should show. Out: a float, or None where a reward does not apply. Never
knows how the picture was made. What a number means for training (advantages within a group) is the trainer's affair.
"""

from unimm.rewards.aesthetic import aesthetic, load_aesthetic
from unimm.rewards.alignment import ImageTextAlignment, alignment, load_alignment
from unimm.rewards.base import Drawing, Reward
from unimm.rewards.emoji import emoji
from unimm.rewards.mixture import RewardMixture
from unimm.rewards.ocr import load_ocr
from unimm.rewards.remote import remote
from unimm.rewards.scene import scene, scene_exact
from unimm.rewards.self_vqascore import load_self_vqascore, self_vqascore
from unimm.rewards.word import ink, word, word_exact

REWARDS: dict[str, Reward] = {reward.name: reward for reward in (scene, scene_exact, emoji, word, word_exact, ink)}

__all__ = [
    "REWARDS",
    "Drawing",
    "ImageTextAlignment",
    "Reward",
    "RewardMixture",
    "aesthetic",
    "alignment",
    "load_aesthetic",
    "load_alignment",
    "load_ocr",
    "load_self_vqascore",
    "remote",
    "self_vqascore",
]
