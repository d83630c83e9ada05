"""Pictures that the visual stages learn from and are judged on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState

from unimm.data.pictures import Mixture, render_pool, to_pixel_values
from unimm.training.loop import ON_CPU
from unimm.training.run_directory import RunDirectory

VALIDATION_SIZE = 96  # pictures per world


@dataclass(frozen=True)
class PoolConfig:
    """Pictures to learn from.

    Args:
        worlds: world name to its share.
        pool_size: pictures rendered once, before the first step.
        batch_size: pictures per step and process.
    """

    worlds: dict[str, float]
    pool_size: int = 30_000
    batch_size: int = 32


def held_out_pixels(world: str, size: int = VALIDATION_SIZE) -> torch.Tensor:
    """Held-out pictures of one world, float `[size, 3, H, W]`."""
    mixture = Mixture({world: 1.0}, split="held_out", seed=1)
    return to_pixel_values(np.stack([np.asarray(mixture.example(index)[1].image) for index in range(size)]))


def render_once(data: PoolConfig, directory: RunDirectory, seed: int) -> np.ndarray:
    """The pictures to learn from, rendered by the first process where they are missing."""
    with PartialState(cpu=ON_CPU).local_main_process_first():
        return render_pool(Mixture(data.worlds, seed=seed), data.pool_size, directory.root / "pool.npy")
