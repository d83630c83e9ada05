"""AToken's pictures: the first of the four frames that it pads them to. Video and 3D stay behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.pyramids import any_size
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    blocks_last_to_first,
    kernel_of_blocks,
    under,
)

TABLE_SIDE = 16
EXPECTED = {"attn_mode": "full", "pe_mode": "joint"}
# The attention that pools a picture into one vector, for which the codec has no use.
WITHOUT_EFFECT = (r"encoder\.head\..*",)
PARTS = {
    "norm1": "attention_norm",
    "attn.to_qkv": "attention.qkv",
    "attn.to_out": "attention.out",
    "norm2": "mlp_norm",
    "mlp.mlp.0": "mlp.0",
    "mlp.mlp.2": "mlp.2",
}


def tower(upstream: UpstreamConfig, side: str, patch: int) -> dict[str, Any]:
    """The options of one side.

    Raises:
        ValueError: attention or positions that the codec does not have.
    """
    for name, known in EXPECTED.items():
        if (found := upstream.get(f"{side}_{name}", known)) != known:
            raise ValueError(f"{side}_{name} is {found!r}; this converter knows {known!r} only.")
    return {
        "kind": "joint",
        "patch": patch,
        "tower_width": upstream.get(f"{side}_model_channels"),
        "depth": upstream.get(f"{side}_num_blocks"),
        "num_heads": upstream.get(f"{side}_num_heads"),
        "mlp_width": upstream.get(f"{side}_mlp_channels"),
        "table_side": TABLE_SIDE,
        "bias": upstream.get(f"{side}_use_bias"),
        "rms_norm": upstream.get(f"{side}_use_rms_norm"),
        "query_norm": upstream.get(f"{side}_qk_rms_norm"),
        "dim": upstream.get("latent_channels"),
    }


def levels(upstream: UpstreamConfig) -> tuple[list[int], int]:
    """Levels of the channels of one code, and how many codes a position has.

    Raises:
        ValueError: a model without codes, or one whose channels have no equal levels.
    """
    if not upstream.get("use_quantizer", True) or upstream.get("quantizer_type", "fsq") != "fsq":
        raise ValueError(
            "The model has no 'fsq' quantizer; continuous latents have no codes, convert the discrete one."
        )
    groups, size = upstream.get("quantizer_num_codebooks"), upstream.get("quantizer_codebook_size")
    channels = upstream.get("latent_channels") // groups
    each = round(size ** (1 / channels))
    if each**channels != size or channels * groups != upstream.get("latent_channels"):
        raise ValueError(f"{groups} codebooks of {size} over {channels} channels each have no equal levels.")
    return [each] * channels, groups


def first_frame(frames: int, change: Callable[[torch.Tensor], torch.Tensor], axis: int) -> Callable[..., torch.Tensor]:
    """A linear map's part of the first frame, which comes first on its `axis`, further changed."""
    return lambda weight: change(weight.narrow(axis, 0, weight.shape[axis] // frames))


def tower_renames(side: str) -> tuple[Rename, ...]:
    """The keys of one side's blocks and table."""
    blocks, ours = rf"{side}\.blocks\.(?P<block>\d+)", rf"{side}.tower.blocks.\g<block>"
    return (
        *under(blocks, ours, PARTS),
        Rename(rf"{blocks}\.attn\.q_rms_norm\.gamma", f"{ours}.attention.query_norm.weight"),
        Rename(rf"{blocks}\.attn\.k_rms_norm\.gamma", f"{ours}.attention.key_norm.weight"),
        Rename(rf"{side}\.pos_embedder\.position_embedding\.weight", f"{side}.tower.table"),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `AutoencoderKL` with an FSQ quantizer.

    Raises:
        ValueError: cells that are not square, or as `tower` and `levels`.
    """
    frames, patch, columns = upstream.get("patch_size")
    if patch != columns:
        raise ValueError(f"patch_size is {[frames, patch, columns]}; the last two must be equal.")
    each, groups = levels(upstream)
    dim = upstream.get("latent_channels")
    config = VisualCodecConfig(
        image_size=TABLE_SIDE * patch,
        encoder=tower(upstream, "encoder", patch),
        resampler={"kind": "grid", "dim": dim, "norm": False, "project": False},
        quantizer={"kind": "fsq", "levels": each, "groups": groups, "project": False},
        length=any_size(TABLE_SIDE * patch, patch),
        decoder=tower(upstream, "decoder", patch),
    )
    pixels = first_frame(frames, blocks_last_to_first(patch), axis=0)
    renames = (
        Rename(
            r"encoder\.input_layer\.weight",
            "encoder.patches.conv.weight",
            first_frame(frames, kernel_of_blocks(patch), axis=1),
        ),
        Rename(r"encoder\.input_layer\.bias", "encoder.patches.conv.bias"),
        *tower_renames("encoder"),
        Rename(rf"encoder\.post_layernorm\.{LEAVES}", r"encoder.tower.norm.\g<leaf>"),
        Rename(r"proj\.weight", "encoder.to_latents.weight", lambda weight: weight[:dim]),  # mean, then log-variance
        *under("decoder", "decoder", {"input_layer": "embed"}),
        *tower_renames("decoder"),
        Rename(rf"decoder\.out_norm\.{LEAVES}", r"decoder.tower.norm.\g<leaf>"),
        Rename(rf"decoder\.out_layer\.{LEAVES}", r"decoder.to_pixels.\g<leaf>", pixels),
    )
    return Plan(config, renames, WITHOUT_EFFECT)


TOKENIZER = Upstream(
    system="atoken",
    repository="apple/ml-atoken",
    licence="Apple sample-code licence (code); released weights for scientific research only",
    paper="arXiv 2509.14476",
    plan=plan,
    restricted=True,
    aliases=("ml_atoken", "atoken_sod"),
)
