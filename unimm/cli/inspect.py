"""What a codec is made of, and what a published system weighs, as tables."""

from __future__ import annotations

from pathlib import Path

import torch

from unimm.codec import VisualCodecConfig, VisualCodecModel, load_preset, preset_names
from unimm.codec.presets import paper_of
from unimm.codec.vae import VaeConfig
from unimm.config import did_you_mean
from unimm.conversion.presets import load_published, published_names

MODES = (16, 8, 4)  # bits of linear layers
SOCKETS = ("encoder", "resampler", "quantizer", "length", "decoder")


def list_codecs() -> str:
    """Names of our own presets and of the published tokenizers, these by system."""
    names: dict[str, list[str]] = {"our own": preset_names()}
    for name in published_names():
        names.setdefault(load_published(name).upstream.system, []).append(name)
    return "\n".join(f"{group:<20}{', '.join(found)}" for group, found in names.items())


def inspect_codec(name: str) -> str:
    """The table of a preset, of a published tokenizer, or of a saved codec's folder.

    Raises:
        ValueError: none of them.
    """
    origin = []
    if (Path(name) / "config.json").is_file():
        config = VisualCodecConfig.from_pretrained(name)
    elif name in preset_names():
        config, paper = load_preset(name), paper_of(name)
        origin = [] if paper is None else [f"paper      {paper}, rebuilt from its description"]
    elif name in published_names():
        published = load_published(name)
        config, upstream = published.config, published.upstream
        origin = [f"paper      {upstream.paper}", f"upstream   {upstream.repository}", f"licence    {upstream.licence}"]
    else:
        raise ValueError(
            f"{name!r} is no preset, no published tokenizer and no folder of a codec."
            f"{did_you_mean(name, [*preset_names(), *published_names()])} `unimm inspect codec` lists all of them."
        )
    return "\n".join([*origin, *_describe(config)])


def _describe(config: VisualCodecConfig) -> list[str]:
    with torch.device("meta"):
        codec = VisualCodecModel(config)
    spec = codec.spec_without_fingerprint
    lines = []
    for socket in SOCKETS:
        options = dict(getattr(config, socket))
        kind = options.pop("kind")
        shown = ", ".join(f"{key} {value}" for key, value in options.items())
        lines.append(f"{socket:<10} {kind}" + (f" ({shown})" if shown else ""))
    if config.vae is not None:
        vae = VaeConfig(config.vae)
        lines.append(f"vae        {vae.channels} channels, {vae.factor} pixels a side each")
    own = codec.length.arrange(config.grid(config.image_size, config.image_size), None).length
    sizes = " x ".join(map(str, spec.sizes))
    if len(spec.sizes) > 2 and len(set(spec.sizes)) == 1:
        sizes = f"{len(spec.sizes)} slots of {spec.sizes[0]}"
    each = f"{sizes}, {spec.bits * own / spec.max_length:g} bits" if sizes else f"{spec.dim} continuous channels"
    return [
        *lines,
        _input(config),
        f"codes      {own} positions, {each}; at most {spec.max_length}",
        f"weights    {sum(weight.numel() for weight in codec.parameters()):,}",
    ]


def _input(config: VisualCodecConfig) -> str:
    """Size and range of what is encoded."""
    side = f"{config.image_size} x {config.image_size}"
    if not config.reads_pixels:
        return f"latents    {side}, {config.encoder['latent_channels']} channels of a VAE"
    if config.pixel_mean is not None:
        return f"pixels     {side}, [0, 1] less {config.pixel_mean} over {config.pixel_std}"
    black, white = config.pixel_range
    return f"pixels     {side}, [{black:g}, {white:g}]"


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
