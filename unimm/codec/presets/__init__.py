"""Codecs as data: a preset is a short YAML file that differs from the defaults of `VisualCodecConfig`."""

from __future__ import annotations

import difflib
from importlib import resources

import yaml

from unimm.codec.configuration import VisualCodecConfig


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(name: str) -> VisualCodecConfig:
    """The configuration of a preset.

    Raises:
        ValueError: no preset of that name.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"No codec preset {name!r}; there are {', '.join(names)}.{hint}")
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return VisualCodecConfig(**yaml.safe_load(text))


def tiny_codec_config() -> VisualCodecConfig:
    """A codec for tests and first steps: 32 x 32 pictures, 4 codes of 64, a few thousand weights."""
    return load_preset("smallest")
