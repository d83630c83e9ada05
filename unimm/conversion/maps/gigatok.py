"""GigaTok: a pyramid, queries that read it, and queries that a second pyramid draws."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.llamagen import DEFAULT_MULTIPLIERS, FILES, IMAGE_SIZE, conv_block_renames
from unimm.conversion.maps.pyramids import CODEBOOK, channels
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    blocks_last_to_first,
    matrix,
    under,
)

SIZES = {
    "tiny": {"width": 256, "layers": 4, "heads": 4},
    "small": {"width": 512, "layers": 6, "heads": 8},
    "base": {"width": 768, "layers": 12, "heads": 12},
    "large": {"width": 1024, "layers": 24, "heads": 16},
    "xl": {"width": 1280, "layers": 36, "heads": 20},
    "xxl": {"width": 1536, "layers": 48, "heads": 24},
}
# What upstream can also be built as, and no published model is.
FIXED = {
    "use_lfq": False,
    "simvq": False,
    "use_rope": False,
    "rope_1d": False,
    "use_qk_norm": False,
    "learnable_1d_query_init": False,
    "last_level_2d_query_init": False,
    "multi_level_2d_query_init": False,
    "learnable_2d_query_init": False,
    "res_up_down_sample": False,
    "res_codebook_updown_sample": False,
    "downsample_improve": False,
}
LAYER = {
    "norm1": "attention_norm",
    "self_attn.out_proj": "attention.out",
    "norm2": "cross_norm",
    "multihead_attn.out_proj": "cross.out",
    "norm3": "mlp_norm",
    "linear1": "mlp.up",
    "linear2": "mlp.down",
}
ATTENTIONS = {"self_attn": "attention", "multihead_attn": "cross"}


def _size(upstream: UpstreamConfig, side: str) -> Mapping[str, int]:
    name = upstream.get(f"{side}_size", None) or upstream.get("model_size", "small")
    size = upstream.literal(f"size_{name}", SIZES.get(name))
    if size is None:
        raise ValueError(f"{side}_size is {name!r}; it must be one of {', '.join(SIZES)}.")
    return size


def squeezed(positions: torch.Tensor) -> torch.Tensor:
    """`[N, 1, D]` as `[N, D]`."""
    return positions[:, 0]


def reader_renames(theirs: str, ours: str, *, embed: str, read: str, queries: str) -> tuple[Rename, ...]:
    """Norms, positions and layers of one transformer.

    Args:
        theirs, ours: where it lies.
        embed, read, queries: upstream's names of its embedding, the positions of what is read and those of queries.
    """
    layer, target = rf"{theirs}\.transformer\.(?P<index>\d+)", rf"{ours}.layers.\g<index>"
    return (
        *under(theirs, ours, {"ln_pre": "norm_in", embed: "embed", "ln_post": "norm_out"}),
        Rename(rf"{theirs}\.{read}", f"{ours}.positions", squeezed),
        Rename(rf"{theirs}\.{queries}", f"{ours}.query_positions", squeezed),
        *under(layer, target, LAYER),
        *(
            Rename(rf"{layer}\.{attention}\.in_proj_(?P<leaf>weight|bias)", rf"{target}.{part}.qkv.\g<leaf>")
            for attention, part in ATTENTIONS.items()
        ),
    )


RENAMES = (
    *conv_block_renames("encoder"),
    *reader_renames(
        "s2to1encoder",
        "resampler.reader",
        embed="encoder_embed",
        read="positional_embedding",
        queries="latent_token_positional_embedding",
    ),
    *under("s2to1encoder", "resampler", {"global_proj": "to_queries"}),
    Rename(r"s2to1encoder\.conv_out\.weight", "resampler.to_positions.0.weight", matrix),
    Rename(r"s2to1encoder\.conv_out\.bias", "resampler.to_positions.0.bias"),
    Rename(r"quant_conv\.weight", "resampler.to_positions.1.weight", matrix),
    Rename(r"quant_conv\.bias", "resampler.to_positions.1.bias"),
    *CODEBOOK,
    Rename(r"post_quant_conv\.weight", "decoder.from_vectors.weight", matrix),
    Rename(r"post_quant_conv\.bias", "decoder.from_vectors.bias"),
    *reader_renames(
        "s1to2decoder",
        "decoder.reader",
        embed="decoder_embed",
        read="latent_token_positional_embedding",
        queries="positional_embedding",
    ),
    *under("s1to2decoder", "decoder", {"conv_out": "to_grid"}),
    Rename(rf"s1to2decoder\.distill_mlp\.(?P<index>\d)\.{LEAVES}", r"decoder.to_features.\g<index>.\g<leaf>"),
    *conv_block_renames("decoder", "decoder.pixels"),
    Rename(
        rf"decoder\.conv_blocks\.(?P<level>\d+)\.upsample\.conv1\.{LEAVES}",
        r"decoder.pixels.levels.\g<level>.resize.conv.\g<leaf>",
        blocks_last_to_first(2),
    ),
    *under(
        r"decoder\.adaptive\.(?P<level>\d+)",
        r"decoder.pixels.adaptive.\g<level>",
        {"gamma": "to_scale", "beta": "to_shift"},
    ),
)


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `VQVitModelPlus`.

    Raises:
        ValueError: a size without a name, or a model that is built in another way than the published ones.
    """
    upstream.require(FIXED)
    if not upstream.get("multi_level_query_init", False):
        raise ValueError(
            "multi_level_query_init is not True; only models whose queries begin as averages are converted."
        )
    reading, drawing = _size(upstream, "encoder"), _size(upstream, "decoder")
    width, blocks = upstream.literal("conv_ch", 128), upstream.literal("num_res_blocks", 2)
    code_channels, dim = upstream.get("z_channels", 256), upstream.get("codebook_embed_dim", 8)
    encoder = channels(width, upstream.get("encoder_ch_mult", DEFAULT_MULTIPLIERS))
    decoder = channels(width, upstream.get("decoder_ch_mult", DEFAULT_MULTIPLIERS))
    attention = upstream.get("use_attn", True)
    side, tokens = upstream.literal("image_size", IMAGE_SIZE), upstream.get("num_latent_tokens", 256)
    rows, drawn_rows = side // 2 ** (len(encoder) - 1), side // 2 ** (len(decoder) - 1)
    config = VisualCodecConfig(
        image_size=side,
        encoder={
            "kind": "pyramid",
            "channels": encoder,
            "blocks": blocks,
            "attention_levels": [len(encoder) - 1] if attention else [],
            "middle_attention": attention,
            "code_channels": code_channels,
            "stem_channels": width,
        },
        resampler={
            "kind": "queries",
            "tokens": tokens,
            "rows": rows,
            "columns": rows,
            "dim": dim,
            "width": reading["width"],
            "depth": reading["layers"],
            "num_heads": reading["heads"],
        },
        quantizer={
            "kind": "vq",
            "size": upstream.get("codebook_size", 16384),
            "dim": dim,
            "normalize": upstream.get("codebook_l2_norm", True),
            "project": False,
        },
        length={"kind": "sequence", "tokens": tokens, "rows": rows, "columns": rows},
        decoder={
            "kind": "query_vit",
            "dim": dim,
            "tokens": tokens,
            "rows": drawn_rows,
            "columns": drawn_rows,
            "width": drawing["width"],
            "depth": drawing["layers"],
            "num_heads": drawing["heads"],
            "aligned_layer": upstream.get("distill_depth", None) or 0,
            "feature_width": upstream.get("out_inner_dim", 768),
            "pixels": {
                "channels": decoder,
                "blocks": blocks + 1,
                "attention_levels": [len(decoder) - 1] if attention else [],
                "middle_attention": attention,
                "code_channels": code_channels,
                "upsampling": "shuffle" if upstream.get("d2s_up", False) else "nearest",
                "adaptive": upstream.get("adaptive_gn", False),
            },
        },
    )
    return Plan(config, RENAMES, without_effect=(r"quantize\.codebook_used",), files=FILES)


TOKENIZER = Upstream(
    system="gigatok",
    repository="SilentView/GigaTok",
    licence="MIT",
    paper="arXiv 2504.08736",
    plan=plan,
)
