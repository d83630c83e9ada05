"""What a codec is made of: its sockets, its codes and its weights, as a table."""

from __future__ import annotations

from pathlib import Path

import torch

from unimm.codec import VisualCodecConfig, VisualCodecModel, load_preset

SOCKETS = ("encoder", "resampler", "quantizer", "length", "decoder")


def inspect_codec(name: str) -> str:
    """The table of a preset, or of a saved codec's folder.

    Raises:
        ValueError: neither a preset nor a folder with a codec.
    """
    saved = (Path(name) / "config.json").is_file()
    config = VisualCodecConfig.from_pretrained(name) if saved else load_preset(name)
    with torch.device("meta"):
        codec = VisualCodecModel(config)
    spec = codec.spec_without_fingerprint
    lines = []
    for socket in SOCKETS:
        options = dict(getattr(config, socket))
        kind = options.pop("kind")
        shown = ", ".join(f"{key} {value}" for key, value in options.items())
        lines.append(f"{socket:<10} {kind}" + (f" ({shown})" if shown else ""))
    own = codec.length.arrange(config.grid(config.image_size, config.image_size), None).length
    bits = spec.bits * own / spec.max_length
    black, white = config.pixel_range
    lines += [
        f"pixels     {config.image_size} x {config.image_size}, [{black:g}, {white:g}]",
        f"codes      {own} positions, {' x '.join(map(str, spec.sizes))}, {bits:g} bits; at most {spec.max_length}",
        f"weights    {sum(weight.numel() for weight in codec.parameters()):,}",
    ]
    return "\n".join(lines)
