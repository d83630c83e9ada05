"""ResTok: convolutions, a transformer whose cells merge into levels, and one that draws from levels of codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unimm.codec import VisualCodecConfig
from unimm.codec.merging import level_sizes
from unimm.conversion.maps.eva import with_key_bias
from unimm.conversion.maps.pyramids import BLOCK, CODEBOOK, ENDS, channels, level
from unimm.conversion.maps.titok import pixel_decoder_renames
from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig, matrix, under

SIZES = {
    "small": {"width": 512, "layers": 6, "heads": 8},
    "base": {"width": 768, "layers": 12, "heads": 12},
    "large": {"width": 1024, "layers": 24, "heads": 16},
}
PIXEL_VQGAN = {"channel_mult": (1, 1, 2, 2, 4), "hidden_channels": 128, "num_res_blocks": 2, "z_channels": 256}
PERIOD = 10000
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What upstream can also be built as, and the published model is not.
FIXED = {
    "is_legacy": True,
    "merge_tokens": True,
    "residual_image_tokens": True,
    "residual_latent_tokens": True,
    "learnable_latent_tokens": False,
    "learnable_dec_image_tokens": True,
    "multi_quant": True,
    "vae_encoder": True,
    "latent_hierarchy": True,
}
# Heads that learn the features of another model, which is stored with them, and the tokens that are read there.
WITHOUT_EFFECT = (r"vf_proj.*", r"mlp_proj\..*", r"foundation_model\..*", r"decoder\.feat_mask_token")
PARTS = {
    "norm1": "attention_norm",
    "attn.q_norm": "attention.query_norm",
    "attn.k_norm": "attention.key_norm",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}


def _size(upstream: UpstreamConfig, side: str) -> Mapping[str, int]:
    name = upstream.get(f"model.vq_model.vit_{side}_model_size")
    size = upstream.literal(f"size_{name}", SIZES.get(name))
    if size is None:
        raise ValueError(f"model.vq_model.vit_{side}_model_size is {name!r}; it must be one of {', '.join(SIZES)}.")
    return size


def one_level(weight: torch.Tensor) -> torch.Tensor:
    """The linear map, or 1x1 convolution, of one level as a row of those of all."""
    return weight.flatten(1)[None] if weight.ndim > 1 else weight[None]


def only(token: torch.Tensor) -> torch.Tensor:
    """`[1, 1, D]` as `[D]`."""
    return token[0, 0]


def level_renames(theirs: str, ours: str, count: int) -> tuple[Rename, ...]:
    """A linear map per level."""
    return tuple(
        Rename(rf"{theirs}\.{part}\.{leaf}", f"{ours}.{leaf}", one_level, part=part)
        for part in range(count)
        for leaf in ("weight", "bias")
    )


def embedding_renames(theirs: str, ours: str, count: int) -> tuple[Rename, ...]:
    """A vector `[1, D]` per level."""
    return tuple(Rename(rf"{theirs}\.{part}", ours, part=part) for part in range(count))


def transformer_renames(side: str, target: str) -> tuple[Rename, ...]:
    """Norms and blocks."""
    theirs, ours = rf"{side}\.blocks\.(?P<index>\d+)", rf"{target}.blocks.\g<index>"
    return (
        *under(side, target, {"ln_pre": "norm_in", "ln_post": "norm_out"}),
        *under(theirs, ours, PARTS),
        Rename(rf"{theirs}\.gamma_1", f"{ours}.attention_scale"),
        Rename(rf"{theirs}\.gamma_2", f"{ours}.mlp_scale"),
        Rename(rf"{theirs}\.attn\.qkv\.weight", f"{ours}.attention.qkv.weight"),
        Rename(rf"{theirs}\.attn\.q_bias", f"{ours}.attention.qkv.bias", with_key_bias, part=0),
        Rename(rf"{theirs}\.attn\.v_bias", f"{ours}.attention.qkv.bias", part=1),
    )


def encoder_renames(num_grids: int, num_levels: int, num_merges: int) -> tuple[Rename, ...]:
    """Convolutions of `num_grids` sizes and the transformer behind them, up to the vectors that are quantised."""
    renames = [
        *under("pixel_encoder", "encoder", ENDS),
        *under(r"pixel_encoder\.mid\.(?P<index>\d+)", r"encoder.middle.\g<index>", BLOCK),
        Rename(r"encoder\.patch_embed\.weight", "resampler.embed.weight", matrix),
        Rename(r"encoder\.patch_embed\.bias", "resampler.embed.bias"),
        *embedding_renames(r"encoder\.level_embedding", "resampler.cell_levels", num_merges + 1),
        *embedding_renames(r"encoder\.latent_token_level_embedding", "resampler.latent_levels", num_levels),
        *transformer_renames("encoder", "resampler"),
        *level_renames(r"encoder\.conv_out", "resampler.to_positions", num_levels),
    ]
    for index in range(num_grids):
        renames += level(rf"pixel_encoder\.down\.{index}", f"encoder.levels.{index}")
    return tuple(renames)


def decoder_renames(num_grids: int, num_levels: int) -> tuple[Rename, ...]:
    """The transformer that reads codes and the convolutions behind it."""
    return (
        Rename(r"decoder\.latent_mask_token", "decoder.missing", only),
        Rename(r"decoder\.mask_token", "decoder.mask_token", only),
        *level_renames(r"decoder\.decoder_embed", "decoder.embed", num_levels),
        *embedding_renames(r"decoder\.latent_token_level_embedding", "decoder.code_levels", num_levels),
        *transformer_renames("decoder", "decoder"),
        Rename(r"decoder\.ffn\.weight", "decoder.to_grid.weight", matrix),
        Rename(r"decoder\.ffn\.bias", "decoder.to_grid.bias"),
        *pixel_decoder_renames("decoder.pixels", num_grids),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `ResTok`.

    Raises:
        ValueError: a size without a name, or a model that is built in another way than the published one.
    """
    upstream.require({f"model.vq_model.{name}": value for name, value in FIXED.items()})
    encoder, decoder = _size(upstream, "enc"), _size(upstream, "dec")
    side = upstream.get("dataset.preprocessing.crop_size", 256)
    tokens, dim = upstream.get("model.vq_model.num_latent_tokens"), upstream.get("model.vq_model.token_size")
    stages = upstream.get("model.vq_model.hierarchy_stages", 4)
    period = upstream.get("model.vq_model.rope_base_len", PERIOD)
    # Upstream has a level of cells for every stage, also where there are fewer blocks to merge in.
    wanted = [int(stage / stages * encoder["layers"]) - 1 for stage in range(1, stages)]
    merges = sorted({block for block in wanted if block >= 0})
    vqgan = {**PIXEL_VQGAN, **upstream.literal("pixel_vqgan", {})}
    pyramid: dict[str, Any] = {
        "channels": channels(vqgan["hidden_channels"], vqgan["channel_mult"]),
        "blocks": vqgan["num_res_blocks"],
        "middle_blocks": vqgan["num_res_blocks"],
        "middle_attention": False,
        "bias": False,
        "code_channels": vqgan["z_channels"],
        "shortcut": "update",
    }
    num_grids = len(vqgan["channel_mult"])
    patch = 2 ** (num_grids - 1)
    for name in ("vit_enc_patch_size", "vit_dec_patch_size"):
        if upstream.get(f"model.vq_model.{name}", patch) != patch:
            raise ValueError(f"model.vq_model.{name} is not {patch}, the pixels per cell of the convolutions.")
    rows = side // patch
    shared = {"tokens": tokens, "dim": dim, "rows": rows, "columns": rows, "period": period}
    config = VisualCodecConfig(
        image_size=side,
        pixel_range=(0.0, 1.0),
        encoder={
            "kind": "pyramid",
            **pyramid,
            "stem_channels": vqgan["hidden_channels"],
            "averaged": True,
            "out_kernel": 1,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
        resampler={
            "kind": "merging",
            **shared,
            "width": encoder["width"],
            "depth": encoder["layers"],
            "num_heads": encoder["heads"],
            "merge_in": merges,
            "reduction": upstream.get("model.vq_model.reduction_ratio", 0.5),
            "scramble": True,
        },
        quantizer={
            "kind": "vq",
            "size": upstream.get("model.vq_model.codebook_size"),
            "dim": dim,
            "normalize": upstream.get("model.vq_model.use_l2_norm"),
            "project": False,
        },
        length={"kind": "sequence", "tokens": tokens, "rows": rows, "columns": rows, "prefixes": True},
        decoder={
            "kind": "level_vit",
            **shared,
            "width": decoder["width"],
            "depth": decoder["layers"],
            "num_heads": decoder["heads"],
            "pixels": pyramid,
        },
    )
    num_levels = len(level_sizes(tokens))
    renames = (
        *encoder_renames(num_grids, num_levels, len(merges)),
        *decoder_renames(num_grids, num_levels),
        *CODEBOOK,
    )
    unused = (rf"encoder\.level_embedding\.{level}" for level in range(len(merges) + 1, len(wanted) + 1))
    return Plan(config, renames, (*WITHOUT_EFFECT, *unused))


TOKENIZER = Upstream(
    system="restok",
    repository="Kwai-Kolors/ResTok",
    licence="Apache-2.0",
    paper="arXiv 2601.03955",
    plan=plan,
    aliases=("res_tok",),
)
