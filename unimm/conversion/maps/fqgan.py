"""FQGAN: a pyramid with a transformer and a codebook for each of two or three factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.llamagen import DEFAULT_MULTIPLIERS, FILES, IMAGE_SIZE, conv_block_renames
from unimm.conversion.maps.pyramids import channels
from unimm.conversion.upstream import LEAVES, Plan, Rename, Upstream, UpstreamConfig, kernel_of_points, matrix, under

BLOCK = {
    "ln_1": "attention_norm",
    "attn.out_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


@dataclass(frozen=True)
class Factors:
    """How upstream names the branches.

    Args:
        heads: the transformer of each branch, by the suffix of its other layers, in the order of encoding.
        drawn: the suffixes in the order in which the decoder reads them.
    """

    heads: Mapping[str, str]
    drawn: tuple[str, ...]


TWO = Factors({"sem": "semantic_head", "vis": "visual_head"}, ("vis", "sem"))
THREE = Factors(
    {"vis": "visual_head", "sem_mid": "semantic_head_mid", "sem_high": "semantic_head_high"},
    ("vis", "sem_mid", "sem_high"),
)


def reordered(factors: Factors) -> Callable[[torch.Tensor], torch.Tensor]:
    """A map of codes in the order of drawing, `[out, in, 1, 1]`, as one in that of encoding, `[out, in]`."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(factors.drawn, matrix(weight).chunk(len(factors.drawn), dim=1), strict=True))
        return torch.cat([parts[name] for name in factors.heads], dim=1)

    return change


def branch_renames(place: int, suffix: str, head: str) -> tuple[Rename, ...]:
    """One branch, the map before its codebook, and its codebook."""
    theirs, ours = rf"encoder\.{head}\.0", f"encoder.branches.{place}"
    block, target = rf"{theirs}\.transformer\.(?P<index>\d+)", rf"{ours}.blocks.\g<index>"
    return (
        Rename(rf"{theirs}\.positional_embedding", f"{ours}.positions"),
        *under(theirs, ours, {"ln_pre": "norm_in", "ln_post": "norm_out"}),
        *under(block, target, BLOCK),
        Rename(rf"{block}\.attn\.in_proj_(?P<leaf>weight|bias)", rf"{target}.attention.qkv.\g<leaf>"),
        Rename(rf"encoder\.norm_out_{suffix}\.{LEAVES}", rf"{ours}.norm.\g<leaf>"),
        Rename(rf"encoder\.conv_out_{suffix}\.{LEAVES}", rf"{ours}.out.\g<leaf>"),
        Rename(rf"quant_conv_{suffix}\.weight", "resampler.to_positions.weight", kernel_of_points, part=place),
        Rename(rf"quant_conv_{suffix}\.bias", "resampler.to_positions.bias", part=place),
        Rename(rf"quantize_{suffix}\.embedding\.weight", f"quantizer.parts.{place}.codebook"),
    )


def _plan(upstream: UpstreamConfig, factors: Factors) -> Plan:
    width, blocks = upstream.literal("conv_ch", 128), upstream.literal("num_res_blocks", 2)
    code_channels, rows = upstream.get("z_channels", 256), upstream.get("codebook_embed_dim", 8)
    encoder = channels(width, upstream.get("encoder_ch_mult", DEFAULT_MULTIPLIERS))
    decoder = channels(width, upstream.get("decoder_ch_mult", DEFAULT_MULTIPLIERS))
    factor, count = 2 ** (len(encoder) - 1), len(factors.heads)
    side = upstream.literal("adapter_grid", IMAGE_SIZE // factor)
    if upstream.literal("adapter_width", encoder[-1]) != encoder[-1]:
        raise ValueError(
            f"adapter_width differs from the {encoder[-1]} channels of the coarsest level; make them equal."
        )
    config = VisualCodecConfig(
        image_size=side * factor,
        encoder={
            "kind": "branches",
            "branches": count,
            "channels": encoder,
            "blocks": blocks,
            "attention_levels": [len(encoder) - 1],
            "code_channels": code_channels,
            "stem_channels": width,
            "rows": side,
            "columns": side,
            "depth": upstream.literal("adapter_layers", 6),
            "num_heads": upstream.literal("adapter_heads", 8),
        },
        resampler={"kind": "grid", "dim": count * rows, "groups": count, "norm": False},
        quantizer={
            "kind": "product",
            "sizes": [upstream.get("codebook_size", 16384)] * count,
            "dim": rows,
            "normalize": upstream.get("codebook_l2_norm", True),
            "project": False,
        },
        decoder={
            "kind": "pyramid",
            "channels": decoder,
            "blocks": blocks + 1,
            "attention_levels": [len(decoder) - 1],
            "code_channels": code_channels,
        },
    )
    branches = (
        rule
        for place, (suffix, head) in enumerate(factors.heads.items())
        for rule in branch_renames(place, suffix, head)
    )
    renames = (
        *branches,
        *conv_block_renames("encoder", "encoder.trunk"),
        *conv_block_renames("decoder"),
        Rename(r"post_quant_conv\.weight", "resampler.to_grid.weight", reordered(factors)),
        Rename(r"post_quant_conv\.bias", "resampler.to_grid.bias"),
    )
    # Heads that predict the features of teachers in training, and counts of it.
    without_effect = (r"\w*feat_pred\w*\..*", r"quantize_\w+\.codebook_used")
    return Plan(config, renames, without_effect, files=FILES)


def dual_plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `VQModel` with two branches.

    Raises:
        ValueError: branches of another width than what they read.
    """
    return _plan(upstream, TWO)


def triple_plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `VQModel` with three branches; raises as `dual_plan` does."""
    return _plan(upstream, THREE)


LICENCE = "CC-BY-NC-4.0"
DUAL = Upstream(
    system="fqgan",
    repository="showlab/FQGAN",
    licence=LICENCE,
    paper="arXiv 2411.16681",
    plan=dual_plan,
    restricted=True,
    aliases=("fqgan_dual",),
)
TRIPLE = Upstream(
    system="fqgan_triple",
    repository="showlab/FQGAN",
    licence=LICENCE,
    paper="arXiv 2411.16681",
    plan=triple_plan,
    restricted=True,
)
