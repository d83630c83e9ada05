"""The act of conversion: read safetensors, rename every key, check both sides, write a saved model at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from unimm.codec import VisualCodecImageProcessor, VisualCodecModel
from unimm.conversion.registry import find_upstream
from unimm.conversion.upstream import Plan, Upstream, UpstreamConfig
from unimm.files import atomic_directory
from unimm.unified import UniMMForConditionalGeneration

WEIGHTS = "weights.safetensors"
SHOWN = 5  # keys named in an error


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Args:
        upstream: the system and its licence.
        target: the saved model.
        converted: how many tensors went over.
        dropped: keys without effect that stayed behind.
        codes: what the model makes of a picture, or has for one, in words.
    """

    upstream: Upstream
    target: Path
    converted: int
    dropped: tuple[str, ...]
    codes: str

    def __str__(self) -> str:
        lines = [
            f"{self.upstream.system}: {self.upstream.repository}, {self.upstream.paper}",
            f"licence of the code and weights: {self.upstream.licence}",
            f"{self.converted} tensors converted, {len(self.dropped)} without effect left behind",
            *(f"  {key}" for key in self.dropped),
            self.codes,
            str(self.target),
        ]
        return "\n".join(lines)


def convert(system: str, source: str | Path, target: str | Path, *, accept_licence: bool = False) -> Report:
    """Turn upstream's `config.json` and `weights.safetensors` in `source` into a saved model in `target`.

    Raises:
        ValueError: unknown system, a restricted licence that was not accepted, a configuration or weights that do not
            fit the system, or a target that exists.
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
    plan = _plan(upstream, _read_config(source))
    weights, dropped = rename(plan, _read_weights(source), _listed_without_effect(source))
    model = _fill(plan, weights)
    with atomic_directory(target) as folder:
        model.save_pretrained(folder)
        if isinstance(model, VisualCodecModel) and model.config.reads_pixels:
            VisualCodecImageProcessor.for_codec(model.config, plan.any_shape).save_pretrained(folder)
        record = {
            "system": upstream.system,
            "repository": upstream.repository,
            "licence": upstream.licence,
            "paper": upstream.paper,
            "dropped": dropped,
        }
        (folder / "conversion.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Report(upstream, target, len(weights), tuple(dropped), _summary(model))


def rename(
    plan: Plan, weights: Mapping[str, torch.Tensor], listed: frozenset[str] = frozenset()
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Upstream's tensors under our names, and the keys that were left behind.

    Args:
        plan: of the checkpoint.
        weights: upstream's.
        listed: keys that the source itself lists as without effect; they are dropped where no rule takes them.

    Raises:
        ValueError: a key that no rule takes, or two keys with one target.
    """
    parts: dict[str, dict[int, torch.Tensor]] = {}
    axes: dict[str, int] = {}
    dropped, unmapped = [], []
    for key, tensor in weights.items():
        rules = [(rule, match) for rule in plan.renames if (match := re.fullmatch(rule.pattern, key))]
        if any(re.fullmatch(pattern, key) for pattern in plan.without_effect) or (not rules and key in listed):
            dropped.append(key)
        elif constants := [value for pattern, value in plan.constants.items() if re.fullmatch(pattern, key)]:
            if not bool((tensor == constants[0]).all()):
                raise ValueError(
                    f"{key!r} holds {tensor.flatten().tolist()}; this converter knows {constants[0]} only."
                )
        elif not rules:
            unmapped.append(key)
        else:
            rule, match = rules[0]
            target, place = match.expand(rule.target), rule.part or 0
            axes[target] = rule.axis
            if place in parts.setdefault(target, {}):
                raise ValueError(f"Key {key!r} becomes {target!r}, as another key did; these are not its weights.")
            parts[target][place] = (tensor if rule.change is None else rule.change(tensor)).to(
                plan.dtype or tensor.dtype
            )
    if unmapped:
        raise ValueError(f"No rule takes {_named(unmapped)}. Are these weights of another system?")
    ours = {target: _stacked(found, axes[target]) for target, found in parts.items()}
    return ours, dropped


def _stacked(parts: dict[int, torch.Tensor], axis: int) -> torch.Tensor:
    tensors = [parts[place] for place in sorted(parts)]
    return torch.cat(tensors, dim=axis) if len(tensors) > 1 else tensors[0].contiguous()


def _summary(model: PreTrainedModel) -> str:
    if isinstance(model, UniMMForConditionalGeneration):
        config = model.config
        layers = config.text_config.num_hidden_layers
        vision = f"{config.vision_layers_before} + {config.vision_layers_after} of {layers} layers for pictures only"
        return f"{config.image_token_offset} text rows, {config.codebook_sizes} codes, {vision}"
    assert isinstance(model, VisualCodecModel)
    spec = model.spec_without_fingerprint
    return f"{spec.layout} of at most {spec.max_length} positions, {' x '.join(map(str, spec.sizes))} codes each"


def _fill(plan: Plan, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    with torch.device("meta"):  # every weight comes from upstream
        model = plan.model_class(plan.config).eval()
    wanted = model.state_dict()
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(f"The weights lack what becomes {_named(missing)}. Do they belong to this config.json?")
    if surplus := sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"The configuration has no place for {_named(surplus)}. Do the weights belong to it?")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the weights and {tuple(wanted[name].shape)} by config.json; "
                "the two do not belong together."
            )
    model.load_state_dict(weights, assign=True)
    return model


def _plan(upstream: Upstream, fields: Mapping[str, Any]) -> Plan:
    named = fields.get("system", upstream.system)
    if find_upstream(str(named)) is not upstream:
        raise ValueError(f"config.json is of {named!r}, not of {upstream.system!r}; convert it as {named!r}.")
    return upstream.plan(UpstreamConfig(fields))


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no config.json; put upstream's configuration there under that name.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds {type(fields).__name__}.")
    return fields


def _listed_without_effect(source: Path) -> frozenset[str]:
    return frozenset(_read_config(source).get("keys_without_effect_on_stored_outputs", ()))


def _read_weights(source: Path) -> dict[str, torch.Tensor]:
    path = source / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} has no {WEIGHTS}. A .pt, .ckpt or .bin file can run code when it is read, so none is read here: "
            "save its state dict with safetensors.torch.save_file under that name."
        )
    try:
        return load_file(path)
    except Exception as error:  # the reader's own error type is not public
        raise ValueError(f"{path} is not a safetensors file, or is cut short: {error}") from error


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(map(repr, keys[:SHOWN])) + more
