"""EvoTok: one chain of residuals over a SigLIP tower; its first codes draw, all of them together mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.eva import with_key_bias
from unimm.conversion.maps.llamagen import DEFAULT_MULTIPLIERS, FILES, conv_block_renames
from unimm.conversion.maps.pyramids import channels
from unimm.conversion.maps.tar import EPS, layer_renames
from unimm.conversion.maps.tar import TOWERS as TAR_TOWERS
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    first,
    kernel_of_lines,
    matrix,
    under,
)

TOWERS: dict[str, Mapping[str, Any]] = {
    "siglip_256": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 256,
        "patch_size": 16,
    },
    "siglip_384": TAR_TOWERS["google/siglip2-so400m-patch14-384"],
}
TOWER = r"encoder_vqkd(?:\.vision_model)?"
READER = {"num_heads": 12, "depth": 3}
READER_EPS = 1e-6
READER_PARTS = {
    "norm1": "attention_norm",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
INPUT_STATISTICS = {r"scaling_layer\.(?:scale|shift)": 0.5}


def tower_config(upstream: UpstreamConfig) -> Mapping[str, Any]:
    """Sizes of the SigLIP tower.

    Raises:
        ValueError: a tower that nothing describes.
    """
    name = upstream.get("teacher")
    tower = upstream.field("teacher_vision_config", TOWERS.get(name))
    if tower is None:
        raise ValueError(
            f"teacher is {name!r} and config.json has no teacher_vision_config; known towers: {', '.join(TOWERS)}."
        )
    return tower


def tower_options(tower: Mapping[str, Any]) -> dict[str, Any]:
    """The ViT that gives the tower's last hidden state but one."""
    return {
        "patch": tower["patch_size"],
        "width": tower["hidden_size"],
        "depth": tower["num_hidden_layers"] - 1,
        "num_heads": tower["num_attention_heads"],
        "mlp_width": tower["intermediate_size"],
        "eps": tower.get("layer_norm_eps", EPS),
        "table_side": tower["image_size"] // tower["patch_size"],
        "final_norm": False,
        "tanh_gelu": True,
        "drop_margin": tower["image_size"] % tower["patch_size"] > 0,
    }


def tower_without_effect(tower: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys behind the hidden state that is read."""
    last = tower["num_hidden_layers"] - 1
    return (rf"{TOWER}\.encoder\.layers\.{last}\..*", rf"{TOWER}\.(?:post_layernorm|head)\..*")


def tower_renames(target: str) -> tuple[Rename, ...]:
    """The tower up to that state."""
    return (
        *under(rf"{TOWER}\.embeddings", f"{target}.patches", {"patch_embedding": "conv"}),
        Rename(rf"{TOWER}\.embeddings\.position_embedding\.weight", f"{target}.table"),
        *layer_renames(TOWER, target),
    )


def reader_options(upstream: UpstreamConfig, tower: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """The decoder of features over `dim` channels."""
    reader = {**READER, **upstream.literal("decoder_vqkd", {})}
    return {
        "dim": dim,
        "width": tower["hidden_size"],
        "depth": reader["depth"],
        "num_heads": reader["num_heads"],
        "mlp_width": 4 * tower["hidden_size"],
        "eps": READER_EPS,
        "table_side": tower["image_size"] // tower["patch_size"],
        "class_token": True,
        "tanh_gelu": False,
    }


def reader_renames() -> tuple[Rename, ...]:
    """The decoder of features."""
    theirs, ours = r"decoder_vqkd\.blocks\.(?P<index>\d+)", r"decoder.tower.blocks.\g<index>"
    return (
        Rename(r"decoder_vqkd\.patch_embed\.proj\.weight", "decoder.tower.embed.weight", matrix),
        Rename(r"decoder_vqkd\.patch_embed\.proj\.bias", "decoder.tower.embed.bias"),
        Rename(r"decoder_vqkd\.cls_token", "decoder.tower.class_token", first),
        Rename(r"decoder_vqkd\.pos_embed", "decoder.tower.table", first),
        *under(theirs, ours, READER_PARTS),
        Rename(rf"{theirs}\.attn\.qkv\.weight", f"{ours}.attention.qkv.weight"),
        Rename(rf"{theirs}\.attn\.q_bias", f"{ours}.attention.qkv.bias", with_key_bias, part=0),
        Rename(rf"{theirs}\.attn\.v_bias", f"{ours}.attention.qkv.bias", part=1),
        *under("decoder_vqkd", "decoder.tower", {"fc_norm": "norm"}),
        *under("decode_task_layer", "decoder.tower.head", {"0": "0", "2": "2"}),
    )


def pixel_options(upstream: UpstreamConfig) -> dict[str, Any]:
    """The decoder of pixels."""
    width = upstream.literal("conv_ch", 128)
    levels = channels(width, upstream.get("decoder_ch_mult", DEFAULT_MULTIPLIERS))
    return {
        "channels": levels,
        "blocks": upstream.literal("num_res_blocks", 2) + 1,
        "attention_levels": [len(levels) - 1],
        "code_channels": upstream.get("z_channels", 256),
    }


def pixel_renames() -> tuple[Rename, ...]:
    """The decoder of pixels and the map before it."""
    return (
        Rename(rf"post_quant_conv\.{LEAVES}", r"decoder.from_vectors.\g<leaf>"),
        *conv_block_renames("decoder", "decoder.pixels"),
    )


def without_padding_row(table: torch.Tensor) -> torch.Tensor:
    """A codebook without its last row, which no code stands for."""
    return table[:-1].contiguous()


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `EvoTok`.

    Raises:
        ValueError: a tower that nothing describes.
    """
    tower, dim = tower_config(upstream), upstream.get("codebook_embed_dim")
    depth = upstream.get("vqkd_depth")
    config = VisualCodecConfig(
        image_size=tower["image_size"],
        encoder={"kind": "vit", **tower_options(tower)},
        resampler={
            "kind": "grid",
            "dim": dim,
            "norm": False,
            "tanh_width": tower["hidden_size"],
            "project_back": False,
        },
        quantizer={
            "kind": "residual",
            "size": upstream.get("codebook_size"),
            "dim": dim,
            "depth": depth,
            "taps": [upstream.get("vqgan_depth"), depth],
            "normalize": False,
            "project": False,
        },
        decoder={
            "kind": "dual",
            "pixel_dim": dim,
            "pixels": pixel_options(upstream),
            "features": reader_options(upstream, tower, dim),
        },
    )
    renames = (
        *tower_renames("encoder"),
        *under("encode_task_layer", "resampler.before", {"0": "0"}),
        Rename(r"encode_task_layer\.2\.weight", "resampler.to_positions.weight", kernel_of_lines),
        Rename(r"encode_task_layer\.2\.bias", "resampler.to_positions.bias"),
        Rename(
            r"quantize\.codebooks\.(?P<index>\d+)\.weight",
            r"quantizer.codebooks.\g<index>.codebook",
            without_padding_row,
        ),
        *reader_renames(),
        *pixel_renames(),
    )
    counts = (r"quantize\.codebooks\.\d+\.(?:cluster_size|embed)_ema", r"quantize\.codebook_used")
    return Plan(config, renames, (*tower_without_effect(tower), *counts), INPUT_STATISTICS, files=FILES)


TOKENIZER = Upstream(
    system="evotok",
    repository="VisionXLab/EvoTok",
    licence="no licence file, all rights reserved",
    paper="arXiv 2603.12108",
    plan=plan,
    restricted=True,
)
