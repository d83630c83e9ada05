"""KARL: latents that read a picture and its VQGAN codes under an allowed error, and halt where they are not needed."""

from __future__ import annotations

from typing import Any

import torch

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.pyramids import BLOCK, CODEBOOK, ENDS, channels, level
from unimm.conversion.maps.titok import PARTS
from unimm.conversion.upstream import LEAVES, Plan, Rename, Upstream, UpstreamConfig, first, under

# What upstream's code holds as literals.
GRID = "16x16"
TOKENS, BUDGET = 512, 256
HALTING_WIDTH = 512
ERROR = 0.05
# Known of the allowed errors: there are 19, from 0.005 to 0.38; 0.05 leads to the sixth and 0.2 to the fifteenth. The
# others are round numbers between these.
ERRORS = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09),
    *(0.1, 0.12, 0.14, 0.16, 0.2, 0.24, 0.28, 0.32, 0.38),
)
# The VQGAN of MAGE (2211.09117, MIT), whose code names the tensors as KARL's checkpoints do.
VQGAN = {"codebook_size": 1024, "embed_dim": 256}
NETWORK = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2}
BASE = "base_tokenizer.vqgan."
BASE_KEYS = r"base_tokenizer\.vqgan\."


def cells_of_table(table: torch.Tensor) -> torch.Tensor:
    """Positions `[D, rows, columns]` in raster order, `[rows * columns, D]`."""
    return table.flatten(1).T.contiguous()


def kernel_of_cells(weight: torch.Tensor) -> torch.Tensor:
    """A linear map's `[out, in]` as a 1x1 convolution, `[out, in, 1, 1]`."""
    return weight[..., None, None]


def blocks(source: str, target: str) -> tuple[Rename, ...]:
    """A transformer's; upstream's names are TiTok's."""
    return tuple(
        Rename(rf"{source}\.transformer\.(\d+)\.{theirs}(weight|bias)", rf"{target}.blocks.\1.{ours}\2")
        for theirs, ours in PARTS.items()
    )


def base_renames(num_levels: int) -> tuple[Rename, ...]:
    """The VQGAN: its table, its encoder, its decoder, whose levels upstream counts fine to coarse."""
    encoder, decoder = ("encoder", "encoder.base"), ("decoder", "decoder.head.pixels")
    renames = [Rename(BASE_KEYS + CODEBOOK[0].pattern, "decoder.head.rows")]
    for theirs, ours in (encoder, decoder):
        renames += under(BASE_KEYS + theirs, ours, ENDS)
        for place in (1, 2):
            renames += under(rf"{BASE_KEYS}{theirs}\.mid\.block_{place}", f"{ours}.middle.{place - 1}", BLOCK)
    for index in range(num_levels):
        renames += level(rf"{BASE_KEYS}encoder\.down\.{index}", f"{encoder[1]}.levels.{index}")
        up, ours = rf"{BASE_KEYS}decoder\.up\.{index}", f"{decoder[1]}.levels.{num_levels - 1 - index}"
        renames += (*level(up, ours), *under(rf"{up}\.upsample", f"{ours}.resize", {"conv": "conv"}))
    return tuple(renames)


def renames(num_levels: int) -> tuple[Rename, ...]:
    return (
        Rename(rf"patch_embed\.{LEAVES}", r"encoder.patches.conv.\g<leaf>"),
        Rename("rec_loss_embeddings", "resampler.errors"),
        Rename("encoder_positional_embedding", "resampler.positions", cells_of_table),
        Rename("latent_tokens", "resampler.queries"),
        Rename(rf"encoder_ln_pre\.{LEAVES}", r"resampler.norm_in.\g<leaf>"),
        *blocks("encoder", "resampler"),
        Rename(rf"encoder_ln_post\.{LEAVES}", r"resampler.norm_out.\g<leaf>"),
        Rename(rf"pre_quantizer_mlp\.{LEAVES}", r"resampler.to_positions.\g<leaf>"),
        Rename(rf"encoder_ln_post_halt\.{LEAVES}", r"resampler.norm_halting.\g<leaf>"),
        *under("halting_mlp", "resampler.to_halting", {"0": "0", "2": "2"}),
        *CODEBOOK,
        Rename(rf"decoder_embed\.{LEAVES}", r"decoder.embed.\g<leaf>"),
        Rename("decoder_latent_tokens_timestep_embed", "decoder.code_positions"),
        Rename("decoder_mask_token", "decoder.mask_token", first),
        Rename("decoder_positional_embedding", "decoder.positions", cells_of_table),
        *under("decoder", "decoder", {"ln_pre": "norm_in", "ln_post": "norm_out"}),
        *blocks("decoder", "decoder"),
        Rename(r"decoder\.ffn\.(?P<layer>0|2)\.weight", r"decoder.head.to_scores.\g<layer>.weight", kernel_of_cells),
        Rename(r"decoder\.ffn\.(?P<layer>0|2)\.bias", r"decoder.head.to_scores.\g<layer>.bias"),
        *base_renames(num_levels),
    )


