"""Pictures of the worlds as arrays: a seeded mixture, rendered once and kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unimm.data.worlds import WORLDS, Example
from unimm.data.worlds.base import SIDE
from unimm.files import atomic_write


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


def render_pool(mixture: Mixture, size: int, path: Path) -> np.ndarray:
    """`size` pictures as a memory-mapped uint8 `[size, H, W, 3]`, rendered unless `path` holds them already."""
    if not path.exists():
        with atomic_write(path) as temporary:
            pool = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(size, SIDE, SIDE, 3))
            for index in tqdm(range(size), desc="rendering"):
                pool[index] = np.asarray(mixture.example(index)[1].image)
            pool.flush()
    pool = np.load(path, mmap_mode="r")
    if len(pool) != size:
        raise ValueError(f"{path} holds {len(pool)} pictures, the recipe asks for {size}; delete the file.")
    return pool


def to_pixel_values(pictures: np.ndarray) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` in [-1, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixel_values: torch.Tensor) -> list[Image.Image]:
    """Float `[B, 3, H, W]` in [-1, 1] to RGB pictures."""
    levels = ((pixel_values.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).numpy()]
