"""FlexTok's codes: registers over the latents of a VAE, rounded. Its decoder, a rectified flow, stays behind."""

from __future__ import annotations

from unimm.codec import VisualCodecConfig
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    cells_of_grid,
    kernel_of_blocks,
)

ENCODER = r"encoder\.module_dict"
# The flow decoder, and the stock VAE whose latents the codec reads.
WITHOUT_EFFECT = (r"decoder\.module_dict\..*", r"vae\..*")


def mlp_width(width: int) -> int:
    """Of a gated MLP with as many weights as a plain one of 4 `width`."""
    return int(2 / 3 * 4 * width)


def block_renames(source: str, target: str) -> tuple[Rename, ...]:
    """The blocks of a transformer, whose query, key and value are one map here."""
    theirs, ours = rf"{source}\.blocks\.(?P<index>\d+)", rf"{target}.blocks.\g<index>"
    fused = (
        Rename(rf"{theirs}\.attn\.{name}\.weight", f"{ours}.attention.qkv.weight", part=part)
        for part, name in enumerate(("wq", "wk", "wv"))
    )
    names = {"attn.proj": "attention.out", "mlp.fc1": "mlp.gate", "mlp.fc3": "mlp.up", "mlp.fc2": "mlp.down"}
    single = (Rename(rf"{theirs}\.{name}\.weight", f"{ours}.{other}.weight") for name, other in names.items())
    return (*fused, *single)


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of the encoder and the quantizer of `FlexTok`.

    Raises:
        ValueError: a width that heads do not divide.
    """
    width, head = upstream.get("enc_dim"), upstream.get("head_dim", 64)
    tokens, side, patch = upstream.get("registers"), upstream.get("grid"), upstream.get("patch", 2)
    levels, channels = upstream.get("fsq_levels"), upstream.get("latent_channels")
    if width % head:
        raise ValueError(f"enc_dim is {width} and head_dim {head}; the second must divide the first.")
    grid = {"rows": side, "columns": side}
    config = VisualCodecConfig(
        image_size=side * patch,
        encoder={"kind": "patches", "patch": patch, "width": width, "latent_channels": channels},
        resampler={
            "kind": "registers",
            "tokens": tokens,
            "dim": len(levels),
            "depth": upstream.get("enc_depth"),
            "num_heads": width // head,
            "mlp_width": mlp_width(width),
            **grid,
        },
        quantizer={"kind": "fsq", "levels": levels, "project": False},
        length={"kind": "sequence", "tokens": tokens, "prefixes": True, **grid},
        decoder={
            "kind": "none",
            "dim": len(levels),
            "drawn_by": "FlexTok's rectified-flow decoder, which is not converted,",
        },
    )
    patches = rf"{ENCODER}\.enc_patch_emb\.patch_proj"
    renames = (
        Rename(rf"{patches}\.weight", "encoder.patches.conv.weight", kernel_of_blocks(patch)),
        Rename(rf"{patches}\.bias", "encoder.patches.conv.bias"),
        Rename(rf"{ENCODER}\.enc_posemb_module\.posembs", "resampler.positions", cells_of_grid),
        Rename(rf"{ENCODER}\.enc_register_module\.registers", "resampler.registers"),
        *block_renames(rf"{ENCODER}\.enc_transformer", "resampler"),
        Rename(rf"{ENCODER}\.enc_to_latents\.proj\.{LEAVES}", r"resampler.to_positions.\g<leaf>"),
    )
    return Plan(config, renames, WITHOUT_EFFECT)


TOKENIZER = Upstream(
    system="flextok",
    repository="apple/ml-flextok",
    licence="Apple sample-code licence (code); released weights are research-only",
    paper="arXiv 2502.13967",
    plan=plan,
    restricted=True,
    aliases=("flex_tok", "ml_flextok"),
)
