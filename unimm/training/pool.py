"""Pictures that the visual stages learn from and are judged on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor
from unimm.data.pictures import Mixture, render_pool, to_pixel_values
from unimm.data.sources import Source, read_pictures
from unimm.files import atomic_write
from unimm.training.loop import ON_CPU
from unimm.training.run_directory import RunDirectory


@dataclass(frozen=True)
class PoolConfig:
    """Pictures to learn from: rendered worlds, or a source.

    Args:
        worlds: world name to its share.
        source: Hub name, folder or file that `datasets` reads, with its pictures in the column `image`.
        pool_size: pictures rendered or read once, before the first step.
        batch_size: pictures per step and process.

    Raises:
        ValueError: neither worlds nor source, or both.
    """

    worlds: dict[str, float] = field(default_factory=dict)
    source: str | None = None
    image: str = "image"
    pool_size: int = 30_000
    batch_size: int = 32

    def __post_init__(self) -> None:
        if bool(self.worlds) == bool(self.source):
            raise ValueError(f"data.worlds are {self.worlds} and data.source {self.source!r}; name one of them.")


@dataclass(frozen=True)
class Pool:
    """uint8 `[S, H, W, 3]` to learn from, and floats `[M, 3, H, W]` that training never shows, by world or source."""

    pictures: np.ndarray
    held_out: dict[str, torch.Tensor]


def held_out_pixels(world: str, size: int) -> torch.Tensor:
    """Held-out pictures of one world, float `[size, 3, H, W]`."""
    mixture = Mixture({world: 1.0}, split="held_out", seed=1)
    return to_pixel_values(np.stack([np.asarray(mixture.example(index)[1].image) for index in range(size)]))


def prepare_pool(
    data: PoolConfig, codec: VisualCodecConfig, directory: RunDirectory, *, seed: int, held_out: int
) -> Pool:
    """The pictures of a recipe, rendered or read by the first process where they are missing.

    Args:
        codec: whose size they have.
        held_out: pictures kept back of every world, or of the source, whose last ones they are.

    Raises:
        ValueError: a source with too few readable pictures.
    """
    path = directory.root / "pool.npy"
    with PartialState(cpu=ON_CPU).local_main_process_first():
        if data.source is None:
            pictures = render_pool(Mixture(data.worlds, seed=seed), data.pool_size, path)
            return Pool(pictures, {world: held_out_pixels(world, held_out) for world in data.worlds})
        size, side = data.pool_size + held_out, codec.image_size
        if not path.exists():
            processor = VisualCodecImageProcessor.for_codec(codec)
            source = Source(data.source, image=data.image, streaming=True)
            with atomic_write(path) as temporary:
                pool = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(size, side, side, 3))
                found = 0
                for picture in tqdm(read_pictures(source, processor, limit=size), total=size, desc="reading"):
                    pool[found] = picture
                    found += 1
                if found < size:
                    raise ValueError(
                        f"{data.source} has {found} readable pictures; data.pool_size = {data.pool_size} and "
                        f"{held_out} held out need {size}. Lower data.pool_size."
                    )
                pool.flush()
        pictures = np.load(path, mmap_mode="r")
    return Pool(pictures[: data.pool_size], {"source": to_pixel_values(pictures[-held_out:])})
