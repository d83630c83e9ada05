"""What a map file says about an upstream: its licence, our configuration of its model, its keys under our names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from unimm.codec import VisualCodecConfig, VisualCodecModel
from unimm.unified import UniMMConfig

CODEC = "model.visual."  # where the unified model holds its codec
LEAVES = "(?P<leaf>weight|bias)"
REQUIRED = object()


@dataclass(frozen=True)
class Rename:
    """One rule.

    Args:
        pattern: regular expression that a whole upstream key must match.
        target: our key, with the groups of the pattern.
        change: how the tensor changes, where its layout differs from ours.
        part: where several upstream tensors are stacked into one of ours, the place of this one.
        axis: along which they are.
    """

    pattern: str
    target: str
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    part: int | None = None
    axis: int = 0


@dataclass(frozen=True)
class WeightFile:
    """Where weights of an upstream lie.

    Args:
        path: a file, or a folder with one file or an index of shards; relative to the source.
        prefix: what is put before its keys, to tell those of several files apart.
        inside: keys of the mappings around the tensors of a pickle; of several such paths, the first that is there. A
            pickle of nothing but tensors is taken as it is.
        optional: whether it may be missing.
    """

    path: str = ""
    prefix: str = ""
    inside: tuple[tuple[str, ...], ...] = ()
    optional: bool = False


LIGHTNING_FILES = (WeightFile(inside=(("state_dict",),)),)  # a checkpoint of PyTorch Lightning


@dataclass(frozen=True)
class Plan:
    """One checkpoint.

    Args:
        config: the codec or the language model it becomes.
        renames: every key with an effect matches exactly one of them.
        without_effect: patterns of keys that no output depends on.
        constants: patterns of keys that our model holds as options, and the value that every number there must have.
        any_shape: how pictures are resized where they keep their shape; None for squares of the codec's own size.
        stretch: whether pictures are stretched to that square rather than cropped.
        model_class: what is built from the configuration.
        files: where the weights lie.
        averages: what stands before the names of moving averages of weights, the weights' own names without dots; they
            are converted instead of the weights that have one.
        copies: tensors of ours that are another one of ours, where upstream's share one.
        parts: beginnings of upstream keys that a checkpoint may lack as a whole, and what stands under them.
        finish: writes what goes beside the model, into the folder that it is given.
    """

    config: VisualCodecConfig | UniMMConfig
    renames: tuple[Rename, ...]
    without_effect: tuple[str, ...] = ()
    constants: Mapping[str, float] = field(default_factory=dict)
    any_shape: dict[str, Any] | None = None
    stretch: bool = False
    model_class: type[PreTrainedModel] = VisualCodecModel
    files: tuple[WeightFile, ...] = (WeightFile(),)
    averages: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[Path], None] | None = None

    def dtype(self, target: str, upstream: torch.dtype) -> torch.dtype:
        """Of a weight of ours: float32 in a codec, since rounding moves its codes, and upstream's own elsewhere."""
        in_codec = self.model_class is VisualCodecModel or target.startswith(CODEC)
        return torch.float32 if in_codec and upstream.is_floating_point else upstream


def read_config(source: Path) -> dict[str, Any]:
    """Upstream's `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
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


@dataclass(frozen=True)
class Upstream:
    """A published system.

    Args:
        system: its name in `unimm convert`.
        repository, licence, paper: where it comes from and under which terms.
        plan: reads the upstream configuration.
        restricted: whether the licence must be accepted by a flag.
        aliases: further names.
        read: upstream's configuration, from the folder of its files.
        restore_rest: writes what lies beside the model back; takes upstream's configuration, the converted model's
            folder and the target.
    """

    system: str
    repository: str
    licence: str
    paper: str
    plan: Callable[[UpstreamConfig], Plan]
    restricted: bool = False
    aliases: tuple[str, ...] = ()
    read: Callable[[Path], dict[str, Any]] = read_config
    restore_rest: Callable[[dict[str, Any], Path, Path], None] | None = None


class UpstreamConfig:
    """Upstream's `config.json`: constructor arguments, and sizes that its code holds as literals.

    The arguments are the whole file, or what stands under `args` in it; `patched_literals` then names the literals that
    were changed. A number without a fraction is whole, however it is spelled.

    Args:
        fields: what the file holds.
        folder: that it lies in, with upstream's other files.
        detokenizer: folder of the diffusion model that draws the pixels, where upstream keeps it apart.
    """

    def __init__(self, fields: Mapping[str, Any], folder: Path = Path(), detokenizer: Path | None = None) -> None:
        self.fields: Mapping[str, Any] = _whole_numbers(fields)
        self.folder, self.detokenizer = folder, detokenizer
        self.args: Mapping[str, Any] = self.fields.get("args", self.fields)
        patched = self.fields.get("patched_literals", {})
        self._literals: Mapping[str, Any] = patched if isinstance(patched, Mapping) else {}
        self._read: set[str] = set()

    def get(self, path: str, default: Any = REQUIRED) -> Any:
        """The argument at a dotted path.

        Raises:
            ValueError: it is not there, or null, and has no default.
        """
        self._read.add(path)
        return _at(self.args, path, default)

    @property
    def unread(self) -> list[str]:
        """Dotted paths of arguments that nothing has asked for, which no model depends on, or are misspelt."""
        paths = _leaves(self.args)
        return [path for path in paths if not any(f"{path}.".startswith(f"{read}.") for read in self._read)]

    def require(self, values: Mapping[str, Any]) -> None:
        """Check arguments, by dotted path, that have one value in every published model; absent ones have it.

        Raises:
            ValueError: one has another.
        """
        for path, value in values.items():
            if self.get(path, value) != value:
                raise ValueError(f"{path} is not {value}; only models with {value} are converted.")

    def field(self, path: str, default: Any = REQUIRED) -> Any:
        """A value of the file itself, beside the arguments."""
        return _at(self.fields, path, default)

    def literal(self, name: str, upstream: Any) -> Any:
        """A size, or a group of sizes, that upstream's code holds as `upstream`."""
        return _here(self._literals.get(name, upstream))


