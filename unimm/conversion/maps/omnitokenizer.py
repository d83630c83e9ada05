"""OmniTokenizer's pictures: a film of one frame. What later frames need stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unimm.codec import VisualCodecConfig
from unimm.conversion.upstream import (
    LEAVES,
    LIGHTNING_FILES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    kernel_of_lines,
    under,
)

SIDES = {"encoder": "enc", "decoder": "dec"}
KINDS = {"t": False, "w": True}  # whether a block sees windows
WITHOUT = {
    "use_vae": (False, "continuous latents have no codes, convert the model with a codebook"),
    "use_external_codebook": (False, "its codebook is of another library"),
    "patch_embed": ("linear", "patches of the other kind are not known"),
    "defer_temporal_pool": (False, "frames are not pooled here"),
    "defer_spatial_pool": (False, "cells are not pooled here"),
    "gen_upscale": (None, "pictures are drawn at the size at which they are read"),
    "spatial_pos": (
        "rope",
        "the biases of 'rel' count or not by the version of PyTorch that a release was trained with",
    ),
}
# Of later frames, of the scores of attention over one moment, of training, and a table that follows from its side.
WITHOUT_EFFECT = (
    r"encoder\.to_patch_emb\..*",
    r"decoder\.to_pixels\..*",
    r".*_temporal_transformer\.layers\.\d+\.1\.(?:norm\..*|to_q\.weight|[qk]_scale)",
    r".*\.(?:context_norm|spatial_rel_pos_bias)\..*",
    r".*\.relative_position_index",
    r"codebook\.(?:N|z_avg|codebook_usage)",
    r"(?:image|video)_discriminator\..*",
    r"perceptual_model\..*",
)
NORMS = {"gamma": "weight", "beta": "bias"}
VALUE, OWN_MOMENT, MIDDLE_MOMENT = 1, 2, 1


def options(upstream: UpstreamConfig, side: str) -> dict[str, Any]:
    """The options of one side.

    Raises:
        ValueError: blocks that change the grid.
    """
    pattern = upstream.get(f"{SIDES[side]}_block", "t" * upstream.get("spatial_depth"))
    if not set(pattern) <= set(KINDS):
        raise ValueError(f"{SIDES[side]}_block is {pattern!r}; this converter knows blocks 't' and 'w'.")
    width = upstream.get("embedding_dim")
    return {
        "kind": "frame",
        "patch": upstream.get("patch_size"),
        "width": width,
        "num_heads": upstream.get("heads"),
        "head_width": upstream.get("dim_head"),
        "mlp_width": int(upstream.get("ff_mult", 4.0) * (2 / 3) * width),
        "windows": [upstream.get("twod_window_size", 4) * KINDS[kind] for kind in pattern],
        "moments": upstream.get("temporal_depth"),
    }


def moment(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """One moment of a kernel `[D, 1, time, rows, columns]`."""
    return lambda kernel: kernel[:, :, index]


def transformer_renames(source: str, target: str, *, moment_index: int) -> tuple[Rename, ...]:
    """What the blocks over space and over time share."""
    theirs, ours = rf"{source}\.layers\.(?P<block>\d+)", rf"{target}.blocks.\g<block>"
    return (
        Rename(rf"{theirs}\.0\.dsconv\.weight", f"{ours}.beside.weight", moment(moment_index)),
        Rename(rf"{theirs}\.0\.dsconv\.bias", f"{ours}.beside.bias"),
        *under(theirs, ours, {r"1\.to_out": "attention.out", r"1\.proj": "attention.out"}),
        *under(theirs, ours, {r"3\.0": "mlp_norm", r"3\.1": "up", r"3\.4": "down"}),
        *(Rename(rf"{source}\.norm_out\.{name}", f"{target}.norm.{leaf}") for name, leaf in NORMS.items()),
    )


def side_renames(side: str, *, moment_index: int) -> tuple[Rename, ...]:
    """The keys of both transformers of one side."""
    space, time = (rf"{side}\.{SIDES[side]}_{name}_transformer" for name in ("spatial", "temporal"))
    theirs, ours = rf"{space}\.layers\.(?P<block>\d+)\.1", rf"{side}.space.blocks.\g<block>.attention"
    single = {
        "to_q.weight": "query.weight",
        "to_kv.weight": "key_value.weight",
        "q_scale": "query_scale",
        "k_scale": "key_scale",
        "qkv.weight": "qkv.weight",
        "relative_position_bias_table": "bias",
    }
    return (
        *transformer_renames(space, f"{side}.space", moment_index=moment_index),
        *transformer_renames(time, f"{side}.time", moment_index=moment_index),
        *(Rename(rf"{theirs}\.norm\.{name}", f"{ours}.norm.{leaf}") for name, leaf in NORMS.items()),
        *(Rename(rf"{theirs}\.{name}", f"{ours}.{other}") for name, other in single.items()),
        Rename(
            rf"{time}\.layers\.(?P<block>\d+)\.1\.to_kv\.weight",
            rf"{side}.time.blocks.\g<block>.attention.value.weight",
            lambda weight: weight.chunk(2)[VALUE],
        ),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `VQGAN`.

    Raises:
        ValueError: a part that the codec does not have.
    """
    for name, (known, reason) in WITHOUT.items():
        if (found := upstream.get(name, "rel" if name == "spatial_pos" else known)) != known:
            raise ValueError(f"{name} is {found!r} and this converter knows {known!r}: {reason}.")
    dim = upstream.get("codebook_dim")
    # Released configurations spell the switch both ways.
    causal = upstream.get("causal_in_peg", upstream.get("casual_in_peg", True))
    moment_index = OWN_MOMENT if causal else MIDDLE_MOMENT
    config = VisualCodecConfig(
        image_size=upstream.get("resolution"),
        pixel_range=tuple(upstream.field("pixel_range", (-0.5, 0.5))),
        encoder=options(upstream, "encoder"),
        resampler={"kind": "grid", "dim": dim, "norm": False},
        quantizer={
            "kind": "vq",
            "size": upstream.get("n_codes"),
            "dim": dim,
            "normalize": upstream.get("l2_code"),
            "raw_rows": True,
            "project": False,
        },
        decoder=options(upstream, "decoder"),
    )
    renames = (
        *under(r"encoder\.to_patch_emb_first_frame", "encoder.embed", {"1": "0", "2": "1", "3": "2"}),
        *side_renames("encoder", moment_index=moment_index),
        Rename(r"pre_vq_conv\.1\.weight", "resampler.to_positions.weight", kernel_of_lines),
        Rename(r"pre_vq_conv\.1\.bias", "resampler.to_positions.bias"),
        Rename(r"codebook\.embeddings", "quantizer.codebook"),
        *under(r"post_vq_conv", "resampler", {"1": "to_grid"}),
        *side_renames("decoder", moment_index=moment_index),
        Rename(rf"decoder\.to_pixels_first_frame\.0\.{LEAVES}", r"decoder.to_pixels.\g<leaf>"),
    )
    return Plan(config, renames, WITHOUT_EFFECT, files=LIGHTNING_FILES)


TOKENIZER = Upstream(
    system="omnitokenizer",
    repository="FoundationVision/OmniTokenizer",
    licence="MIT",
    paper="arXiv 2406.09399",
    plan=plan,
    aliases=("omni_tokenizer",),
)
