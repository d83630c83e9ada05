"""Weights of an upstream as they lie on disk: which tensors there are, of which shape, and each one when it is wanted.

Only headers are read until then, so that a checkpoint of any size is checked before the first of its numbers is read.
Pickles are read with `weights_only=True`, which builds tensors and plain containers and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unimm.conversion.upstream import WeightFile

# What PyTorch puts before every name of a model that is wrapped for training, which is no part of the names.
WRAPPERS = ("module.", "_orig_mod.")
NAMES = ("weights", "model", "diffusion_pytorch_model", "pytorch_model")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
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
        average: name of the moving average that is read in its stead.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inside: tuple[str, ...] = ()
    average: str = ""

    def read(self) -> torch.Tensor:
        """The tensor, mapped from its file."""
        name = self.average or self.name
        if self.file.suffix == ".safetensors":
            with safe_open(self.file, framework="pt") as opened:
                return opened.get_tensor(name)
        tensor: torch.Tensor = _within(_last_unpickled(self.file, self.file.stat().st_mtime_ns), self.inside)[name]
        return tensor


def stored_tensors(source: Path, files: tuple[WeightFile, ...]) -> dict[str, StoredTensor]:
    """Every tensor of the files of an upstream, by upstream's key without the wrappers of training.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is not what its name says, or holds more than tensors, or an index that does not fit, or
            several files that could be meant.
    """
    found: dict[str, StoredTensor] = {}
    named = {source / wanted.path for wanted in files}
    for wanted in files:
        for file in _weight_files(source / wanted.path, wanted.optional, others=named):
            listed = _listed(file, wanted.inside)
            wrapper = _wrapper([tensor.name for tensor in listed])
            for tensor in listed:
                key = wanted.prefix + tensor.name.removeprefix(wrapper)
                if key in found:
                    raise ValueError(f"{key!r} is in {found[key].file.name} and in {file.name}; remove one of them.")
                found[key] = tensor
    return found


def _wrapper(names: list[str]) -> str:
    """What all names begin with that is none of theirs; empty where there is no such thing."""
    wrapper = ""
    while found := [begin for begin in WRAPPERS if names and all(name.startswith(wrapper + begin) for name in names)]:
        wrapper += found[0]
    return wrapper


def with_averages(stored: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """Tensors whose moving averages stand in their places; averages of nothing that is there stay what they are.

    Args:
        stored: by upstream's key.
        prefix: what stands before the name of an average, the tensor's own without its dots.

    Raises:
        ValueError: an average that could be that of two tensors.
    """
    averages = {key.removeprefix(prefix): key for key in stored if key.startswith(prefix)}
    found = {key: tensor for key, tensor in stored.items() if key not in averages.values()}
    owners: dict[str, str] = {}
    for key, tensor in stored.items():
        if key not in found or (name := key.replace(".", "")) not in averages:
            continue
        if name in owners:
            raise ValueError(f"{averages[name]!r} could be the average of {owners[name]!r} and of {key!r}.")
        owners[name] = key
        average = stored[averages[name]]
        found[key] = replace(average, name=tensor.name, average=average.name)
    return found | {key: stored[key] for name, key in averages.items() if name not in owners}


def _weight_files(place: Path, optional: bool, *, others: set[Path]) -> list[Path]:
    """The file itself, or the shards or the one file of a folder, apart from `others`."""
    if place.is_file():
        return [place]
    for suffix in SUFFIXES if place.is_dir() else ():
        for name in NAMES:
            index = place / f"{name}{suffix}.index.json"
            if index.is_file():
                return _shards(index)
            if (place / f"{name}{suffix}").is_file():
                return [place / f"{name}{suffix}"]
    here = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES) if place.is_dir() else []
    here = [file for file in here if file not in others]
    if len(here) > 1:
        raise ValueError(
            f"{place} has {', '.join(file.name for file in here)}, and each could be the weights; leave one of them "
            f"there or name it {NAMES[0]}{here[0].suffix}. Shards need their .index.json."
        )
    if here or optional:
        return here
    if place.is_dir():
        raise FileNotFoundError(
            f"{place} has no weights; they are looked for in one file that ends in {', '.join(SUFFIXES)}, or in shards "
            "with an .index.json."
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


def _listed(file: Path, inside: tuple[tuple[str, ...], ...]) -> list[StoredTensor]:
    if file.suffix != ".safetensors":
        keys, state = _state_dict(file, inside)
        return [StoredTensor(file, name, tuple(t.shape), t.dtype, keys) for name, t in state.items()]
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, a reader is no mapping
            return [
                StoredTensor(file, name, tuple(part.get_shape()), DTYPES[part.get_dtype()])
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{file} is not a safetensors file, or is cut short: {error}") from error


def _state_dict(file: Path, inside: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], Mapping[str, torch.Tensor]]:
    """The named tensors of a pickle, and the keys of the mappings around them."""
    whole = _last_unpickled(file, file.stat().st_mtime_ns)
    for keys in (*inside, ()):
        state = _within(whole, keys)
        if isinstance(state, Mapping) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
            return keys, state
    kind = ", ".join(map(repr, list(whole)[:8])) if isinstance(whole, Mapping) else type(whole).__name__
    places = " or ".join(["at its top", *(f"under {'.'.join(keys)!r}" for keys in inside)])
    raise ValueError(
        f"{file} holds something else than named tensors {places}: {kind}. Save its state dict with "
        "safetensors.torch.save_file."
    )


def _within(whole: Any, keys: tuple[str, ...]) -> Any:
    """What stands in nested mappings at a path of keys; None where it leads nowhere."""
    for key in keys:
        whole = whole.get(key) if isinstance(whole, Mapping) else None
    return whole


@lru_cache(maxsize=1)
def _last_unpickled(file: Path, _written_at: int) -> Any:
    """As `unpickled`; kept, since a checkpoint is unpickled whole for each of its hundreds of tensors otherwise."""
    return unpickled(file)


def unpickled(file: Path) -> Any:
    """What a .bin, .pt, .pth or .ckpt file holds: tensors, mapped where the format allows it, and plain containers.

    Arguments of a command line, which training scripts store beside their weights, count as such a container.

    Raises:
        ValueError: a file that would run code, or is damaged.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:  # the format of before torch 1.6 cannot be mapped
                if "mmap" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {foreign[1]}" if foreign else str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{file} can run code when it is read, or is damaged, so it is not read ({reason}). Where "
            "you trust it, read it in upstream's environment and save the state dict with safetensors.torch.save_file."
        ) from error
