"""COMiT: one network that writes a message about a picture crop by crop, and draws from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unimm.codec import VisualCodecConfig
from unimm.codec.vae import VaeConfig, stock_fields
from unimm.conversion.upstream import (
    LEAVES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    WeightFile,
    blocks_last_to_first,
    first,
    read_config,
    under,
)

CROP, STRIDE = 96, 80  # pixels
PIXELS = 8  # per latent, where no VAE says
PREDICTOR, DECODER = "predictor", "decoder"
VAE = "vae"  # a folder of diffusers beside upstream's files
BLOCK = {"attn.qkv": "attention.qkv", "attn.proj": "attention.out", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}


def only_row(table: torch.Tensor) -> torch.Tensor:
    """`[1, 1, D]` as `[D]`."""
    return table[0, 0]


def read(folder: Path) -> dict[str, Any]:
    """Upstream's configuration, with that of a VAE which lies beside it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object.
    """
    fields = read_config(folder)
    if (folder / VAE / "config.json").is_file():
        fields.get("args", fields)[VAE] = read_config(folder / VAE)
    return fields


def renames(patch: int) -> tuple[Rename, ...]:
    block, ours = rf"{PREDICTOR}\.blocks\.(?P<index>\d+)", rf"{DECODER}.blocks.\g<index>"
    modulations = (
        Rename(rf"{block}\.{kind}_adaLN_modulation\.1\.{LEAVES}", rf"{ours}.modulation.\g<leaf>", part=part)
        for part, kind in enumerate(("x", "r"))  # of patches, of messages
    )
    names = {
        "x_embedder.proj": "patches.conv",
        **{f"c_embedder.{layer}": f"place.{layer}" for layer in (0, 2)},
        **{f"r_embedder.{layer}": f"embed.{layer}" for layer in (0, 2)},
        **{f"t_embedder.mlp.{layer}": f"time.{layer}" for layer in (0, 2)},
        "final_layer.adaLN_modulation.1": "modulation",
        "r_final_layer.linear": "to_message",
        "c_final_layer.linear": "to_place",
    }
    head = rf"{PREDICTOR}\.final_layer\.linear\.{LEAVES}"
    return (
        *under(PREDICTOR, DECODER, names),
        Rename(rf"{PREDICTOR}\.pos_embed", f"{DECODER}.positions", first),
        Rename(rf"{PREDICTOR}\.c_pos_embed", f"{DECODER}.place_position", only_row),
        Rename(rf"{PREDICTOR}\.r_pos_embed", f"{DECODER}.message_positions", first),
        Rename(rf"{PREDICTOR}\.r_to_token", f"{DECODER}.blank", only_row),
        Rename(rf"{PREDICTOR}\.r_to_pos_embed", f"{DECODER}.blank_positions", first),
        *under(block, ours, BLOCK),
        *modulations,
        Rename(head, rf"{DECODER}.to_patches.\g<leaf>", blocks_last_to_first(patch)),
    )


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of the predictor and its quantizer, with the VAE whose configuration is `vae`.

    Raises:
        ValueError: as many channels do not go in and come out, latents that are no whole patches, other channels than
            levels, or a VAE that is none of `AutoencoderKL` or of other latents.
    """
    sizes = {
        name: upstream.get(f"predictor.{name}")
        for name in ("max_input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
    }
    side, patch, channels, width = (sizes[n] for n in ("max_input_size", "patch_size", "in_channels", "hidden_size"))
    tokens, levels = upstream.get("predictor.num_msg_tokens"), upstream.get("quantizer.levels")
    upstream.require({"predictor.out_channels": channels, "predictor.msg_tokens_dim": len(levels)})
    if side % patch:
        raise ValueError(f"predictor.max_input_size is {side}, no multiple of predictor.patch_size {patch}.")
    vae = upstream.get(VAE, None)
    vae = None if vae is None else stock_fields(vae)
    factor = PIXELS if vae is None else VaeConfig(vae).factor
    grid = {"rows": side // patch, "columns": side // patch}
    config = VisualCodecConfig(
        image_size=side * (1 if vae is None else factor),
        encoder={
            "kind": "crops",
            "latent_channels": channels,
            "patch": patch,
            **{name: max(1, round(pixels / factor / patch)) for name, pixels in (("crop", CROP), ("stride", STRIDE))},
        },
        resampler={"kind": "message", "tokens": tokens, "dim": len(levels)},
        quantizer={"kind": "fsq", "levels": levels, "project": False},
        length={"kind": "sequence", "tokens": tokens, **grid},
        decoder={
            "kind": "message_flow",
            "dim": len(levels),
            "tokens": tokens,
            "patch": patch,
            "latent_channels": channels,
            "width": width,
            "depth": sizes["depth"],
            "num_heads": sizes["num_heads"],
            "mlp_width": int(width * upstream.get("predictor.mlp_ratio", 4.0)),
            "hides": False,
            **grid,
        },
        vae=vae,
    )
    unread = (rf"{PREDICTOR}\.y_pos_offset",)
    if vae is None:
        return Plan(config, renames(patch), unread)
    files = (WeightFile(), WeightFile(VAE, prefix=f"{VAE}."))
    return Plan(config, (*renames(patch), Rename(rf"{VAE}\.(.*)", r"vae.autoencoder.\1")), unread, files=files)


TOKENIZER = Upstream(
    system="comit",
    repository="Araachie/comit",
    licence="Apache-2.0 with non-commercial third-party parts",
    paper="arXiv 2602.20731",
    plan=plan,
    restricted=True,
    read=read,
)
