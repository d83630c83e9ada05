"""The EVA-CLIP tower (2211.07636) that SEED and LaVIT read pictures with: its options and its keys under our names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unimm.conversion.upstream import Rename, first, under

# EVA-CLIP-g without its last block, as BLIP-2 takes it.
EVA_G = {"patch_size": 14, "embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 4.3637, "layer_norm_eps": 1e-6}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
PARTS = {
    "norm1": "attention_norm",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}


def tower_options(tower: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The encoder socket, without what depends on who reads the features.

    Raises:
        ValueError: a picture that patches do not tile, or pooled features.
    """
    patch, width = tower["patch_size"], tower["embed_dim"]
    if image_size % patch:
        raise ValueError(f"img_size is {image_size}; patches of {patch} pixels do not tile it.")
    if tower.get("use_mean_pooling", False):
        raise ValueError("use_mean_pooling is true; a pooled tower has no features to read, convert one without it.")
    return {
        "kind": "vit",
        "patch": patch,
        "width": width,
        "depth": tower["depth"],
        "num_heads": tower["num_heads"],
        "mlp_width": int(width * tower["mlp_ratio"]),
        "eps": tower.get("layer_norm_eps", EVA_G["layer_norm_eps"]),
        "table_side": image_size // patch,
        "class_token": True,
    }


def tower_renames(source: str) -> tuple[Rename, ...]:
    """Everything up to the final norm; `source` is a pattern."""
    theirs, ours = rf"{source}\.blocks\.(?P<index>\d+)", r"encoder.blocks.\g<index>"
    return (
        *under(rf"{source}\.patch_embed", "encoder.patches", {"proj": "conv"}),
        Rename(rf"{source}\.cls_token", "encoder.class_token", first),
        Rename(rf"{source}\.pos_embed", "encoder.table", first),
        *under(theirs, ours, PARTS),
        Rename(rf"{theirs}\.attn\.qkv\.weight", f"{ours}.attention.qkv.weight"),
        Rename(rf"{theirs}\.attn\.q_bias", f"{ours}.attention.qkv.bias", with_key_bias, part=0),
        Rename(rf"{theirs}\.attn\.v_bias", f"{ours}.attention.qkv.bias", part=1),
    )


def with_key_bias(query_bias: torch.Tensor) -> torch.Tensor:
    """The query's bias `[D]` and the key's, which is zero, `[2 D]`."""
    return torch.cat([query_bias, torch.zeros_like(query_bias)])
