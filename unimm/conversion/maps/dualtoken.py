"""DualToken: a SigLIP tower read early for pixels and late for meaning, two chains of residuals."""

from __future__ import annotations

from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.evotok import without_padding_row
from unimm.conversion.maps.pyramids import ATTENTION, BLOCK, ENDS, channels, level
from unimm.conversion.maps.tar import EPS, TOWERS, layer_renames
from unimm.conversion.maps.unitok import projection_renames
from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig, under

TOWER = r"siglip_model\.vision_model"
DRAWING = ("ch", "ch_mult", "resolution", "num_res_blocks", "attn_resolutions", "decoder_in_channels")
MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def chain(upstream: UpstreamConfig, name: str) -> dict[str, Any]:
    """One chain of residuals.

    Raises:
        ValueError: a table for every depth.
    """
    if not upstream.get(f"{name}.shared_codebook", True):
        raise ValueError(f"{name}.shared_codebook is false; this converter knows chains with one table only.")
    return {
        "size": upstream.get(f"{name}.n_embed"),
        "dim": upstream.get(f"{name}.embed_dim"),
        "depth": upstream.get(f"{name}.code_shape")[-1],
        "shared": True,
        "normalize": False,
        "project": False,
    }


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `RQVAESiglipModel`, without what is behind the codes in its tower.

    Raises:
        ValueError: a tower that nothing describes, or chains with several tables.
    """
    name = upstream.get("pretrained_model")
    tower = upstream.field("pretrained_model_vision_config", TOWERS.get(name))
    if tower is None:
        raise ValueError(
            f"pretrained_model is {name!r} and config.json has no pretrained_model_vision_config; "
            f"known towers: {', '.join(TOWERS)}."
        )
    width, size, patch = tower["hidden_size"], tower["image_size"], tower["patch_size"]
    pixels, meaning = chain(upstream, "vq_pix"), chain(upstream, "vq_sem")
    drawing = {name: upstream.get(f"ddconfig.{name}") for name in DRAWING}
    levels = channels(drawing["ch"], drawing["ch_mult"])
    resolutions = [drawing["resolution"] // 2**level for level in range(len(levels))]
    rows, columns = upstream.get("decoder_latent_shape")
    heads = {"pixel_heads": width // pixels["dim"]}
    config = VisualCodecConfig(
        image_size=size,
        encoder={
            "kind": "taps",
            "tower": {
                "patch": patch,
                "width": width,
                "depth": upstream.get("layer_sem"),
                "num_heads": tower["num_attention_heads"],
                "mlp_width": tower["intermediate_size"],
                "eps": tower.get("layer_norm_eps", EPS),
                "table_side": size // patch,
                "final_norm": False,
                "tanh_gelu": True,
                "drop_margin": size % patch > 0,
            },
            "pixel_layer": upstream.get("layer_recon"),
            "shortcut_layer": upstream.get("layer_shortcut"),
            "shortcut_weight": upstream.get("weight_shortcut"),
            "pixel_dim": pixels["dim"],
            "meaning_dim": meaning["dim"],
            "meaning_heads": width // meaning["dim"],
            **heads,
        },
        resampler={"kind": "grid", "dim": pixels["dim"] + meaning["dim"], "norm": False, "project": False},
        quantizer={"kind": "twin", "first": pixels, "second": meaning},
        decoder={
            "kind": "attention_dual",
            "pixel_dim": pixels["dim"],
            "feature_dim": meaning["dim"],
            "width": width,
            "feature_heads": width // meaning["dim"],
            **heads,
            "pixels": {
                "channels": levels,
                "blocks": drawing["num_res_blocks"] + 1,
                "attention_levels": [
                    place for place, side in enumerate(resolutions) if side in drawing["attn_resolutions"]
                ],
                "code_channels": drawing["decoder_in_channels"],
            },
            "rows": rows,
            "columns": columns,
        },
    )
    finest_first = (
        rule
        for place in range(len(levels))
        for source, target in [(rf"decoder\.up\.{place}", f"decoder.pixels.levels.{len(levels) - 1 - place}")]
        for rule in (*level(source, target), *under(rf"{source}\.upsample", f"{target}.resize", {"conv": "conv"}))
    )
    renames = (
        *under(rf"{TOWER}\.embeddings", "encoder.tower.patches", {"patch_embedding": "conv"}),
        Rename(rf"{TOWER}\.embeddings\.position_embedding\.weight", "encoder.tower.table"),
        *layer_renames(TOWER, "encoder.tower"),
        *projection_renames("prequant_pix", "encoder.to_pixels"),
        *projection_renames("prequant_shortcut", "encoder.shortcut"),
        *projection_renames("prequant_sem", "encoder.to_meaning"),
        Rename(r"quantizer_pix\.codebooks\.0\.weight", "quantizer.first.codebooks.0.codebook", without_padding_row),
        Rename(r"quantizer_sem\.codebooks\.0\.weight", "quantizer.second.codebooks.0.codebook", without_padding_row),
        *projection_renames("postquant_pix", "decoder.to_pixels"),
        *projection_renames("postquant_sem", "decoder.to_features"),
        *under("post_quant_conv", "decoder.narrow", BLOCK),
        *under("decoder", "decoder.pixels", ENDS),
        *(
            rule
            for theirs, ours in MIDDLE.items()
            for rule in under(rf"decoder\.mid\.{theirs}", f"decoder.pixels.middle.{ours}", BLOCK | ATTENTION)
        ),
        *finest_first,
    )
    unread = "|".join(map(str, range(upstream.get("layer_sem"), tower["num_hidden_layers"]))) or "none"
    without_effect = (
        rf"{TOWER}\.encoder\.layers\.(?:{unread})\..*",
        rf"{TOWER}\.(?:post_layernorm|head)\..*",
        r"siglip_model\.(?:text_model\..*|logit_scale|logit_bias)",
        r"(?:pre|post)quant_\w+\.attn\.zero_k_bias",
        r"quantizer_\w+\.codebooks\.\d+\.(?:cluster_size|embed)_ema",
        r"quantizer_\w+\.codebooks\.[1-9]\d*\.weight",  # the one table again
    )
    return Plan(config, renames, without_effect)


TOKENIZER = Upstream(
    system="dualtoken",
    repository="songweii/DualToken",
    licence="MIT according to the README, no licence file",
    paper="arXiv 2503.14324",
    plan=plan,
    restricted=True,
    aliases=("dual_token",),
)
