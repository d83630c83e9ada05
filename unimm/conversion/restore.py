"""The way back: a converted model as upstream's `config.json` and weights, bit by bit.

A conversion only moves numbers, so its rules say where each of them came from: a rule is applied to the numbers' places
instead of to the numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from unimm.conversion.convert import RECORD, Piece, rename
from unimm.conversion.registry import find_upstream
from unimm.conversion.shards import Output, write_weights
from unimm.conversion.upstream import UpstreamConfig, WeightFile
from unimm.conversion.weights import StoredTensor, stored_tensors
from unimm.files import atomic_directory, atomic_write


def restore(system: str, source: str | Path, target: str | Path) -> Path:
    """Write the model in `source`, converted from a system and perhaps trained further, in that system's layout.

    Keys that the conversion dropped, since nothing depends on them, stay dropped. Where a moving average was converted,
    it is written both as the average and as the weight.

    Raises:
        ValueError: an unknown system, a model of another one, or a target that exists.
        FileNotFoundError: the record of the conversion is missing.
    """
    upstream, source, target = find_upstream(system), Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a new folder for upstream's files.")
    if not (source / RECORD).is_file():
        raise FileNotFoundError(
            f"{source} has no {RECORD}, which says where the weights came from; copy it from the converted model that "
            "this one was trained from."
        )
    record = json.loads((source / RECORD).read_text(encoding="utf-8"))
    if record["system"] != upstream.system:
        raise ValueError(f"{source} was converted from {record['system']!r}; restore it as that.")
    plan = upstream.plan(UpstreamConfig(record["config"], source))
    theirs = {
        key: StoredTensor(Path(entry["file"]), entry["name"], tuple(entry["shape"]), getattr(torch, entry["dtype"]))
        for key, entry in record["tensors"].items()
    }
    constants = {
        key: value for pattern, value in plan.constants.items() for key in theirs if re.fullmatch(pattern, key)
    }
    pieces, _ = rename(plan, {key: tensor for key, tensor in theirs.items() if key not in constants})
    ours = stored_tensors(source, (WeightFile(),))
    outputs = {key: _constant(key, theirs[key], value) for key, value in constants.items()}
    for name, parts in pieces.items():
        if name in plan.copies:
            continue
        start = 0
        for piece in parts:
            length = piece.shape[piece.rule.axis] if len(parts) > 1 else None
            outputs[piece.key] = _output(piece, ours[name], start, length)
            start += length or 0
    with atomic_directory(target) as folder:
        for file in {entry["file"]: None for entry in record["tensors"].values()}:
            entries = {key: entry for key, entry in record["tensors"].items() if entry["file"] == file}
            state = [outputs[key] for key in entries]
            state += [replace(outputs[key], name=e["average"]) for key, e in entries.items() if "average" in e]
            _write_file(folder / file, state, next(iter(entries.values()))["inside"])
        (folder / "config.json").write_text(json.dumps(record["config"], indent=1) + "\n", encoding="utf-8")
        if upstream.restore_rest is not None:
            upstream.restore_rest(record["config"], source, folder)
    return target


def _constant(key: str, theirs: StoredTensor, value: float) -> Output:
    return Output(theirs.name, theirs.shape, theirs.dtype, lambda: iter((torch.full(theirs.shape, value),)))


def _output(piece: Piece, ours: StoredTensor, start: int, length: int | None) -> Output:
    """Upstream's tensor of a piece, from the stretch of our tensor that it became; all of it where it stands alone."""
    theirs = piece.stored

    def parts() -> Iterator[torch.Tensor]:
        whole = ours.read()
        yield _undone(piece, whole if length is None else whole.narrow(piece.rule.axis, start, length))

    return Output(theirs.name, theirs.shape, theirs.dtype, parts)


def _undone(piece: Piece, part: torch.Tensor) -> torch.Tensor:
    """The tensor that a rule changed into `part`."""
    if piece.rule.change is None:
        return part
    shape = piece.stored.shape
    places = piece.rule.change(torch.arange(1, prod(shape) + 1).view(shape))  # 0 where the rule adds a number
    if int((places > 0).sum()) < prod(shape):
        raise ValueError(
            f"{piece.key} is {tuple(shape)} upstream, and converting kept a part of it that is used; it cannot be made "
            "from the converted model. Keep upstream's file."
        )
    flat = part.new_empty(prod(shape))
    flat[places[places > 0] - 1] = part[places > 0]
    return flat.view(shape)


def _write_file(path: Path, outputs: list[Output], inside: list[str]) -> None:
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_weights(path.parent, outputs, name=path.stem, shard_bytes=sum(output.size for output in outputs))
        return
    state: Any = {o.name: next(o.parts()).to(o.dtype) for o in outputs}
    for key in reversed(inside):
        state = {key: state}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
