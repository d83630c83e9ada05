"""Strict YAML to dataclass: a recipe is a file, `key=value` overrides it, and an unknown key is an error.

A dataclass lives beside the code that reads it; this module only fills it. Fields are scalars, dataclasses, tuples or
dicts of either, or `X | None`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read `path` into `cls`, after applying `overrides` such as `optimizer.lr=1e-3`.

    Raises:
        ValueError: the file is not a YAML mapping, or a key or value does not fit `cls`.
        FileNotFoundError, IsADirectoryError: there is no such file.
    """
    data = read_yaml(path)
    for override in overrides:
        set_by_path(data, override)
    return from_dict(cls, data, where=str(path))


def did_you_mean(name: str, names: Iterable[str], *, n: int = 3, cutoff: float = 0.6) -> str:
    """The sentence of an error that proposes up to `n` near names, behind a space; empty where none is near.

    Args:
        cutoff: how near they must be, from 0, anything, to 1, equal.
    """
    near = difflib.get_close_matches(name, list(names), n=n, cutoff=cutoff)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or ValueError naming the file."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a YAML mapping of keys to values, it holds {type(data).__name__}.")
    return data


def set_by_path(data: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` override in place; the value is parsed as YAML."""
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"Override {override!r} has no '='; write key=value, for example optimizer.lr=1e-3.")
    *parents, leaf = key.strip().split(".")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"Override {override!r}: {parent!r} is a value, not a group of keys.")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Override {override!r} has no YAML behind '=' ({reason}); close what it opens.") from error


def from_dict(cls: type[T], data: Mapping[str, Any], *, where: str = "config") -> T:
    """Build the dataclass `cls`, recursing into nested dataclasses; unknown and missing keys are errors."""
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            hint = did_you_mean(str(key), fields, n=1)
            raise ValueError(f"{where}: unknown key {key!r}.{hint} Known keys: {', '.join(fields)}.")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in data]:
        raise ValueError(f"{where}: missing key {', '.join(map(repr, missing))}.")
    values = {key: _coerce(value, hints[key], f"{where}: {key}") for key, value in data.items()}
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain form that `from_dict` reads back: dicts, lists and scalars."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _coerce(value, inner, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a group of keys, it is {value!r}.")
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin is tuple:
        return _coerce_tuple(value, args, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, it is {value!r}.")
        keys = [_coerce_scalar(key, args[0], f"{where}: a key") for key in value]
        return {key: _coerce(value[key], args[1], f"{where}.{key}") for key in keys}
    return _coerce_scalar(value, hint, where)


def _coerce_tuple(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} must be a list, it is {value!r}.")
    if args[-1] is Ellipsis:
        return tuple(_coerce(item, args[0], where) for item in value)
    if len(value) != len(args):
        raise ValueError(f"{where} must have {len(args)} items, it is {value!r}.")
    return tuple(_coerce(item, arg, where) for item, arg in zip(value, args, strict=True))


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is Any:
        return value
    # YAML 1.1 reads 1e-3 as a string.
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} must be {hint.__name__}, it is {value!r}.")
