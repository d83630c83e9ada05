"""The act of conversion: list upstream's tensors, rename every key, check both sides, write a model shard by shard.

Nothing is read of a tensor but its name, shape and type until everything is known to fit; then one is in memory at a
time. A conversion that is killed goes on with the shards that it wrote; one that fails leaves nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from unimm.codec import VisualCodecImageProcessor, VisualCodecModel
from unimm.conversion.registry import find_upstream
from unimm.conversion.shards import SHARD_BYTES, Output, write_weights
from unimm.conversion.upstream import CODEC, Plan, Rename, Upstream, UpstreamConfig
from unimm.conversion.weights import StoredTensor, stored_tensors, with_averages
from unimm.files import resumable_directory
from unimm.unified import UniMMForConditionalGeneration

RECORD = "conversion.json"
SHOWN = 5  # keys named in an error
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Piece:
    """An upstream tensor, and the rule that makes it a part of one of ours."""

    key: str
    stored: StoredTensor
    rule: Rename

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        empty = torch.empty(self.stored.shape, device="meta")
        return tuple((empty if self.rule.change is None else self.rule.change(empty)).shape)

    def read(self) -> torch.Tensor:
        """The part."""
        tensor = self.stored.read()
        return tensor if self.rule.change is None else self.rule.change(tensor)


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Args:
        upstream: the system and its licence.
        target: the saved model.
        converted: how many tensors went over.
        averaged: how many of them are moving averages, which stand for the weights of the last step.
        dropped: keys without effect that stayed behind.
        unread: arguments of a codec's configuration that nothing here reads: those of training, or misspelt ones.
        codes: what the model makes of a picture, or has for one, in words.
    """

    upstream: Upstream
    target: Path
    converted: int
    averaged: int
    dropped: tuple[str, ...]
    unread: tuple[str, ...]
    codes: str

    def __str__(self) -> str:
        lines = [
            f"{self.upstream.system}: {self.upstream.repository}, {self.upstream.paper}",
            f"licence of the code and weights: {self.upstream.licence}",
            f"{self.converted} tensors converted, {len(self.dropped)} without effect left behind",
            *([f"{self.averaged} of them are moving averages of the weights"] if self.averaged else []),
            *(f"  {key}" for key in self.dropped),
            *([f"arguments that nothing reads: {', '.join(self.unread)}"] if self.unread else []),
            self.codes,
            str(self.target),
        ]
        return "\n".join(lines)


