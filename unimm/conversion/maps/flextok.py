"""FlexTok: registers over the latents of a VAE, rounded, and a rectified flow that draws such latents from them."""

from __future__ import annotations

import torch

from unimm.codec import VisualCodecConfig
from unimm.codec.vae import VaeConfig, stock_fields
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    blocks_last_to_first,
    cells_of_grid,
    kernel_of_blocks,
)

ENCODER, DECODER = r"encoder\.module_dict", r"decoder\.module_dict"
VAE = r"vae\.vae\."  # the stock one whose latents the codec reads and draws


def mlp_width(width: int) -> int:
    """Of a gated MLP with as many weights as a plain one of 4 `width`."""
    return int(2 / 3 * 4 * width)


def block_renames(source: str, target: str) -> tuple[Rename, ...]:
    """The blocks of a transformer, whose query, key and value are one map here."""
    theirs, ours = rf"{source}\.blocks\.(?P<index>\d+)", rf"{target}.blocks.\g<index>"
    fused = (
        Rename(rf"{theirs}\.attn\.{name}\.weight", f"{ours}.attention.qkv.weight", part=part)
        for part, name in enumerate(("wq", "wk", "wv"))
    )
    names = {"attn.proj": "attention.out", "mlp.fc1": "mlp.gate", "mlp.fc3": "mlp.up", "mlp.fc2": "mlp.down"}
    single = (Rename(rf"{theirs}\.{name}\.weight", f"{ours}.{other}.weight") for name, other in names.items())
    return (*fused, *single)


def row_per_position(table: torch.Tensor) -> torch.Tensor:
    """Positions `[1, 1, D, N]` as `[N, D]`."""
    return table[0, 0].T.contiguous()


def decoder_renames(patch: int) -> tuple[Rename, ...]:
    patches, head = rf"{DECODER}\.dec_noise_patch_emb\.patch_proj", rf"{DECODER}\.dec_to_patches\.proj"
    modulation = rf"{DECODER}\.dec_transformer\.blocks\.(?P<index>\d+)\.adaLN_modulation\.1\.{LEAVES}"
    return (
        Rename(rf"{DECODER}\.dec_from_latents\.proj\.{LEAVES}", r"decoder.embed.\g<leaf>"),
        Rename(rf"{DECODER}\.dec_registers_posemb_module\.posembs", "decoder.code_positions", row_per_position),
        Rename(rf"{DECODER}\.dec_nested_dropout\.dropout_mask_token", "decoder.missing"),
        Rename(rf"{DECODER}\.dec_latent_dropout\.nullcond", "decoder.dropped"),
        Rename(rf"{patches}\.weight", "decoder.patches.conv.weight", kernel_of_blocks(patch)),
        Rename(rf"{patches}\.bias", "decoder.patches.conv.bias"),
        Rename(rf"{DECODER}\.dec_patches_posemb_module\.posembs", "decoder.positions", cells_of_grid),
        Rename(rf"{DECODER}\.dec_time_embedder\.mlp\.(?P<layer>0|2)\.{LEAVES}", r"decoder.time.\g<layer>.\g<leaf>"),
        *block_renames(rf"{DECODER}\.dec_transformer", "decoder"),
        Rename(modulation, r"decoder.blocks.\g<index>.modulation.\g<leaf>"),
        Rename(rf"{head}\.{LEAVES}", r"decoder.to_patches.\g<leaf>", blocks_last_to_first(patch)),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `FlexTok`, with its VAE where `vae`, the fields of that one's own configuration, is among the
    arguments.

    Raises:
        ValueError: a width that heads do not divide, or a VAE that is none of `AutoencoderKL` or of other latents.
    """
    width, drawn_width, head = upstream.get("enc_dim"), upstream.get("dec_dim"), upstream.get("head_dim", 64)
    tokens, side, patch = upstream.get("registers"), upstream.get("grid"), upstream.get("patch", 2)
    levels, channels = upstream.get("fsq_levels"), upstream.get("latent_channels")
    if width % head or drawn_width % head:
        raise ValueError(f"enc_dim is {width}, dec_dim {drawn_width} and head_dim {head}, which must divide both.")
    grid = {"rows": side, "columns": side}
    vae = upstream.get("vae", None)
    vae = None if vae is None else stock_fields(vae)
    config = VisualCodecConfig(
        image_size=side * patch * (1 if vae is None else VaeConfig(vae).factor),
        encoder={"kind": "patches", "patch": patch, "width": width, "latent_channels": channels},
        resampler={
            "kind": "registers",
            "tokens": tokens,
            "dim": len(levels),
            "depth": upstream.get("enc_depth"),
            "num_heads": width // head,
            "mlp_width": mlp_width(width),
            **grid,
        },
        quantizer={"kind": "fsq", "levels": levels, "project": False},
        length={"kind": "sequence", "tokens": tokens, "prefixes": True, **grid},
        decoder={
            "kind": "flow",
            "dim": len(levels),
            "tokens": tokens,
            "patch": patch,
            "latent_channels": channels,
            "width": drawn_width,
            "depth": upstream.get("dec_depth"),
            "num_heads": drawn_width // head,
            "mlp_width": mlp_width(drawn_width),
            **grid,
        },
        vae=vae,
    )
    patches = rf"{ENCODER}\.enc_patch_emb\.patch_proj"
    renames = (
        Rename(rf"{patches}\.weight", "encoder.patches.conv.weight", kernel_of_blocks(patch)),
        Rename(rf"{patches}\.bias", "encoder.patches.conv.bias"),
        Rename(rf"{ENCODER}\.enc_posemb_module\.posembs", "resampler.positions", cells_of_grid),
        Rename(rf"{ENCODER}\.enc_register_module\.registers", "resampler.registers"),
        *block_renames(rf"{ENCODER}\.enc_transformer", "resampler"),
        Rename(rf"{ENCODER}\.enc_to_latents\.proj\.{LEAVES}", r"resampler.to_positions.\g<leaf>"),
        *decoder_renames(patch),
    )
    if vae is None:
        return Plan(config, renames, without_effect=(rf"{VAE}.*",))
    return Plan(config, (*renames, Rename(rf"{VAE}(.*)", r"vae.autoencoder.\1")))


TOKENIZER = Upstream(
    system="flextok",
    repository="apple/ml-flextok",
    licence="Apple sample-code licence (code); released weights are research-only",
    paper="arXiv 2502.13967",
    plan=plan,
    restricted=True,
    aliases=("flex_tok", "ml_flextok"),
)
