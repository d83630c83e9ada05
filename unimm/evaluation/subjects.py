"""What can be judged as a codec: ours, any VAE of diffusers, a folder of copies that something else made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoModel as DiffusersModel
from PIL import Image
from tqdm import tqdm

from unimm.codec import VisualCodecImageProcessor, VisualCodecModel
from unimm.codec.vae import mode_of_latents
from unimm.codes import CodeSpec
from unimm.data.pictures import to_pixel_values

BATCH = 16
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Copies:
    """Pictures after one trip.

    Args:
        pixels: float32 `[N, 3, H, W]` in [-1, 1].
        bits: of all codes of all pictures together; None where there are no codes.
        ids: `[M, K]`, the codes of all pictures in a row; None where there are none.
    """

    pixels: torch.Tensor
    bits: float | None = None
    ids: torch.Tensor | None = None


class Subject(Protocol):
    """Something that copies pictures."""

    @property
    def name(self) -> str: ...

    @property
    def side(self) -> int:
        """Of the pictures it takes, in pixels."""

    @property
    def spec(self) -> CodeSpec | None:
        """Of its codes, if it has any."""

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """The numbers of positions to try; None is its own."""

    def copy(self, pictures: np.ndarray, length: int | None = None) -> Copies:
        """uint8 `[N, side, side, 3]` to copies of the same size."""


class CodecSubject:
    """A visual codec.

    Raises:
        ValueError: one that reads no pixels, or draws none.
    """

    def __init__(self, codec: VisualCodecModel, name: str) -> None:
        if not codec.config.reads_pixels or not codec.config.draws_pixels:
            raise ValueError(f"{name} does not both read and draw pixels, so that its copies cannot be compared.")
        if codec.condition_size is not None:
            raise ValueError(f"{name} reads or draws under a text, which these pictures do not have.")
        self.codec, self.name = codec.eval(), name
        self.side = codec.config.image_size
        spec = codec.spec_without_fingerprint
        self.spec: CodeSpec | None = spec if spec.sizes else None
        self.processor = VisualCodecImageProcessor.for_codec(codec.config)

    @property
    def lengths(self) -> tuple[int | None, ...]:
        grid = self.codec.config.grid(self.side, self.side)
        legal: list[int | None] = []
        for length in [2**power for power in range(self.codec.length.max_length.bit_length())]:
            try:
                self.codec.length.arrange(grid, length)
            except ValueError:
                continue
            legal.append(length)
        own = self.codec.length.arrange(grid, None).length
        return (*(length for length in legal if length != own), None)

    @torch.no_grad()
    def copy(self, pictures: np.ndarray, length: int | None = None) -> Copies:
        drawn, ids = [], []
        for start in range(0, len(pictures), BATCH):
            batch = [Image.fromarray(picture) for picture in pictures[start : start + BATCH]]
            values = self.processor(batch, return_tensors="pt")["pixel_values"]
            codes = self.codec.encode(values.to(self.codec.device), num_tokens=length)
            drawn.append(self.codec.pictures(codes).cpu())
            ids.append(codes.ids[codes.mask].cpu())
        if self.spec is None:
            return Copies(torch.cat(drawn))
        row = torch.cat(ids)
        return Copies(torch.cat(drawn), len(row) * self.spec.bits / self.spec.max_length, row)


class VaeSubject:
    """An autoencoder of diffusers, judged at the mode of its latents; it has no codes."""

    def __init__(self, path: str | Path, side: int, device: str = "cpu") -> None:
        self.vae = DiffusersModel.from_pretrained(str(path)).eval().to(device)
        self.name, self.side = str(path), side
        self.spec: CodeSpec | None = None
        self.lengths: tuple[int | None, ...] = (None,)

    @torch.no_grad()
    def copy(self, pictures: np.ndarray, length: int | None = None) -> Copies:
        drawn = []
        for batch in to_pixel_values(pictures).split(BATCH):
            latents = mode_of_latents(self.vae, batch.to(self.vae.device))
            drawn.append(self.vae.decode(latents).sample.clamp(-1, 1).cpu())
        return Copies(torch.cat(drawn))


def read_pairs(references: Path, copies: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures of two folders under the same names, uint8 `[B, H, W, 3]` each, a batch at a time.

    Raises:
        ValueError: no pictures, names that only one folder has, or sizes that differ.
    """
    names = [
        {
            path.relative_to(folder).with_suffix("").as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in SUFFIXES
        }
        for folder in (references, copies)
    ]
    if not names[0] or names[0].keys() != names[1].keys():
        alone = sorted(names[0].keys() ^ names[1].keys())[:3]
        raise ValueError(
            f"{references} holds {len(names[0])} pictures and {copies} {len(names[1])}; both need the same names, at "
            f"least one. Only one has: {', '.join(alone) or 'nothing'}."
        )
    pairs = [(names[0][name], names[1][name]) for name in names[0]]
    sizes = {_size(path) for pair in pairs for path in pair}
    if len(sizes) > 1:
        raise ValueError(
            f"The pictures have sizes {sorted(sizes)[:4]}; a copy is compared pixel by pixel, in one size."
        )
    return _read_batches(pairs)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def _read_batches(pairs: Sequence[tuple[Path, Path]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    starts = tqdm(range(0, len(pairs), BATCH), desc="pairs", unit="batch")
    for batch in (pairs[start : start + BATCH] for start in starts):
        real, copied = zip(*batch, strict=True)
        yield _read(real), _read(copied)


def _read(paths: Sequence[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
