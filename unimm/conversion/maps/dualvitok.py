"""DualViTok, the tokenizer of ILLUME+: what a picture means in large cells, and how it looks in small ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.pyramids import ATTENTION, BLOCK, ENDS, channels, level
from unimm.conversion.upstream import LEAVES, Plan, Rename, Upstream, UpstreamConfig, matrix, under

IMAGE_SIZE = 256  # of training, the smallest
LARGEST = 1024  # pixels per side of what upstream's table of sizes covers
# The published vision tower; its configuration lies beside upstream's.
TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584, "mlp_ratio": 4}
HEADS = 16  # of the transformers over large cells, whatever their width
PYRAMID = {"ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (4,)}
PIXELS = {"pixel_encoder": {"ch": 128, "z_channels": 32}, "pixel_decoder": {"ch": 384, "z_channels": 64}}
# What upstream can also be built as, and no published model is.
FIXED = {
    "semantic_encoder.proj_layer": "linear",
    "semantic_encoder.target_mlp": "norm",
    "semantic_decoder.proj_layer": "linear_norm",
    "semantic_quantizer.type": "SimVQ",
    "pixel_quantizer.type": "SimVQ",
    "pixel_encoder.double_z": False,
    "pixel_decoder.double_z": False,
    "pixel_encoder.use_dc_up_down_blocks": True,
    "pixel_decoder.use_dc_up_down_blocks": True,
    "semantic_detail_merge_type": "cat",
}
BLOCKS = {
    "norm1": "attention_norm",
    r"attn\.qkv": "attention.qkv",
    r"attn\.proj": "attention.out",
    "norm2": "mlp_norm",
    r"mlp\.fc1": "mlp.0",
    r"mlp\.fc2": "mlp.2",
}
NORM = {r"norm_layer": "norm", "conv_y": "to_scale", "conv_b": "to_shift"}
MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def pyramid(upstream: UpstreamConfig, side: str) -> dict[str, Any]:
    """The options of `pixel_encoder` or `pixel_decoder`; levels with attention go by their index."""
    published = PYRAMID | PIXELS[side]
    theirs = {name: upstream.get(f"{side}.{name}", default) for name, default in published.items()}
    widths = channels(theirs["ch"], theirs["ch_mult"])
    return {
        "channels": widths,
        "blocks": theirs["num_res_blocks"],
        "attention_levels": [index for index in range(len(widths)) if index in theirs["attn_resolutions"]],
        "code_channels": theirs["z_channels"],
    }


def conditioned(names: Mapping[str, str]) -> dict[str, str]:
    """The names within a block of the decoder, whose norms read a condition."""
    norms = {theirs: ours for theirs, ours in names.items() if "norm" in theirs}
    inside = {rf"{theirs}\.{part}": f"{ours}.{name}" for theirs, ours in norms.items() for part, name in NORM.items()}
    return {theirs: ours for theirs, ours in names.items() if theirs not in norms} | inside


def pixel_renames(num_levels: int) -> tuple[Rename, ...]:
    encoder, decoder = r"pixel_encoder", r"pixel_decoder"
    renames = [
        *under(encoder, "encoder.pyramid", ENDS),
        *level(rf"{encoder}\.down\.(?P<level>\d+)", r"encoder.pyramid.levels.\g<level>"),
        *under(
            rf"{encoder}\.down\.(?P<level>\d+)\.downsample",
            r"encoder.pyramid.levels.\g<level>.resize",
            {"conv": "conv"},
        ),
        Rename(rf"pixel_quant_conv\.{LEAVES}", r"encoder.to_vectors.\g<leaf>"),
        Rename(rf"pixel_post_quant_conv\.{LEAVES}", r"decoder.from_vectors.\g<leaf>"),
        *under(decoder, "decoder.pixels", conditioned(ENDS)),
    ]
    for theirs, ours in MIDDLE.items():
        names = ATTENTION if "attn" in theirs else BLOCK
        renames += under(rf"{encoder}\.mid\.{theirs}", f"encoder.pyramid.middle.{ours}", names)
        renames += under(rf"{decoder}\.mid\.{theirs}", f"decoder.pixels.middle.{ours}", conditioned(names))
    for index in range(num_levels):  # upstream counts the decoder's fine to coarse
        source, target = rf"{decoder}\.up\.{index}", f"decoder.pixels.levels.{num_levels - 1 - index}"
        renames += under(rf"{source}\.block\.(?P<block>\d+)", rf"{target}.blocks.\g<block>", conditioned(BLOCK))
        renames += under(rf"{source}\.attn\.(?P<block>\d+)", rf"{target}.attention.\g<block>", conditioned(ATTENTION))
        renames += under(rf"{source}\.upsample", f"{target}.resize", {"conv": "conv"})
    return tuple(renames)


def meaning_renames() -> tuple[Rename, ...]:
    encoder, decoder = r"semantic_encoder", r"semantic_decoder"
    return (
        Rename(rf"{encoder}\.model\.patch_embed\.proj\.weight", "encoder.tower.patches.weight"),
        *under(rf"{encoder}\.model\.blocks\.(?P<index>\d+)", r"encoder.tower.blocks.\g<index>", BLOCKS),
        *under(
            rf"{encoder}\.model\.merger", "encoder.tower", {"ln_q": "norm", r"mlp\.0": "merge.0", r"mlp\.2": "merge.2"}
        ),
        Rename(rf"{encoder}\.proj_in\.weight", "encoder.meaning.embed.weight", matrix),
        Rename(rf"{encoder}\.proj_in\.bias", "encoder.meaning.embed.bias"),
        *under(rf"{encoder}\.blocks\.(?P<index>\d+)", r"encoder.meaning.blocks.\g<index>", BLOCKS),
        *under(encoder, "encoder.meaning", {r"proj_out\.0": "out"}),
        *under(decoder, "decoder", {"proj_in": "meaning.embed", r"proj_out\.0": "meaning.out", r"proj_out\.1": "norm"}),
        *under(rf"{decoder}\.blocks\.(?P<index>\d+)", r"decoder.meaning.blocks.\g<index>", BLOCKS),
    )


def codebook_renames(theirs: str, ours: str) -> tuple[Rename, ...]:
    return (
        Rename(rf"{theirs}\.frozen_codebook", f"quantizer.{ours}.codebook"),
        Rename(rf"{theirs}\.code_transform\.weight", f"quantizer.{ours}.row_map.weight"),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `DualViTok`.

    Raises:
        ValueError: streams of different widths, a tower of the width of the transformer behind it, or a model that is
            built in another way than the published one.
    """
    upstream.require(FIXED)
    tower = TOWER | dict(upstream.field("semantic_tower_config", {}))
    dim, embed_dim = upstream.get("semantic_quantizer.dim", 32), upstream.get("semantic_encoder.embed_dim", 1280)
    if upstream.get("pixel_quantizer.dim", dim) != dim:
        raise ValueError(
            f"The quantizers' dim are {dim} and {upstream.get('pixel_quantizer.dim')}; they must be equal."
        )
    if tower["hidden_size"] == embed_dim:
        raise ValueError(f"hidden_size and embed_dim are {embed_dim}; a model without a map between them is not known.")
    encoder, decoder = pyramid(upstream, "pixel_encoder"), pyramid(upstream, "pixel_decoder")
    codebook = {"dim": dim, "normalize": False, "project": False, "map_rows": True, "map_bias": False}
    sizes = {name: upstream.get(f"{name}_quantizer.codebook_size") for name in ("semantic", "pixel")}
    stem = upstream.get("pixel_encoder.ch", PIXELS["pixel_encoder"]["ch"])
    cell = 2 ** (len(encoder["channels"]) - 1)
    config = VisualCodecConfig(
        image_size=IMAGE_SIZE,
        encoder={
            "kind": "streams",
            "dim": dim,
            "tower": {
                "width": tower["embed_dim"],
                "depth": tower["depth"],
                "num_heads": tower["num_heads"],
                "mlp_width": int(tower["mlp_ratio"] * tower["embed_dim"]),
                "out_width": tower["hidden_size"],
            },
            "meaning": {
                "width": embed_dim,
                "depth": upstream.get("semantic_encoder.num_blocks", 4),
                "num_heads": HEADS,
            },
            "pyramid": {**encoder, "stem_channels": stem, "folded": True},
        },
        resampler={"kind": "grid", "dim": 1 + dim, "norm": False, "project": False},
        quantizer={
            "kind": "streams",
            "first": {**codebook, "size": sizes["semantic"]},
            "second": {**codebook, "size": sizes["pixel"]},
        },
        length={"kind": "streams", "cell": cell, "max_side": LARGEST // cell},
        decoder={
            "kind": "streams",
            "dim": dim,
            "pixels": {
                **decoder,
                "blocks": decoder["blocks"] + 1,
                "upsampling": "unfold",
                "norm_channels": upstream.get("pixel_decoder.embed_dim", 2 * dim),
            },
            "meaning": {
                "width": upstream.get("semantic_decoder.embed_dim", 1280),
                "depth": upstream.get("semantic_decoder.num_blocks", 4),
                "num_heads": HEADS,
            },
            "feature_width": upstream.get("semantic_decoder.output_channels", tower["hidden_size"]),
        },
    )
    renames = (
        *meaning_renames(),
        *pixel_renames(len(encoder["channels"])),
        *codebook_renames("semantic_quantizer", "first"),
        *codebook_renames("pixel_quantizer", "second"),
    )
    return Plan(config, renames)


TOKENIZER = Upstream(
    system="dualvitok",
    repository="illume-unified-mllm/ILLUME_plus",
    licence="Apache-2.0",
    paper="arXiv 2504.01934",
    plan=plan,
    aliases=("illume_plus", "dual_vitok"),
)
