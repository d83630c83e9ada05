"""Pictures that the visual stages learn from and are judged on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor
from unimm.data.pictures import Mixture, render, to_pixel_values
from unimm.data.sources import Source, read_pictures
from unimm.data.worlds.base import SIDE
from unimm.files import atomic_write
from unimm.training.loop import ON_CPU
from unimm.training.run_directory import RunDirectory

CAPTIONS = "captions.json"  # beside the pictures


@dataclass(frozen=True)
class PoolConfig:
    """Pictures to learn from: rendered worlds, or a source.

    Args:
        worlds: world name to its share.
        source: Hub name, folder or file that `datasets` reads, with its pictures in the column `image`.
        text: column of the source's captions, for objectives that read them; pictures without one are left out.
        pool_size: pictures rendered or read once, before the first step.
        batch_size: pictures per step and process.

    Raises:
        ValueError: neither worlds nor source, or both; no picture in the pool or in a batch.
    """

    worlds: dict[str, float] = field(default_factory=dict)
    source: str | None = None
    image: str = "image"
    text: str | None = None
    pool_size: int = 30_000
    batch_size: int = 32

    def __post_init__(self) -> None:
        if bool(self.worlds) == bool(self.source):
            raise ValueError(f"data.worlds are {self.worlds} and data.source {self.source!r}; name one of them.")
        if min(self.pool_size, self.batch_size) < 1:
            raise ValueError(
                f"data.pool_size is {self.pool_size} and data.batch_size {self.batch_size}; each must be 1 or more."
            )

    @property
    def has_captions(self) -> bool:
        return bool(self.worlds) or self.text is not None


@dataclass(frozen=True)
class Pool:
    """Pictures in memory or on disk.

    Args:
        pictures: uint8 `[S, H, W, 3]` to learn from.
        held_out: floats `[M, 3, H, W]` that training never shows, by world or source.
        captions: one of each picture to learn from, empty where none are known.
        held_out_captions: one of each of the others, by world or source, empty where none are known.
    """

    pictures: np.ndarray
    held_out: dict[str, torch.Tensor]
    captions: list[str] = field(default_factory=list)
    held_out_captions: dict[str, list[str]] = field(default_factory=dict)


def held_out_pictures(world: str, size: int) -> tuple[torch.Tensor, list[str]]:
    """Held-out pictures of one world, float `[size, 3, H, W]`, and their captions."""
    pictures, captions = zip(*render(Mixture({world: 1.0}, split="held_out", seed=1), size), strict=True)
    return to_pixel_values(np.stack(pictures)), list(captions)


def prepare_pool(
    data: PoolConfig, codec: VisualCodecConfig, directory: RunDirectory, *, seed: int, held_out: int
) -> Pool:
    """The pictures of a recipe and their captions, rendered or read by the first process where they are missing.

    Args:
        codec: whose size they have.
        held_out: pictures kept back of every world, or of the source, whose last ones they are.

    Raises:
        ValueError: a source with too few readable pictures, or files of another pool.
    """
    path, words = directory.root / "pool.npy", directory.root / CAPTIONS
    size = data.pool_size + (held_out if data.source else 0)
    with PartialState(cpu=ON_CPU).local_main_process_first():
        if not (path.exists() and words.exists()):
            if data.source is None:
                write_pool(render(Mixture(data.worlds, seed=seed), size), (size, SIDE), path, words)
            else:
                source = Source(data.source, image=data.image, text=data.text, streaming=True)
                pairs = read_pictures(source, VisualCodecImageProcessor.for_codec(codec), limit=size)
                write_pool(pairs, (size, codec.image_size), path, words)
        pictures, captions = np.load(path, mmap_mode="r"), json.loads(words.read_text(encoding="utf-8"))
    if len(pictures) != size:
        raise ValueError(f"{path} holds {len(pictures)} pictures, the recipe asks for {size}; delete the file.")
    if data.source is None:
        kept = {world: held_out_pictures(world, held_out) for world in data.worlds}
    else:
        kept = {"source": (to_pixel_values(pictures[-held_out:]), captions[-held_out:])}
    return Pool(
        pictures[: data.pool_size],
        {name: pixels for name, (pixels, _) in kept.items()},
        captions[: data.pool_size] if data.has_captions else [],
        {name: texts for name, (_, texts) in kept.items()} if data.has_captions else {},
    )


def write_pool(pairs: Iterable[tuple[np.ndarray, str]], sizes: tuple[int, int], path: Path, words: Path) -> None:
    """Pictures as one array in `path`, and their captions as a list in `words`.

    Args:
        sizes: how many there are, and their side.

    Raises:
        ValueError: there are fewer; nothing is written then.
    """
    size, side = sizes
    captions: list[str] = []
    with atomic_write(path) as temporary:
        pool = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(size, side, side, 3))
        for picture, caption in tqdm(pairs, total=size, desc="pictures"):
            pool[len(captions)] = picture
            captions.append(caption)
        if len(captions) < size:
            raise ValueError(
                f"data.source has {len(captions)} readable pictures; data.pool_size and those held out need {size}. "
                "Lower data.pool_size."
            )
        pool.flush()
        with atomic_write(words) as written:
            written.write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
