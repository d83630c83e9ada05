"""LlamaGen's image tokenizer: VQGAN with a small normalised codebook; attention in the middle and on the last level."""

from __future__ import annotations

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.pyramids import (
    ATTENTION,
    BLOCK,
    CODEBOOK,
    ENDS,
    GRID_PROJECTIONS,
    any_size,
    channels,
    level,
)
from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig, WeightFile, under

DEFAULT_MULTIPLIERS = (1, 1, 2, 2, 4)
IMAGE_SIZE = 256  # of training; in no configuration
# What LlamaGen's training writes, and that of others after it, which evaluate moving averages where there are some.
FILES = (WeightFile(inside=(("ema",), ("model",))),)


def conv_block_renames(side: str, target: str = "") -> tuple[Rename, ...]:
    """The encoder's or decoder's keys; upstream counts the decoder's levels coarse to fine, as we do.

    Args:
        side: in upstream's names.
        target: in ours; by default the same.
    """
    target = target or side
    return (
        *under(side, target, ENDS),
        *under(rf"{side}\.mid\.(?P<index>\d+)", rf"{target}.middle.\g<index>", BLOCK | ATTENTION),
        *level(rf"{side}\.conv_blocks\.(?P<level>\d+)", rf"{target}.levels.\g<level>", block="res"),
        *under(
            rf"{side}\.conv_blocks\.(?P<level>\d+)\.(?:down|up)sample",
            rf"{target}.levels.\g<level>.resize",
            {"conv": "conv"},
        ),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `VQModel`."""
    width = upstream.literal("encoder_decoder_ch", 128)
    blocks = upstream.literal("num_res_blocks", 2)
    code_channels, rows = upstream.get("z_channels", 256), upstream.get("codebook_embed_dim", 8)
    encoder = channels(width, upstream.get("encoder_ch_mult", DEFAULT_MULTIPLIERS))
    decoder = channels(width, upstream.get("decoder_ch_mult", DEFAULT_MULTIPLIERS))
    config = VisualCodecConfig(
        image_size=IMAGE_SIZE,
        encoder={
            "kind": "pyramid",
            "channels": encoder,
            "blocks": blocks,
            "attention_levels": [len(encoder) - 1],
            "code_channels": code_channels,
            "stem_channels": width,
        },
        resampler={"kind": "grid", "dim": rows, "norm": False},
        quantizer={
            "kind": "vq",
            "size": upstream.get("codebook_size", 16384),
            "dim": rows,
            "normalize": upstream.get("codebook_l2_norm", True),
            "project": False,
        },
        length=any_size(IMAGE_SIZE, 2 ** (len(encoder) - 1)),
        decoder={
            "kind": "pyramid",
            "channels": decoder,
            "blocks": blocks + 1,
            "attention_levels": [len(decoder) - 1],
            "code_channels": code_channels,
        },
    )
    renames = (*conv_block_renames("encoder"), *conv_block_renames("decoder"), *GRID_PROJECTIONS, *CODEBOOK)
    return Plan(config, renames, without_effect=(r"quantize\.codebook_used",), files=FILES)


VQ = Upstream(
    system="llamagen_vq",
    repository="FoundationVision/LlamaGen",
    licence="MIT",
    paper="arXiv 2406.06525",
    plan=plan,
    aliases=("llamagen",),
)
