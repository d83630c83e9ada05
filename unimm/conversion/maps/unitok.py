"""UniTok, and MedITok after it: ViTamin on both sides, attention around the codes, a codebook per part of a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.eva import with_key_bias
from unimm.conversion.upstream import LEAVES, Plan, Rename, Upstream, UpstreamConfig, WeightFile, under

TOWERS: dict[str, dict[str, Any]] = {
    "vitamin_small": {"stage_dims": [64, 128, 384], "stage_depths": [2, 4, 1], "vit_depth": 14, "vit_heads": 6},
    "vitamin_base": {"stage_dims": [128, 256, 768], "stage_depths": [2, 4, 1], "vit_depth": 14, "vit_heads": 12},
    "vitamin_large": {"stage_dims": [160, 320, 1024], "stage_depths": [2, 4, 1], "vit_depth": 31, "vit_heads": 16},
}
DECODER_BLOCKS = (2, 4)  # fine to coarse
GATED = {"mlp.norm": "mlp.norm", "mlp.w0": "mlp.gate", "mlp.w1": "mlp.up", "mlp.w2": "mlp.down"}
BLOCK = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    **GATED,
}
PROJECTION = {
    "norm1": "attention_norm",
    "attn.proj": "attention.out",
    "norm3": "shortcut_norm",
    "proj": "shortcut",
    "norm2": "mlp_norm",
    **GATED,
}
BOTTLENECK = {
    "pre_norm": "norm",
    "conv1_1x1": "expand",
    "conv2_kxk": "spread",
    "conv3_1x1": "shrink",
    "up.conv": "resize.conv",
    "shortcut.conv": "shortcut.conv",
    "shortcut.expand": "shortcut.expand",
}
# A frozen key bias of zeros, the text side and its objective, and counts of training.
WITHOUT_EFFECT = (
    r"(?:post_)?quant_proj\.attn\.zero_k_bias",
    r"(?:text_encoder|fc_norm|projection)\..*",
    r"logit_scale",
    r"quantizer\.codebooks\.\d+\.vocab_usage",
)
FILES = (WeightFile(inside=(("trainer", "unitok"),)),)


def projection_renames(source: str, target: str) -> tuple[Rename, ...]:
    """The attention on one side of the codes; `source` is a pattern."""
    return (
        *under(source, target, PROJECTION),
        Rename(rf"{source}\.attn\.qkv\.weight", f"{target}.attention.qkv.weight"),
        Rename(rf"{source}\.attn\.q_bias", f"{target}.attention.qkv.bias", with_key_bias, part=0),
        Rename(rf"{source}\.attn\.v_bias", f"{target}.attention.qkv.bias", part=1),
    )


def _tower(upstream: UpstreamConfig) -> Mapping[str, Any]:
    name = upstream.get("model")
    tower = upstream.field("registered_tower", TOWERS.get(name))
    if tower is None:
        raise ValueError(
            f"model is {name!r} and config.json has no registered_tower; known towers: {', '.join(TOWERS)}."
        )
    return tower


def _plan(upstream: UpstreamConfig, *, causal: bool) -> Plan:
    if upstream.get("quant_proj", "attn") != "attn" or upstream.get("num_query", 0):
        raise ValueError("This converter knows quant_proj 'attn' and num_query 0 only.")
    tower, size = _tower(upstream), upstream.get("img_size", 256)
    fine, coarse, width = tower["stage_dims"]
    dim, parts, size_of_all = (upstream.get(name) for name in ("vocab_width", "num_codebooks", "vocab_size"))
    if dim % parts or size_of_all % parts:
        raise ValueError(f"num_codebooks is {parts}; it must divide vocab_width {dim} and the vocab_size.")
    codebook = {"dim": dim // parts, "project": False}
    sizes = (
        {"kind": "product", "sizes": [size_of_all // parts] * parts}
        if parts > 1
        else {"kind": "vq", "size": size_of_all}
    )
    transformer = {"width": width, "depth": tower["vit_depth"], "num_heads": tower["vit_heads"]}
    decoder_width, decoder_coarse, decoder_fine = upstream.field("decoder_channels", (width, coarse, fine))
    if decoder_width != width:
        raise ValueError(f"decoder_channels begin with {decoder_width}, and the tower is {width} wide.")
    config = VisualCodecConfig(
        image_size=size,
        encoder={"kind": "vitamin", "stages": [fine, coarse], "blocks": tower["stage_depths"][:2], **transformer},
        resampler={"kind": "attention", "dim": dim, "num_heads": width // dim, "causal": causal},
        quantizer=codebook | sizes,
        decoder={
            "kind": "vitamin",
            "stages": [decoder_fine, decoder_coarse],
            "blocks": list(DECODER_BLOCKS),
            **transformer,
        },
    )
    table = r"quantizer\.codebooks\.(?P<part>\d+)"
    convolutions = r"encoder\.patch_embed\.backbone"
    renames = (
        *under(rf"{convolutions}\.stem", "encoder.stem", {"conv1": "0", "norm1": "1", "conv2": "3"}),
        *under(
            rf"{convolutions}\.stages\.(?P<stage>\d+)\.(?P<block>\d+)",
            r"encoder.stages.\g<stage>.\g<block>",
            BOTTLENECK,
        ),
        *under(rf"{convolutions}\.pool", "encoder.to_cells", {"norm": "0", "proj": "1"}),
        *under(r"(?P<side>encoder|decoder)\.blocks\.(?P<index>\d+)", r"\g<side>.blocks.\g<index>", BLOCK),
        Rename(rf"(?P<side>encoder|decoder)\.norm\.{LEAVES}", r"\g<side>.norm.\g<leaf>"),
        *projection_renames("quant_proj", "resampler.to_positions"),
        *projection_renames("post_quant_proj", "resampler.to_grid"),
        Rename(
            rf"{table}\.codebook\.weight", r"quantizer.parts.\g<part>.codebook" if parts > 1 else "quantizer.codebook"
        ),
        *under(r"decoder\.up_conv1", "decoder.from_cells", {"conv": "conv"}),
        *under(r"decoder\.up_conv2\.(?P<block>\d+)", r"decoder.stages.0.\g<block>", BOTTLENECK),
        *under(r"decoder\.up_conv3\.(?P<block>\d+)", r"decoder.stages.1.\g<block>", BOTTLENECK),
        *under(r"decoder\.up_conv4", "decoder.out", {"conv1.conv": "0.conv", "norm1": "1", "conv2": "3"}),
    )
    return Plan(config, renames, WITHOUT_EFFECT, constants={r"encoder\.pos_embed": 0.0}, files=FILES)


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `UniTok`.

    Raises:
        ValueError: a tower that nothing describes, other projections than attention, or parts that do not divide.
    """
    return _plan(upstream, causal=False)


def causal_plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `MedITok`; raises as `plan` does."""
    return _plan(upstream, causal=True)


UNITOK = Upstream(
    system="unitok",
    repository="FoundationVision/UniTok",
    licence="MIT",
    paper="arXiv 2502.20321",
    plan=plan,
)
MEDITOK = Upstream(
    system="meditok",
    repository="Masaaki-75/meditok",
    licence="MIT",
    paper="arXiv 2505.19225",
    plan=causal_plan,
)
