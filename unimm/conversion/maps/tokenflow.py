"""TokenFlow: a SigLIP tower and a pyramid, quantised together by one index over scales."""

from __future__ import annotations

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.evotok import (
    INPUT_STATISTICS,
    pixel_options,
    pixel_renames,
    reader_options,
    reader_renames,
    tower_config,
    tower_options,
    tower_renames,
    tower_without_effect,
)
from unimm.conversion.maps.llamagen import DEFAULT_MULTIPLIERS, FILES, conv_block_renames
from unimm.conversion.maps.pyramids import channels
from unimm.conversion.upstream import LEAVES, Plan, Rename, Upstream, UpstreamConfig, under

SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)
IMAGE_SIZE = 384


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `TokenFlow` over a SigLIP tower.

    Raises:
        ValueError: a tower that nothing describes, rows that are not normalised, or another factor between pixels and
            cells than the pyramid has.
    """
    upstream.require({"codebook_l2_norm": True})
    tower = tower_config(upstream)
    meaning, pixels = upstream.get("semantic_code_dim", 32), upstream.get("codebook_embed_dim", 8)
    width, sides = upstream.literal("conv_ch", 128), list(upstream.literal("scale_rq_layers", SIDES))
    levels = channels(width, upstream.get("encoder_ch_mult", DEFAULT_MULTIPLIERS))
    stride = upstream.literal("pixel_branch_stride", 2 ** (len(levels) - 1))
    if stride != 2 ** (len(levels) - 1):
        raise ValueError(f"pixel_branch_stride is {stride}; {len(levels)} levels make {2 ** (len(levels) - 1)} of it.")
    config = VisualCodecConfig(
        image_size=tower["image_size"],
        encoder={
            "kind": "pair",
            "tower": tower_options(tower),
            "tower_dim": meaning,
            "pyramid": {
                "channels": levels,
                "blocks": upstream.literal("num_res_blocks", 2),
                "attention_levels": [len(levels) - 1],
                "code_channels": upstream.get("z_channels", 256),
                "stem_channels": width,
            },
            "pyramid_dim": pixels,
        },
        resampler={"kind": "grid", "dim": meaning + pixels, "norm": False, "project": False},
        quantizer={
            "kind": "scales",
            "sides": sides,
            "size": upstream.get("codebook_size", 32768),
            "dim": meaning + pixels,
            "parts": [meaning, pixels],
            "project": False,
        },
        length={"kind": "levels", "sides": sides},
        decoder={
            "kind": "dual",
            "pixel_dim": pixels,
            "pixels_first": False,
            "pixels": pixel_options(upstream),
            "features": reader_options(upstream, tower, meaning),
            "side": upstream.literal("output_size", IMAGE_SIZE),
        },
    )
    renames = (
        *tower_renames("encoder.tower"),
        *under("encode_task_layer", "encoder.from_tower", {"0": "0", "2": "2"}),
        *conv_block_renames("encoder", "encoder.pyramid"),
        Rename(rf"quant_conv\.{LEAVES}", r"encoder.from_pyramid.\g<leaf>"),
        Rename(r"quantize\.embedding_vqkd\.weight", "quantizer.codebook.codebook", part=0, axis=1),
        Rename(r"quantize\.embedding_vqgan\.weight", "quantizer.codebook.codebook", part=1, axis=1),
        *reader_renames(),
        *pixel_renames(),
    )
    without_effect = (*tower_without_effect(tower), r"quantize\.codebook_used")
    return Plan(config, renames, without_effect, INPUT_STATISTICS, files=FILES)


TOKENIZER = Upstream(
    system="tokenflow",
    repository="ByteVisionLab/TokenFlow",
    licence="Apache-2.0",
    paper="arXiv 2412.03069",
    plan=plan,
)