def separate_or_one(folder: Path, *separate: WeightFile) -> tuple[WeightFile, ...]:
    """Upstream's separate files, where the first of them is in the folder, and one file of all weights where not."""
    return separate if (folder / separate[0].path).is_file() else (WeightFile(),)


def _whole_numbers(node: Any) -> Any:
    """The same, with `int` for every number that has no fraction: JSON has one kind of number, and sizes are counts."""
    if isinstance(node, Mapping):
        return {name: _whole_numbers(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_whole_numbers(value) for value in node]
    return int(node) if isinstance(node, float) and node.is_integer() else node


def _here(value: Any) -> Any:
    """What a literal is, of `{"upstream": what it was, "here": what it is}`, also of each member of a group."""
    if not isinstance(value, Mapping):
        return value
    return value["here"] if "here" in value else {name: _here(member) for name, member in value.items()}


def _leaves(node: Mapping[str, Any], way: str = "") -> list[str]:
    paths = []
    for name, value in node.items():
        paths += _leaves(value, f"{way}{name}.") if isinstance(value, Mapping) else [f"{way}{name}"]
    return paths


def _at(node: Any, path: str, default: Any) -> Any:
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            if default is REQUIRED:
                raise ValueError(f"config.json has no {path!r}, which this system's configuration needs.")
            return default
        node = node[name]
    if node is None and default is REQUIRED:
        raise ValueError(f"{path!r} is null in config.json; this system's configuration needs a value.")
    return node


def under(source: str, target: str, names: Mapping[str, str]) -> tuple[Rename, ...]:
    """A rule per name for the weights and biases below `source`, a pattern whose groups `target` may use."""
    return tuple(
        Rename(rf"{source}\.{theirs}\.{LEAVES}", rf"{target}.{ours}.\g<leaf>") for theirs, ours in names.items()
    )


def kernel_of_points(weight: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution's `[out, in, 1, 1]` as one over positions, `[out, in, 1]`."""
    return weight[..., 0]


def kernel_of_lines(weight: torch.Tensor) -> torch.Tensor:
    """A linear map's `[out, in]` as a convolution over positions, `[out, in, 1]`."""
    return weight[..., None]


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution's `[out, in, 1, 1]` as a linear map's `[out, in]`."""
    return weight[..., 0, 0]


def first(tensor: torch.Tensor) -> torch.Tensor:
    """`[1, ...]` without its leading axis."""
    return tensor[0]


def blocks_last_to_first(rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows ordered (row in block, column in block, channel) to PyTorch's pixel shuffle order (channel, row, column)."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        split = tensor.unflatten(0, (rows, rows, -1))
        return split.movedim(2, 0).flatten(0, 2).contiguous()

    return change


def kernel_of_blocks(rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear map of blocks ordered (row in block, column in block, channel), `[out, rows * rows * C]`, as a strided
    convolution, `[out, C, rows, rows]`.
    """

    def change(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(1, (rows, rows, -1)).movedim(3, 1).contiguous()

    return change


def kernel_of_channels(rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear map of blocks ordered (channel, row in block, column in block), `[out, C * rows * rows]`, as a strided
    convolution, `[out, C, rows, rows]`.
    """

    def change(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(1, (-1, rows, rows))

    return change


def cells_of_grid(table: torch.Tensor) -> torch.Tensor:
    """Positions `[1, D, rows, columns]` in raster order, `[rows * columns, D]`."""
    return table[0].flatten(1).T.contiguous()
