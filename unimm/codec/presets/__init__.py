"""Codecs as data: a preset is a short YAML file that differs from the defaults of `VisualCodecConfig`.

One that rebuilds a paper without published weights names it under `paper`.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from unimm.codec.configuration import VisualCodecConfig
from unimm.config import did_you_mean


def names_in(package: str) -> list[str]:
    """Names of the YAML files that ship in a package."""
    return sorted(
        file.name.removesuffix(".yaml") for file in resources.files(package).iterdir() if file.name.endswith(".yaml")
    )


def read_preset(package: str, name: str) -> dict[str, Any]:
    """The mapping in one of them.

    Raises:
        ValueError: no preset of that name.
    """
    names = names_in(package)
    if name not in names:
        raise ValueError(f"No codec preset {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}")
    return yaml.safe_load(resources.files(package).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


def preset_names() -> list[str]:
    """Names of our own presets."""
    return names_in(__name__)


def load_preset(name: str) -> VisualCodecConfig:
    """The configuration of one of our own presets.

    Raises:
        ValueError: no preset of that name.
    """
    fields = read_preset(__name__, name)
    fields.pop("paper", None)
    return VisualCodecConfig(**fields)


def paper_of(name: str) -> str | None:
    """The paper that one of our own presets rebuilds, if it does.

    Raises:
        ValueError: no preset of that name.
    """
    return read_preset(__name__, name).get("paper")


def tiny_codec_config() -> VisualCodecConfig:
    """A codec for tests and first steps: 32 x 32 pictures, 4 codes of 64, a few thousand weights."""
    return load_preset("smallest")
