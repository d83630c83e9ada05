"""A stock autoencoder of diffusers around a codec of latents, so that pixels go in and come out (FlexTok, 2502.13967).

diffusers is imported where a VAE is asked for: it takes seconds, and most codecs have none.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unimm.config import did_you_mean

KIND = "AutoencoderKL"
NORMALISED = ("latents_mean", "latents_std")  # by channel, which pipelines of diffusers do each in their own way


@cache
def _defaults() -> dict[str, Any]:
    """Every field of the autoencoder's configuration, and its default."""
    from diffusers import AutoencoderKL

    parameters = inspect.signature(AutoencoderKL.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


@dataclass(frozen=True)
class VaeConfig:
    """A `diffusers.AutoencoderKL` that takes and gives pixels in [-1, 1].

    Args:
        vae: fields of its configuration. Latents are the mode of what it encodes to, less `shift_factor` and times
            `scaling_factor`, as pipelines of diffusers have them.

    Raises:
        ValueError: unknown fields, stages that do not match, other channels than three, or statistics by channel.
    """

    vae: dict[str, Any]

    def __post_init__(self) -> None:
        for name in self.vae:
            if name not in _defaults():
                hint = did_you_mean(name, _defaults(), n=1)
                raise ValueError(f"vae: unknown key {name!r}.{hint} Known keys: {', '.join(_defaults())}.")
        stages = {name: len(self._field(name)) for name in ("block_out_channels", "down_block_types", "up_block_types")}
        if len({*stages.values()}) > 1:
            shown = ", ".join(f"{count} {name}" for name, count in stages.items())
            raise ValueError(f"vae has {shown}; name as many of each.")
        if (self._field("in_channels"), self._field("out_channels")) != (3, 3):
            raise ValueError(
                f"vae has in_channels {self._field('in_channels')} and out_channels {self._field('out_channels')}; "
                "pictures have 3."
            )
        if found := [name for name in NORMALISED if self._field(name) is not None]:
            raise ValueError(
                f"vae.{found[0]} is {self._field(found[0])}; only scaling_factor and shift_factor are known here."
            )

    def _field(self, name: str) -> Any:
        return self.vae.get(name, _defaults()[name])

    @property
    def factor(self) -> int:
        """Pixels per latent, on each side."""
        return 2 ** (len(self._field("block_out_channels")) - 1)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self._field("latent_channels")

    @property
    def shift(self) -> float:
        return self._field("shift_factor") or 0.0

    @property
    def scale(self) -> float:
        return self._field("scaling_factor")


class Vae(nn.Module):
    """The autoencoder; its weights are saved with the codec and never trained."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.shift, self.scale = config.shift, config.scale
        self.autoencoder = AutoencoderKL(**config.vae).eval().requires_grad_(False)

    def load(self, name: str | Path) -> None:
        """Take the weights of a saved one, by folder or Hub name.

        Raises:
            ValueError: they do not fit its configuration.
        """
        from diffusers import AutoencoderKL

        self.autoencoder, found = AutoencoderKL.from_pretrained(
            name, torch_dtype=torch.float32, output_loading_info=True
        )
        self.train(self.training)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{name} has no weights {missing[0]!r}; save its VAE alone and name that.")

    def train(self, mode: bool = True) -> Vae:
        """The autoencoder stays as it is; loading has made its weights trainable."""
        super().train(mode)
        self.autoencoder.eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1] to latents `[B, C, H / factor, W / factor]`."""
        return (mode_of_latents(self.autoencoder, pixel_values) - self.shift) * self.scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to pixels, about [-1, 1] and not clamped; a gradient reaches the latents."""
        return self.autoencoder.decode(latents / self.scale + self.shift).sample


def mode_of_latents(vae: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Latents of pixels in [-1, 1] by any autoencoder of diffusers, unscaled; where it draws by chance, the mode."""
    encoded = vae.encode(pixel_values)
    return encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]


def stock_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """Fields of a saved autoencoder's configuration, less what diffusers notes beside them.

    Raises:
        ValueError: it is of another class.
    """
    kind = saved.get("_class_name", KIND)
    if kind != KIND:
        raise ValueError(f"The VAE is of class {kind!r}; only {KIND} lies around a codec.")
    return {name: value for name, value in saved.items() if not name.startswith("_")}


def around_vae(name: str | Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a codec's configuration within a saved autoencoder.

    Args:
        name: its folder or Hub name.
        fields: the others.

    Raises:
        ValueError: an autoencoder of another class.
    """
    from diffusers import AutoencoderKL

    return fields | {"vae": stock_fields(AutoencoderKL.load_config(name))}