def convert(
    system: str,
    source: str | Path,
    target: str | Path,
    *,
    accept_licence: bool = False,
    detokenizer: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Turn upstream's `config.json` and weights in `source` into a saved model in `target`.

    Args:
        system: name of the upstream.
        source: its files; weights are safetensors or pickles of tensors and plain containers, in one file of any name
            or in shards.
        target: a new folder.
        accept_licence: for a restricted licence.
        detokenizer: folder of the diffusion model that a whole system draws with, where upstream keeps it apart.
        shard_bytes: a file of weights is split beyond that size.

    Raises:
        ValueError: unknown system, a restricted licence that was not accepted, a configuration or weights that do not
            fit the system, a detokenizer of a tokenizer alone, a target that exists, or a disk without room.
        FileNotFoundError: a file is missing.
    """
    upstream, source, target = find_upstream(system), Path(source), Path(target)
    if upstream.restricted and not accept_licence:
        raise ValueError(
            f"{upstream.system} is published under: {upstream.licence}. Read it in {upstream.repository}; "
            "if its terms suit you, say so with --accept-licence."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a new folder for the converted model.")
    fields = upstream.read(source)
    config = UpstreamConfig(fields, source, None if detokenizer is None else Path(detokenizer))
    plan = _plan(upstream, config)
    if detokenizer is not None and plan.model_class is VisualCodecModel:
        raise ValueError(f"{system} is a tokenizer alone, which no detokenizer goes along with: leave it out.")
    stored = stored_tensors(source, plan.files)
    if plan.averages:
        stored = with_averages(stored, plan.averages)
    _check_parts(plan, stored)
    pieces, dropped = rename(plan, stored, frozenset(fields.get("keys_without_effect_on_stored_outputs", ())))
    model = _fitting_model(plan, pieces)
    outputs = [_output(plan, name, pieces[name]) for name in sorted(pieces)]
    _check_room(target, sum(output.size for output in outputs))
    record = {
        "system": upstream.system,
        "repository": upstream.repository,
        "licence": upstream.licence,
        "paper": upstream.paper,
        "dropped": dropped,
        "config": dict(fields),
        "tensors": _where_tensors_lie(source, stored, dropped),
    }
    with _told_when_full(target), resumable_directory(target, _fingerprint(record, stored, shard_bytes)) as folder:
        write_weights(folder, outputs, shard_bytes=shard_bytes)
        _write_configuration(plan, model, outputs, folder)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    averaged = sum(bool(tensor.average) for key, tensor in stored.items() if key not in dropped)
    unread = tuple(config.unread) if plan.model_class is VisualCodecModel else ()
    converted = len(stored) - len(dropped)
    return Report(upstream, target, converted, averaged, tuple(dropped), unread, _summary(model))


def rename(
    plan: Plan, stored: Mapping[str, StoredTensor], listed: frozenset[str] = frozenset()
) -> tuple[dict[str, list[Piece]], list[str]]:
    """The parts of each of our tensors, in order, and the upstream keys that are left behind.

    Args:
        plan: of the checkpoint.
        stored: upstream's tensors.
        listed: keys that the source itself lists as without effect; they are dropped where no rule takes them.

    Raises:
        ValueError: a key that no rule takes, or two keys with one target.
    """
    parts: dict[str, dict[int, Piece]] = {}
    dropped, unmapped = [], []
    for key, tensor in stored.items():
        rules = [(rule, match) for rule in plan.renames if (match := re.fullmatch(rule.pattern, key))]
        if any(re.fullmatch(pattern, key) for pattern in plan.without_effect) or (not rules and key in listed):
            dropped.append(key)
        elif constants := [value for pattern, value in plan.constants.items() if re.fullmatch(pattern, key)]:
            values = tensor.read()
            if not bool((values == constants[0]).all()):
                raise ValueError(
                    f"{key!r} holds {values.flatten().tolist()}; this converter knows {constants[0]} only."
                )
        elif not rules:
            unmapped.append(key)
        else:
            rule, match = rules[0]
            target, place = match.expand(rule.target), rule.part or 0
            if place in parts.setdefault(target, {}):
                raise ValueError(f"Key {key!r} becomes {target!r}, as another key did; these are not its weights.")
            parts[target][place] = Piece(key, tensor, rule)
    if unmapped:
        raise ValueError(f"No rule takes {_named(unmapped)}. Are these weights of another system?")
    pieces = {target: [found[place] for place in sorted(found)] for target, found in parts.items()}
    return pieces | {copy: pieces[target] for copy, target in plan.copies.items() if target in pieces}, dropped


def _check_parts(plan: Plan, stored: Mapping[str, StoredTensor]) -> None:
    lacking = {begin: part for begin, part in plan.parts.items() if not any(key.startswith(begin) for key in stored)}
    if lacking:
        shown = ", ".join(f"{begin + '*'!r} ({part})" for begin, part in lacking.items())
        raise ValueError(f"The weights have no {shown}; add these tensors to them under those names.")


def _fitting_model(plan: Plan, pieces: Mapping[str, list[Piece]]) -> PreTrainedModel:
    """The model without its weights, once the pieces are known to be just these."""
    with torch.device("meta"):
        model = plan.model_class(plan.config)
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() - pieces.keys()):
        raise ValueError(f"The weights lack what becomes {_named(missing)}. Do they belong to this config.json?")
    if surplus := sorted(pieces.keys() - wanted.keys()):
        raise ValueError(f"The configuration has no place for {_named(surplus)}. Do the weights belong to it?")
    for name, tensor in wanted.items():
        if (shape := _stacked_shape(pieces[name])) != tuple(tensor.shape):
            raise ValueError(
                f"{name} is {shape} in the weights and {tuple(tensor.shape)} by config.json; "
                "the two do not belong together."
            )
    return model


def _stacked_shape(pieces: list[Piece]) -> tuple[int, ...]:
    shapes = [piece.shape for piece in pieces]
    if len(shapes) == 1:
        return shapes[0]
    axis = pieces[0].rule.axis
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


def _output(plan: Plan, name: str, pieces: list[Piece]) -> Output:
    def parts() -> Iterator[torch.Tensor]:
        if pieces[0].rule.axis == 0:
            yield from (piece.read() for piece in pieces)
        else:
            yield torch.cat([piece.read() for piece in pieces], dim=pieces[0].rule.axis)

    return Output(name, _stacked_shape(pieces), plan.dtype(name, pieces[0].stored.dtype), parts)


def _check_room(target: Path, needed: int) -> None:
    existing = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"The converted weights take {needed / 1e9:.1f} GB and the disk of {target} has {free / 1e9:.1f} GB left; "
            "make room, or name a folder on another disk."
        )


@contextmanager
def _told_when_full(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise ValueError(
            f"The disk of {target} is full ({error.strerror}); nothing was left on it. Make room and convert again."
        ) from error


def _where_tensors_lie(
    source: Path, stored: Mapping[str, StoredTensor], dropped: list[str]
) -> dict[str, dict[str, Any]]:
    """For the way back: file, name, type and shape of every upstream tensor that went over."""
    return {
        key: {
            "file": str(tensor.file.relative_to(source)),
            "inside": list(tensor.inside),
            "name": tensor.name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            **({"average": tensor.average} if tensor.average else {}),
        }
        for key, tensor in stored.items()
        if key not in dropped
    }


def _fingerprint(record: dict[str, Any], stored: Mapping[str, StoredTensor], shard_bytes: int) -> str:
    """Digest of what is converted: an unfinished conversion goes on only where nothing of it has changed."""
    stats = {str(file): file.stat() for file in sorted({tensor.file for tensor in stored.values()})}
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
    return hashlib.sha256(json.dumps([record, files, shard_bytes]).encode()).hexdigest()


def _write_configuration(plan: Plan, model: PreTrainedModel, outputs: list[Output], folder: Path) -> None:
    """What `save_pretrained` writes beside weights, which were written already."""
    config = model.config
    config.architectures = [type(model).__name__]
    floats = [o.dtype for o in outputs if o.dtype.is_floating_point and not o.name.startswith(CODEC)]
    config.dtype = floats[0]
    config.save_pretrained(folder)
    if isinstance(model, VisualCodecModel) and model.config.reads_pixels:
        processor = VisualCodecImageProcessor.for_codec(model.config, plan.any_shape, stretch=plan.stretch)
        processor.save_pretrained(folder)
    if plan.finish is not None:
        plan.finish(folder)


def _summary(model: PreTrainedModel) -> str:
    if isinstance(model, UniMMForConditionalGeneration):
        config = model.config
        layers = config.text_config.num_hidden_layers
        vision = f"{config.vision_layers_before} + {config.vision_layers_after} of {layers} layers for pictures only"
        return f"{config.image_token_offset} text rows, {config.codebook_sizes} codes, {vision}"
    assert isinstance(model, VisualCodecModel)
    spec = model.spec_without_fingerprint
    codes = f"{' x '.join(map(str, spec.sizes))} codes" if spec.sizes else f"{spec.dim} continuous channels"
    return f"{spec.layout} of at most {spec.max_length} positions, {codes} each"


def _plan(upstream: Upstream, config: UpstreamConfig) -> Plan:
    named = config.fields.get("system", upstream.system)
    if find_upstream(str(named)) is not upstream:
        raise ValueError(f"config.json is of {named!r}, not of {upstream.system!r}; convert it as {named!r}.")
    return upstream.plan(config)


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(map(repr, keys[:SHOWN])) + more
