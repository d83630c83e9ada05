"""Weights written tensor by tensor, so that a checkpoint of any size is written in the memory of its largest tensor.

The library of safetensors writes a file from a mapping of all its tensors; its format (a header of JSON, then the bytes
of the tensors in a row) needs no more than one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from unimm.conversion.weights import DTYPES
from unimm.files import atomic_write

SHARD_BYTES = 5_000_000_000
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Output:
    """A tensor to write.

    Args:
        name: under which it is found again.
        shape, dtype: of the whole.
        parts: gives its parts, one after the other along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterator[torch.Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_weights(folder: Path, outputs: Sequence[Output], *, name: str = "model", shard_bytes: int) -> None:
    """One `.safetensors` file, or shards with an index; a file that is there already is taken as written.

    Raises:
        OSError: the disk is full.
    """
    shards = _split(outputs, shard_bytes)
    if len(shards) == 1:
        _write_once(folder / f"{name}.safetensors", shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_once(folder / file, shard)
        places |= {output.name: file for output in shard}
    index = {"metadata": {"total_size": sum(output.size for output in outputs)}, "weight_map": places}
    with atomic_write(folder / f"{name}.safetensors.index.json") as path:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _split(outputs: Sequence[Output], shard_bytes: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(other.size for other in shards[-1]) + output.size > shard_bytes:
            shards.append([])
        shards[-1].append(output)
    return shards


def _write_once(path: Path, outputs: Sequence[Output]) -> None:
    if path.is_file():
        return
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        place = [start, start := start + output.size]
        entry = {"dtype": NAMES[output.dtype], "shape": list(output.shape), "data_offsets": place}
        header[output.name] = entry  # type: ignore[assignment]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers want aligned data
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in outputs:
            for part in output.parts():
                file.write(part.to(output.dtype).contiguous().flatten().view(torch.uint8).numpy().data)
