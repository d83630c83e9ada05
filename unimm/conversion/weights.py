"""Weights of an upstream as they lie on disk: which tensors there are, of which shape, and each one when it is wanted.

Only headers are read until then, so that a checkpoint of any size is checked before the first of its numbers is read.
Pickles are read with `weights_only=True`, which builds tensors and plain containers and runs nothing.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unimm.conversion.upstream import WeightFile

NAMES = ("weights", "model", "diffusion_pytorch_model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet.

    Args:
        file: that holds it.
        name: in that file.
        shape, dtype: of the tensor.
        inside: keys of the mappings around the tensors, of a pickle.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inside: tuple[str, ...] = ()

    def read(self) -> torch.Tensor:
        """The tensor, mapped from its file."""
        if self.file.suffix == ".safetensors":
            with safe_open(self.file, framework="pt") as opened:
                return opened.get_tensor(self.name)
        return _unpickled(self.file, self.inside)[self.name]


def stored_tensors(source: Path, files: tuple[WeightFile, ...]) -> dict[str, StoredTensor]:
    """Every tensor of the files of an upstream, by upstream's key.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is not what its name says, or holds more than tensors, or an index that does not fit.
    """
    found: dict[str, StoredTensor] = {}
    for wanted in files:
        for file in _weight_files(source / wanted.path, wanted.optional):
            for tensor in _listed(file, wanted.inside):
                key = wanted.prefix + tensor.name
                if key in found:
                    raise ValueError(f"{key!r} is in {found[key].file.name} and in {file.name}; remove one of them.")
                found[key] = tensor
    return found


def _weight_files(place: Path, optional: bool) -> list[Path]:
    """The file itself, or the shards or the one file of a folder."""
    if place.is_file():
        return [place]
    for suffix in SUFFIXES if place.is_dir() else ():
        for name in NAMES:
            index = place / f"{name}{suffix}.index.json"
            if index.is_file():
                return _shards(index)
            if (place / f"{name}{suffix}").is_file():
                return [place / f"{name}{suffix}"]
    if optional:
        return []
    if place.is_dir():
        raise FileNotFoundError(
            f"{place} has no weights; they are looked for as {', '.join(NAMES)} with the ending "
            f"{' or '.join(SUFFIXES)}, in one file or in shards with an .index.json."
        )
    raise FileNotFoundError(f"There is no {place}; put upstream's weights there under that name.")


def _shards(index: Path) -> list[Path]:
    try:
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}.") from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index} names {missing[0]}, which is not there; get all {len(names)} shards.")
    return [index.parent / name for name in names]


def _listed(file: Path, inside: tuple[str, ...]) -> list[StoredTensor]:
    if file.suffix != ".safetensors":
        state = _unpickled(file, inside)
        return [StoredTensor(file, name, tuple(t.shape), t.dtype, inside) for name, t in state.items()]
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, a reader is no mapping
            return [
                StoredTensor(file, name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{file} is not a safetensors file, or is cut short: {error}") from error


def _unpickled(file: Path, inside: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The state dict in a pickle."""
    state = unpickled(file)
    for key in inside:
        if not isinstance(state, Mapping) or key not in state:
            raise ValueError(f"{file} has no {'.'.join(inside)!r}, under which its weights are expected.")
        state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} holds something else than named tensors{' there' if inside else ''}.")
    return dict(state)


def unpickled(file: Path) -> Any:
    """What a .bin, .pt or .pth file holds: tensors, mapped where the format allows it, and plain containers.

    Raises:
        ValueError: a file that would run code, or is damaged.
    """
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # the format of before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file} can run code when it is read, or is damaged, so it is not read ({reason}). Save its state dict "
            "with safetensors.torch.save_file."
        ) from error
