"""UniFlow: a vision tower, its cells as continuous latents, and a flow that draws each cell's pixels from them."""

from __future__ import annotations

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from unimm.codec import VisualCodecConfig
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    first,
    kernel_of_channels,
    kernel_of_lines,
    under,
)

HEADS = 16  # of the blocks over latents, whatever their width
TOWER_EPS = 1e-6
# What upstream can also be built as, and no published model is.
FIXED = {
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "use_global_blocks": True,
    "use_chal_proj": True,
    "use_cfg": False,
}
BLOCK = {
    "norm1": "attention_norm",
    r"attn\.qkv": "attention.qkv",
    r"attn\.proj": "attention.out",
    "norm2": "mlp_norm",
    r"mlp\.fc1": "mlp.up",
    r"mlp\.fc2": "mlp.down",
}
MODULATION = r"adaLN_modulation\.1"
LAYER = {"in_ln": "norm", r"mlp\.0": "up", r"mlp\.2": "down", MODULATION: "modulation"}


def renames(patch: int) -> tuple[Rename, ...]:
    tower, head = r"encoder\.layers\.(?P<index>\d+)", r"flow_head\.net"
    return (
        Rename(r"embeddings\.class_embedding", "encoder.class_token", first),
        Rename(r"embeddings\.position_embedding", "encoder.table", first),
        *under("embeddings", "encoder", {"patch_embedding": "patches.conv"}),
        *under(tower, r"encoder.blocks.\g<index>", BLOCK),
        Rename(rf"{tower}\.ls1", r"encoder.blocks.\g<index>.attention_scale.weight"),
        Rename(rf"{tower}\.ls2", r"encoder.blocks.\g<index>.mlp_scale.weight"),
        *under("chal_proj", "resampler", {"c_fc": "before.0"}),
        Rename(r"chal_proj\.c_proj\.weight", "resampler.to_positions.weight", kernel_of_lines),
        Rename(r"chal_proj\.c_proj\.bias", "resampler.to_positions.bias"),
        *under("chal_unproj", "decoder.embed", {"c_fc": "0", "c_proj": "2"}),
        Rename("global_block_pos_embed", "decoder.code_positions", first),
        *under(r"global_blocks\.(?P<index>\d+)", r"decoder.blocks.\g<index>", BLOCK),
        Rename("decoder_pos_embed", "decoder.positions", first),
        Rename(rf"{head}\.time_embed\.mlp\.(?P<layer>0|2)\.{LEAVES}", r"decoder.time.\g<layer>.\g<leaf>"),
        *under(head, "decoder", {"cond_embed": "to_condition"}),
        Rename(rf"{head}\.input_proj\.weight", "decoder.patches.conv.weight", kernel_of_channels(patch)),
        Rename(rf"{head}\.input_proj\.bias", "decoder.patches.conv.bias"),
        *under(rf"{head}\.res_blocks\.(?P<index>\d+)", r"decoder.layers.\g<index>", LAYER),
        *under(rf"{head}\.final_layer", "decoder", {MODULATION: "modulation", "linear": "to_patches"}),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `UniFlowVisionModel`.

    Raises:
        ValueError: a model that is built in another way than the published ones.
    """
    upstream.require(FIXED)
    width, side = upstream.get("hidden_size", 1024), upstream.get("image_size", 448)
    patch, dim = upstream.get("patch_size", 14), upstream.get("latent_ch", 64)
    if upstream.get("vit_hidden_size", width) != width:
        raise ValueError(
            f"hidden_size is {width} and vit_hidden_size {upstream.get('vit_hidden_size')}; only models of one width "
            "are converted."
        )
    cells = side // patch
    config = VisualCodecConfig(
        image_size=side,
        pixel_mean=IMAGENET_DEFAULT_MEAN,
        pixel_std=IMAGENET_DEFAULT_STD,
        encoder={
            "kind": "vit",
            "patch": patch,
            "width": width,
            "depth": upstream.get("num_hidden_layers", 24),
            "num_heads": upstream.get("num_attention_heads", 16),
            "mlp_width": upstream.get("intermediate_size", 4096),
            "eps": TOWER_EPS,
            "table_side": cells,
            "final_norm": False,
            "class_token": True,
            "channel_scales": True,
        },
        resampler={"kind": "grid", "dim": dim, "norm": False, "gelu_width": width, "project_back": False},
        quantizer={"kind": "continuous"},
        decoder={
            "kind": "cell_flow",
            "dim": dim,
            "rows": cells,
            "columns": cells,
            "patch": patch,
            "width": width,
            "depth": upstream.get("global_blocks_depth", 6),
            "num_heads": HEADS,
            "steps": int(upstream.get("num_sampling_steps", 1)),
            "flow_depth": upstream.get("num_decoder_layers", 12),
        },
    )
    return Plan(config, renames(patch))


TOKENIZER = Upstream(
    system="uniflow",
    repository="ZhengrongYue/UniFlow",
    licence="no licence file, all rights reserved",
    paper="arXiv 2510.10575",
    plan=plan,
    restricted=True,
)
