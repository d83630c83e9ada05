"""Instella-T2I's tokenizer: pictures of any size as bits of a few latents, drawn at the size they had."""

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

MLP_RATIO = 4
SIDE, LARGEST_SIDE = 64, 128  # cells of the encoder's grid, of pictures that the codec draws unasked and of its largest
PARTS = {
    "input_layernorm": "attention_norm",
    "attn.norm_q": "attention.query_norm",
    "attn.norm_k": "attention.key_norm",
    "attn.o_proj": "attention.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def trunk(upstream: UpstreamConfig, side: str, turns: str) -> dict[str, Any]:
    """The options of the transformer of one side."""
    heads = upstream.get(f"{side}_num_heads")
    width = heads * upstream.get(f"{side}_head_dim")
    return {
        "tokens": upstream.get("num_latent_tkns"),
        "depth": upstream.get(f"{side}_layers"),
        "num_heads": heads,
        "mlp_width": MLP_RATIO * width,
        "axes": upstream.get("axes_dims_rope"),
        "turns": upstream.get(turns),
    }


def trunk_renames(side: str, resizes: str, target: str) -> tuple[Rename, ...]:
    """The keys of the transformer of one side."""
    theirs, ours = rf"{side}\.transformer_blocks\.(?P<block>\d+)", rf"{target}.trunk.blocks.\g<block>"
    fused = (
        Rename(rf"{theirs}\.attn\.{name}_proj\.weight", f"{ours}.attention.qkv.weight", part=part)
        for part, name in enumerate("qkv")
    )
    return (
        *fused,
        *under(theirs, ours, PARTS),
        *under(rf"{side}\.{resizes}\.(?P<index>\d+)", rf"{target}.trunk.resizes.\g<index>", {"conv": "conv"}),
        Rename(rf"{side}\.norm_out\.weight", f"{target}.norm.weight"),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `BAE_Model`."""
    patch, halvings = upstream.get("patch_size"), len(upstream.get("downsample_idx"))
    reader, writer = trunk(upstream, "encoder", "downsample_idx"), trunk(upstream, "decoder", "upsample_idx")
    width = reader["num_heads"] * upstream.get("encoder_head_dim")
    config = VisualCodecConfig(
        image_size=SIDE * patch,
        encoder={"kind": "patches", "patch": patch, "width": width},
        resampler={"kind": "rotary_latents", **reader, "dim": width},
        quantizer={"kind": "bits", "bits": upstream.get("codebook_size")},
        length={
            "kind": "any_sequence",
            "tokens": reader["tokens"],
            "step": 2**halvings,
            "max_side": LARGEST_SIDE,
        },
        decoder={
            "kind": "rotary_mask",
            **writer,
            "dim": width,
            "width": writer["num_heads"] * upstream.get("decoder_head_dim"),
            "patch": patch,
        },
    )
    renames = (
        *under("encoder", "encoder.patches", {"patch_embedder": "conv"}),
        Rename(r"encoder\.latent_tokens", "resampler.latents", first),
        *trunk_renames("encoder", "down_layers", "resampler"),
        *under("encoder", "resampler", {"proj_out": "to_positions"}),
        *under(r"quantizer\.proj", "quantizer", {"0": "to_bits"}),
        Rename(r"quantizer\.embed", "quantizer.rows"),
        *under(r"decoder\.input_layer", "decoder.embed", {r"(?P<layer>\d+)": r"\g<layer>"}),
        Rename(r"decoder\.mask_tokens", "decoder.mask_token", lambda token: token[0, :, :, None, None]),
        *trunk_renames("decoder", "up_layers", "decoder"),
        Rename(rf"to_pixel\.{LEAVES}", r"decoder.to_pixels.\g<leaf>", blocks_last_to_first(patch)),
    )
    return Plan(config, renames)


TOKENIZER = Upstream(
    system="instella_bae",
    repository="AMD-AIG-AIMA/Instella-T2I",
    licence="research-only RAIL",
    paper="arXiv 2506.21022",
    plan=plan,
    restricted=True,
    aliases=("instella", "instella_t2i"),
)