def grid_side(upstream: UpstreamConfig) -> int:
    """Cells per side of a picture.

    Raises:
        ValueError: a picture that is no square.
    """
    rows, columns = map(int, str(upstream.literal("grid", GRID)).split("x"))
    if rows != columns:
        raise ValueError(f"grid is {rows}x{columns}; only models of square pictures are converted.")
    return rows


def vqgan(upstream: UpstreamConfig) -> tuple[int, dict[str, Any]]:
    """Rows of the VQGAN's table, and what its two sides share."""
    sizes = {**VQGAN, **upstream.field("base_tokenizer", {})}
    network = {**NETWORK, **sizes.get("ddconfig", {})}
    return sizes["codebook_size"], {
        "channels": channels(network["ch"], network["ch_mult"]),
        "blocks": network["num_res_blocks"],
        "middle_attention": False,
        "bias": False,
        "code_channels": sizes["embed_dim"],
        "shortcut": "update",
    }


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `KARLTokenizer` over a VQGAN.

    Raises:
        ValueError: pictures that are no squares.
    """
    side, patch = grid_side(upstream), upstream.get("patch_size", 16)
    dim, table_side = upstream.get("vq_token_dim"), upstream.get("max_grid_tokens", 64)
    base_codes, base = vqgan(upstream)
    stem = upstream.field("base_tokenizer.ddconfig.ch", NETWORK["ch"])
    tokens = upstream.literal("latent_tokens", TOKENS)
    config = VisualCodecConfig(
        image_size=side * patch,
        pixel_range=(0.0, 1.0),
        encoder={
            "kind": "patches_and_codes",
            "patch": patch,
            "patch_width": upstream.get("encoder_width") - base["code_channels"],
            "base": {**base, "stem_channels": stem, "averaged": True, "out_kernel": 1},
            "base_codes": base_codes,
        },
        resampler={
            "kind": "halting",
            "tokens": tokens,
            "dim": dim,
            "depth": upstream.get("encoder_num_layers"),
            "num_heads": upstream.get("encoder_num_heads"),
            "table_side": table_side,
            "allowed_errors": ERRORS,
            "allowed_error": ERROR,
            "halting_width": upstream.literal("halting_width", HALTING_WIDTH),
        },
        quantizer={
            "kind": "vq",
            "size": upstream.get("vq_codebook_size"),
            "dim": dim,
            "normalize": upstream.get("vq_use_l2_norm", True),
            "project": False,
        },
        length={"kind": "halted", "rows": side, "columns": side, "tokens": tokens, "budget": min(BUDGET, tokens)},
        decoder={
            "kind": "kept_vit",
            "dim": dim,
            "tokens": tokens,
            "rows": side,
            "columns": side,
            "width": upstream.get("decoder_width"),
            "depth": upstream.get("decoder_num_layers"),
            "num_heads": upstream.get("decoder_num_heads"),
            "table_side": table_side,
            "soft_codebook": {"size": base_codes, "pyramid": base},
        },
    )
    return Plan(
        config,
        renames(len(base["channels"])),
        copies={"encoder.base_rows": "decoder.head.rows"},
        parts={BASE + name: f"the {name} of the VQGAN below KARL" for name in ("encoder.", "decoder.")},
    )


TOKENIZER = Upstream(
    system="karl",
    repository="ShivamDuggal4/karl",
    licence="no licence file, all rights reserved",
    paper="arXiv 2507.07995",
    plan=plan,
    restricted=True,
)
