"""Layers and a norm for picture positions, inside any text model whose body is a list of decoder layers.

X-Omni (2507.22058) gives pictures layers of their own before and after those of its language model. They attend over
every position and change picture positions only, so text passes through them as it came. A layer stays a stock layer of
the text model's family, with its weights under the stock names and its place in the cache.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class VisionOnly(nn.Module):
    """What a vision-only layer adds to a stock decoder layer, which comes next in the order of its bases.

    A subclass rather than a wrapper: hooks that record hidden states, checkpointing and sharding find layers by class.
    """

    def forward(self, hidden_states: torch.Tensor, *, image_positions: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """States `[B, T, D]`, changed where `image_positions` `[B, T]` is set; the rest is what the layer takes."""
        changed = super().forward(hidden_states, **kwargs)
        return torch.where(image_positions[..., None], changed, hidden_states)


class ModalityNorm(nn.Module):
    """Two final norms, one for text positions and one for picture positions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.text = norm
        self.image = copy.deepcopy(norm)

    def forward(self, hidden_states: torch.Tensor, image_positions: torch.Tensor) -> torch.Tensor:
        """States `[B, T, D]`, each under the norm of its position; `image_positions` is bool `[B, T]`."""
        return torch.where(image_positions[..., None], self.image(hidden_states), self.text(hidden_states))


@cache
def vision_only(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The vision-only class of a decoder layer's class."""
    return type(f"VisionOnly{layer_class.__name__}", (VisionOnly, layer_class), {})


def add_vision_layers(language_model: PreTrainedModel, *, before: int, after: int) -> None:
    """Turn the first and the last layers of a body into vision-only ones, with new weights.

    Raises:
        ValueError: the body has no list of layers.
    """
    layers = _child(language_model, "layers")
    assert isinstance(layers, nn.ModuleList)
    for index in (*range(before), *range(len(layers) - after, len(layers))):
        stock: Any = type(layers[index])
        layers[index] = vision_only(stock)(language_model.config, index)
        language_model._no_split_modules.add(vision_only(stock).__name__)


def later_layers(state: Mapping[str, torch.Tensor], by: int) -> dict[str, torch.Tensor]:
    """The weights of a body whose layers stand `by` places later in another."""

    def later(match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) + by}."

    return {re.sub(r"^layers\.(\d+)\.", later, name): weight for name, weight in state.items()}


def split_norm(language_model: PreTrainedModel) -> ModalityNorm:
    """Take the final norm out of a body, whose states then leave it as they are, and make two of it.

    Raises:
        ValueError: the body has no final norm of that name.
    """
    norm = ModalityNorm(_child(language_model, "norm"))
    language_model.set_submodule("norm", nn.Identity())
    return norm


def _child(language_model: PreTrainedModel, name: str) -> nn.Module:
    children = dict(language_model.named_children())
    if name not in children:
        raise ValueError(
            f"A text model of type {language_model.config.model_type!r} has the parts {', '.join(children)} and no "
            f"{name!r}, which a vision path needs; choose one built like llama or qwen2, or set vision_layers_before, "
            "vision_layers_after and vision_norm to none."
        )
    return children[name]
