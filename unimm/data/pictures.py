"""Pictures of the worlds as arrays: a seeded mixture, rendered once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from PIL import Image

from unimm.data.worlds import WORLDS, Example


class Mixture:
    """Examples of several worlds at given weights; index to example is a pure function of seed and split.

    Args:
        weights: world name to weight.
        split, seed: as for a world.

    Raises:
        ValueError: no weight, or an unknown world.
    """

    def __init__(self, weights: Mapping[str, float], *, split: str = "train", seed: int = 0) -> None:
        unknown = [name for name in weights if name not in WORLDS]
        if unknown or not weights or sum(weights.values()) <= 0:
            raise ValueError(f"worlds are {dict(weights)}; give positive weights to some of {', '.join(WORLDS)}.")
        self.worlds = [WORLDS[name](split=split, seed=seed) for name in weights]
        self.names = list(weights)
        self.probabilities = np.array(list(weights.values())) / sum(weights.values())
        self.seed = seed

    def example(self, index: int) -> tuple[str, Example]:
        """World name and example."""
        choice = np.random.default_rng([self.seed, index]).choice(len(self.worlds), p=self.probabilities)
        return self.names[choice], self.worlds[choice].example(index)


def render(mixture: Mixture, size: int) -> Iterator[tuple[np.ndarray, str]]:
    """The first `size` pictures, uint8 `[H, W, 3]`, each with the canonical one of its captions."""
    for index in range(size):
        example = mixture.example(index)[1]
        yield np.asarray(example.image), example.captions[0]


def to_pixel_values(pictures: np.ndarray) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` in [-1, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixel_values: torch.Tensor) -> list[Image.Image]:
    """Float `[B, 3, H, W]` in [-1, 1] to RGB pictures."""
    levels = ((pixel_values.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).numpy()]
