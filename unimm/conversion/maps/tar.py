"""Tar's TA-Tok: a SigLIP2 tower, codes in a mapped table, and a decoder that rebuilds the tower's features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unimm.codec import VisualCodecConfig
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    WeightFile,
    kernel_of_lines,
    read_config,
    under,
)
from unimm.conversion.weights import unpickled
from unimm.files import atomic_write

TOWERS = {
    "google/siglip2-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
DECODER = {"num_attention_heads": 12, "intermediate_size": 3072, "num_patches": 256}
CODEC_FILE = "ta_tok.pth"
CODEC_KEYS = ("model", "sd")  # of the weights in it
POOLS = (1, 2, 3)
EPS = 1e-6
PARTS = {
    "layer_norm1": "attention_norm",
    "self_attn.out_proj": "attention.out",
    "layer_norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}


def read(source: Path) -> dict[str, Any]:
    """Upstream's configuration; where there is no `config.json`, as the file of the weights holds it."""
    if (source / CODEC_FILE).is_file() and not (source / "config.json").is_file():
        return {"args": stored_args(source)}
    return read_config(source)


def stored_args(source: Path) -> dict[str, Any]:
    """The tokenizer's sizes, which stand in its file beside the weights."""
    return dict(unpickled(source / CODEC_FILE)["model"]["args"])


def restore_args(args: Mapping[str, Any], folder: Path) -> None:
    """Put the tokenizer's sizes back into its file, where it is in the folder."""
    file = folder / CODEC_FILE
    if not file.is_file():
        return
    whole = unpickled(file)
    whole["model"]["args"] = dict(args)
    with atomic_write(file) as temporary:
        torch.save(whole, temporary)


def _tower(upstream: UpstreamConfig) -> Mapping[str, Any]:
    name = upstream.get("teacher", next(iter(TOWERS)))
    tower = upstream.field("teacher_vision_config", TOWERS.get(name))
    if tower is None:
        raise ValueError(
            f"teacher is {name!r} and config.json has no teacher_vision_config; known towers: {', '.join(TOWERS)}."
        )
    return tower


def layer_renames(source: str, target: str) -> tuple[Rename, ...]:
    """The blocks of a SigLIP tower, whose query, key and value are one map here."""
    source, target = source + r"\.encoder\.layers\.(?P<index>\d+)", target + r".blocks.\g<index>"
    fused = (
        Rename(rf"{source}\.self_attn\.{name}_proj\.{LEAVES}", rf"{target}.attention.qkv.\g<leaf>", part=part)
        for part, name in enumerate("qkv")
    )
    return (*under(source, target, PARTS), *fused)


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `TextAlignedTokenizer`, with deterministic codes.

    Raises:
        ValueError: a tower that nothing describes, or a bottleneck other than SimVQ.
    """
    tower, bottleneck, regularizer = _tower(upstream), "bottleneck.args", "bottleneck.args.regularizer"
    kind, norm = upstream.get(f"{regularizer}.name"), upstream.get(f"{bottleneck}.norm", "none")
    if kind != "simvq" or norm != "none":
        raise ValueError(f"The bottleneck is {kind!r} with norm {norm!r}; only 'simvq' with norm 'none' is converted.")
    size, patch, width = upstream.get("input_size", 384), tower["patch_size"], tower["hidden_size"]
    side, dim = size // patch, upstream.get(f"{bottleneck}.bottleneck_dim")
    layer = upstream.get("select_layer_id", -2)
    layers = tower["num_hidden_layers"] + 1 + layer if layer < 0 else layer
    decoder = {**DECODER, **upstream.literal("decoder_config_overrides", {})}
    depth = upstream.get("decoder_depth", 3)
    config = VisualCodecConfig(
        image_size=size,
        pixel_range=(0.0, 1.0),
        resize=True,
        encoder={
            "kind": "vit",
            "patch": patch,
            "width": width,
            "depth": layers,
            "num_heads": tower["num_attention_heads"],
            "mlp_width": tower["intermediate_size"],
            "eps": tower.get("layer_norm_eps", EPS),
            "table_side": tower["image_size"] // patch,
            "final_norm": False,
            "tanh_gelu": True,
            "drop_margin": size % patch > 0,
            "mean": 0.5,
            "std": 0.5,
        },
        resampler={"kind": "grid", "dim": dim, "norm": False, "tanh_width": width},
        quantizer={
            "kind": "vq",
            "size": upstream.get(f"{regularizer}.args.codebook_size"),
            "dim": dim,
            "normalize": upstream.get(f"{regularizer}.args.l2_normalized", False),
            "project": False,
            "map_rows": True,
        },
        length={
            "kind": "pooled",
            "rows": side,
            "columns": side,
            "pools": list(upstream.field("pool_scales", POOLS)),
        },
        decoder={
            "kind": "feature_vit",
            "dim": dim,
            "width": width,
            "depth": depth,
            "num_heads": decoder["num_attention_heads"],
            "mlp_width": decoder["intermediate_size"],
            "eps": tower.get("layer_norm_eps", EPS),
            "table_side": round(decoder["num_patches"] ** 0.5),
        },
    )
    renames = (
        *under(r"encoder\.embeddings", "encoder.patches", {"patch_embedding": "conv"}),
        Rename(r"encoder\.embeddings\.position_embedding\.weight", "encoder.table"),
        *layer_renames("encoder", "encoder"),
        *under("encode_task_layer", "resampler.before", {"0": "0"}),
        Rename(r"bottleneck\.in_linear\.weight", "resampler.to_positions.weight", kernel_of_lines),
        Rename(r"bottleneck\.in_linear\.bias", "resampler.to_positions.bias"),
        *under("bottleneck", "resampler", {"out_linear": "to_grid"}),
        Rename(r"bottleneck\.regularizer\.embedding\.weight", "quantizer.codebook"),
        *under(r"bottleneck\.regularizer", "quantizer", {"embedding_proj": "row_map"}),
        *under(r"decoder\.(?:vision_model\.)?embeddings", "decoder", {"patch_embedding": "embed"}),
        Rename(r"decoder\.(?:vision_model\.)?embeddings\.position_embedding\.weight", "decoder.table"),
        *layer_renames(r"decoder(?:\.vision_model)?", "decoder"),
        *under(r"decoder(?:\.vision_model)?", "decoder", {"post_layernorm": "norm"}),
        *under("decode_task_layer", "decoder.head", {"0": "0", "2": "2"}),
    )
    unread = "|".join(map(str, range(layers, tower["num_hidden_layers"]))) or "none"
    without_effect = (
        rf"encoder\.encoder\.layers\.(?:{unread})\..*",
        r"encoder\.(?:post_layernorm|head)\..*",
        r"decoder\.(?:vision_model\.)?head\..*",
        r"bottleneck\.regularizer\.stochastic_temperature_inv",  # learned where codes are drawn by chance
    )
    constants = {r"scale_layer\.(?:scale|shift)": 0.5}
    files = (WeightFile(inside=(CODEC_KEYS,)),)
    return Plan(config, renames, without_effect, constants=constants, stretch=True, files=files)


TA_TOK = Upstream(
    system="ta_tok",
    repository="csuhan/Tar",
    licence="Apache-2.0 according to the README, no licence file",
    paper="arXiv 2506.18898",
    plan=plan,
    restricted=True,
    aliases=("tatok",),
    read=read,
    restore_rest=lambda fields, _source, folder: restore_args(fields.get("args", fields), folder),
)
