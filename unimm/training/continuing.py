"""A codec that is trained in stages: each goes on from what the one before it saved, and holds some of it still.

TiTok's second stage learns the decoder alone (2406.07550); VQRAE (2511.23386) and RPiAE (2603.19206) let an encoder
learn that is held near what it was.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec import VisualCodecConfig, VisualCodecModel, socket_config
from unimm.codec.configuration import SOCKETS, described
from unimm.codec.tower import TowerEncoderConfig
from unimm.config import did_you_mean

HELD = ("encoder", "resampler", "quantizer", "decoder")
SHOWN = 3  # weights named in an error


def continued_fields(begin: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Fields of the configuration of a saved codec with what is otherwise.

    Args:
        begin: its folder or Hub name; empty for none.
        changes: fields. Options of a socket stand beside those that it has, unless its `kind` is another.
    """
    if not begin:
        return described(changes)
    saved = VisualCodecConfig.from_pretrained(begin)
    names = ("image_size", "pixel_range", "pixel_mean", "pixel_std", "resize", "vae", *SOCKETS)
    fields = {name: getattr(saved, name) for name in names}
    for name, value in described(changes).items():
        same = name in SOCKETS and value.get("kind", fields[name]["kind"]) == fields[name]["kind"]
        fields[name] = fields[name] | value if same else value
    return fields


def continued(begin: str, changes: dict[str, Any]) -> VisualCodecModel:
    """A saved codec with what is otherwise; weights of a changed socket that do not fit it begin anew.

    Raises:
        ValueError: weights of another part do not fit.
    """
    if not begin:
        return VisualCodecModel.begin(**changes)
    codec, saved = VisualCodecModel(VisualCodecConfig(**continued_fields(begin, changes))), _weights(begin)
    own = codec.state_dict()
    fitting = {name: weight for name, weight in saved.items() if name in own and own[name].shape == weight.shape}
    lost = (own.keys() | saved.keys()) - fitting.keys()
    if alien := sorted(name for name in lost if name.partition(".")[0] not in changes):
        raise ValueError(
            f"begin is {begin}, whose weights do not fit {', '.join(alien[:SHOWN])}; only sockets that `model` names "
            "may be otherwise."
        )
    codec.load_state_dict(own | fitting)
    return codec


def _weights(begin: str) -> dict[str, torch.Tensor]:
    return VisualCodecModel.from_pretrained(begin).state_dict()


def check_held(held: tuple[str, ...], pivot: float, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where a codec has no such parts to hold, or no encoder that learns."""
    for name in held:
        if name not in HELD:
            raise ValueError(f"held names {name!r}; it may name {', '.join(HELD)}.{did_you_mean(name, HELD, n=1)}")
    if {*held} == {*HELD}:
        raise ValueError("held names every part; something must learn.")
    encoder = socket_config("encoder", codec.encoder)
    if pivot and ("encoder" in held or not isinstance(encoder, TowerEncoderConfig) or not encoder.learns):
        raise ValueError(
            f"pivot is {pivot:g}, and the encoder of kind {codec.encoder['kind']!r} stays as it is or begins as "
            "nothing; take kind: tower with learns: true, and leave it out of held."
        )


def hold(codec: VisualCodecModel, held: tuple[str, ...]) -> None:
    """Let a codec learn, apart from some of its parts, which work as they do in use."""
    codec.train()
    for name in held:
        getattr(codec, name).eval().requires_grad_(False)


class Pivot:
    """The encoder as it begins, which the one that learns is held near (RPiAE, 2603.19206)."""

    def __init__(self, codec: VisualCodecModel) -> None:
        self.encoder: nn.Module = deepcopy(codec.encoder).eval().requires_grad_(False)

    @torch.no_grad()
    def _wanted(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder.to(pixel_values.device)(pixel_values)

    def loss(self, cells: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of features `[B, D, rows, columns]` from those of the encoder as it was."""
        return F.mse_loss(cells.float(), self._wanted(pixel_values))
