"""MingTok: continuous latents of a few channels, the features that they unfold to, and pixels drawn from these."""

from __future__ import annotations

from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    blocks_last_to_first,
    first,
    under,
)

HEAD_WIDTH = 64
PARTS = {
    "norm1": "attention_norm",
    r"attn\.qkv": "attention.qkv",
    r"attn\.proj": "attention.out",
    "norm2": "mlp_norm",
    r"mlp\.(?:w12|fc1)": "mlp.up",
    r"mlp\.(?:w3|fc2)": "mlp.down",
}
GATED = ("swiglu", "swiglufused")
WITHOUT_EFFECT = (r"target_backbone\..*",)  # of training, in older files


def gated_width(width: int) -> int:
    """Of a gated MLP with as many weights as a plain one of 4 `width`, a multiple of 8."""
    return (int(4 * width * 2 / 3) + 7) // 8 * 8


def gated(upstream: UpstreamConfig, part: str, prefix: str = "") -> dict[str, Any]:
    """The options of a transformer whose MLPs are gated.

    Raises:
        ValueError: MLPs of another kind.
    """
    if (kind := upstream.get(f"{part}.ffn_layer")) not in GATED:
        raise ValueError(f"{part}.ffn_layer is {kind!r}; this converter knows {' and '.join(GATED)}.")
    width = upstream.get(f"{part}.embed_dim")
    return {
        f"{prefix}width": width,
        "depth": upstream.get(f"{part}.depth" if prefix else f"{part}.decoder_depth"),
        "num_heads": width // HEAD_WIDTH,
        "mlp_width": gated_width(width),
    }


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `MingTok`."""
    patch, side = (upstream.get(f"low_level_encoder.{name}") for name in ("patch_size", "img_size"))
    finest = upstream.get("pixel_decoder.patch_size")
    cells, dim = side // patch, upstream.get("low_level_encoder.out_dim")
    latents = {"dim": dim, "mean": upstream.get("mean", 0.0), "std": upstream.get("scaling_factor", 1.0)}
    pixel_width = upstream.get("pixel_decoder.embed_dim")
    config = VisualCodecConfig(
        image_size=side,
        encoder={
            "kind": "closing_vit",
            **latents,
            **gated(upstream, "low_level_encoder", "tower_"),
            "patch": patch,
            "table_side": cells,
        },
        resampler={"kind": "grid", "dim": dim, "norm": False, "project": False},
        quantizer={"kind": "continuous"},
        length={"kind": "sequence", "tokens": cells**2 + 1, "rows": cells, "columns": cells},
        decoder={
            "kind": "unfolding",
            **latents,
            **gated(upstream, "semantic_decoder"),
            "pixel_width": pixel_width,
            "pixel_depth": upstream.get("pixel_decoder.decoder_depth"),
            "pixel_heads": pixel_width // HEAD_WIDTH,
            "factor": upstream.get("semantic_decoder.patch_size", patch) // finest,
            "patch": finest,
        },
    )
    blocks = {"low_level_encoder": "encoder.blocks", "semantic_decoder": "decoder.blocks"}
    blocks["pixel_decoder"] = "decoder.pixels.blocks"
    renames = (
        *(
            rename
            for theirs, ours in blocks.items()
            for rename in under(rf"{theirs}\.blocks\.\d+\.(?P<block>\d+)", rf"{ours}.\g<block>", PARTS)
        ),
        *under(r"low_level_encoder\.patch_embed", "encoder.patches", {"proj": "conv"}),
        Rename(r"low_level_encoder\.cls_token", "encoder.class_token", first),
        Rename(r"low_level_encoder\.pos_embed", "encoder.table", first),
        *under("low_level_encoder", "encoder", {"out_norm": "norm", "out_proj": "to_latents"}),
        *under("semantic_decoder", "decoder", {"in_proj": "embed", "norm": "norm"}),
        Rename(rf"sem_to_pix\.{LEAVES}", r"decoder.pixels.unfold.\g<leaf>"),
        *under("pixel_decoder", "decoder.pixels", {"norm": "norm"}),
        Rename(rf"pixel_decoder\.head\.{LEAVES}", r"decoder.pixels.to_pixels.\g<leaf>", blocks_last_to_first(finest)),
    )
    return Plan(config, renames, WITHOUT_EFFECT)


TOKENIZER = Upstream(
    system="mingtok",
    repository="inclusionAI/Ming-UniVision",
    licence="MIT",
    paper="arXiv 2510.06590",
    plan=plan,
    aliases=("mingtok_vision", "ming_tok"),
)
