"""What a codec is made of, and what a published system weighs, as tables."""

from __future__ import annotations

from pathlib import Path

import torch

from unimm.codec import VisualCodecConfig, VisualCodecModel, load_preset

MODES = (16, 8, 4)  # bits of linear layers
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
    each = f"{' x '.join(map(str, spec.sizes))}, {spec.bits * own / spec.max_length:g} bits"
    if not spec.sizes:
        each = f"{spec.dim} continuous channels"
    black, white = config.pixel_range
    lines += [
        f"pixels     {config.image_size} x {config.image_size}, [{black:g}, {white:g}]",
        f"codes      {own} positions, {each}; at most {spec.max_length}",
        f"weights    {sum(weight.numel() for weight in codec.parameters()):,}",
    ]
    return "\n".join(lines)


def inspect_system(name: str) -> str:
    """Weights of a published system, and the memory that they take; constants of quantisation, caches and activations
    come on top.

    Raises:
        ValueError: none of that name.
    """
    from unimm.conversion.published import weights_of

    weights = weights_of(name)
    rows: list[tuple[str, ...]] = [("part", "weights", "bf16", "8-bit", "4-bit")]
    for weight in weights:
        rows.append(_weight_row(weight.part, weight.numbers, [weight.bytes(bits) for bits in MODES]))
    totals = [sum(weight.bytes(bits) for weight in weights) for bits in MODES]
    rows.append(_weight_row("all", sum(weight.numbers for weight in weights), totals))
    return "\n".join(f"{part:<28}{count:>18}{a:>10}{b:>10}{c:>10}" for part, count, a, b, c in rows)


def _weight_row(part: str, numbers: int, sizes: list[float]) -> tuple[str, ...]:
    return (part, f"{numbers:,}", *(f"{size / 1e9:.1f} GB" for size in sizes))
