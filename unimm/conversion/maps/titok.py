"""TiTok, TA-TiTok and One-D-Piece: a ViT that reads a picture into latents and one that draws it from their codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.pyramids import BLOCK, CODEBOOK, ENDS, channels, level
from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig, blocks_last_to_first, matrix, under

SIZES = {
    "small": {"width": 512, "layers": 8, "heads": 8},
    "base": {"width": 768, "layers": 12, "heads": 12},
    "large": {"width": 1024, "layers": 24, "heads": 16},
}
# The VQGAN of MaskGIT, whose codebook and decoder the two-stage models draw through.
PIXEL_VQGAN = {
    "channel_mult": (1, 1, 2, 2, 4),
    "hidden_channels": 128,
    "num_res_blocks": 2,
    "num_embeddings": 1024,
    "embedding_dim": 256,
}
TEXT_TOKENS, TEXT_WIDTH = 77, 768  # of CLIP's text tower
PARTS = {
    "attn.in_proj_": "attention.qkv.",
    "attn.out_proj.": "attention.out.",
    "ln_1.": "attention_norm.",
    "ln_2.": "mlp_norm.",
    "mlp.c_fc.": "mlp.up.",
    "mlp.c_proj.": "mlp.down.",
}


def _size(upstream: UpstreamConfig, side: str) -> Mapping[str, int]:
    name = upstream.get(f"model.vq_model.vit_{side}_model_size")
    size = upstream.literal(f"model_size_{name}", SIZES.get(name))
    if size is None:
        raise ValueError(f"model.vq_model.vit_{side}_model_size is {name!r}; it must be one of {', '.join(SIZES)}.")
    return size


def transformer_renames(side: str, target: str) -> tuple[Rename, ...]:
    """The keys of one ViT: class token, positions, norms and blocks."""
    blocks = (
        Rename(rf"{side}\.transformer\.(\d+)\.{theirs}(weight|bias)", rf"{target}.blocks.\1.{ours}\2")
        for theirs, ours in PARTS.items()
    )
    return (
        Rename(rf"{side}\.class_embedding", f"{target}.class_token"),
        Rename(rf"{side}\.positional_embedding", f"{target}.positions"),
        *under(side, target, {"ln_pre": "norm_in", "ln_post": "norm_out"}),
        *blocks,
    )


def encoder_renames() -> tuple[Rename, ...]:
    """Patches, latents and their projection."""
    return (
        *under("encoder", "encoder.patches", {"patch_embed": "conv"}),
        *transformer_renames("encoder", "resampler.transformer"),
        Rename("latent_tokens", "resampler.latents"),
        Rename(r"encoder\.latent_token_positional_embedding", "resampler.latent_positions"),
        Rename(r"encoder\.conv_out\.weight", "resampler.to_positions.weight", matrix),
        Rename(r"encoder\.conv_out\.bias", "resampler.to_positions.bias"),
    )


def decoder_renames() -> tuple[Rename, ...]:
    """Everything up to the head."""
    return (
        *transformer_renames("decoder", "decoder.transformer"),
        *under("decoder", "decoder", {"decoder_embed": "embed", "text_guidance_proj": "text.embed"}),
        Rename(r"decoder\.mask_token", "decoder.mask_token"),
        Rename(r"decoder\.latent_token_positional_embedding", "decoder.code_positions"),
        Rename(r"decoder\.text_guidance_positional_embedding", "decoder.text.positions"),
    )


def pixel_head_renames(patch: int) -> tuple[Rename, ...]:
    """The direct head; upstream's patches are ordered (row, column, channel)."""
    to_patches = r"decoder.head.to_patches.\g<leaf>"
    return (
        Rename(r"decoder\.ffn\.0\.(?P<leaf>weight|bias)", to_patches, blocks_last_to_first(patch)),
        *under("decoder", "decoder.head", {"conv_out": "smooth"}),
    )


def soft_codebook_renames(num_levels: int) -> tuple[Rename, ...]:
    """The head over a second codebook and its pixel decoder."""
    return (
        *under(r"decoder\.ffn", "decoder.head.to_scores", {"0": "0", "2": "2"}),
        Rename(r"pixel_quantize\.embedding\.weight", "decoder.head.rows"),
        *pixel_decoder_renames("decoder.head.pixels", num_levels),
    )


def pixel_decoder_renames(pixels: str, num_levels: int) -> tuple[Rename, ...]:
    """The decoder of MaskGIT's VQGAN."""
    renames = [
        *under("pixel_decoder", pixels, ENDS),
        *under(r"pixel_decoder\.mid\.(?P<index>\d+)", pixels + r".middle.\g<index>", BLOCK),
    ]
    for index in range(num_levels):
        ours = f"{pixels}.levels.{num_levels - 1 - index}"
        renames += level(rf"pixel_decoder\.up\.{index}", ours)
        renames += under(rf"pixel_decoder\.up\.{index}", f"{ours}.resize", {"upsample_conv": "conv"})
    return tuple(renames)


def soft_codebook(upstream: UpstreamConfig) -> dict[str, Any]:
    """The options of the second codebook and the pixel decoder that reads it."""
    vqgan = {**PIXEL_VQGAN, **upstream.literal("pixel_vqgan", {})}
    pyramid = {
        "channels": channels(vqgan["hidden_channels"], vqgan["channel_mult"]),
        "blocks": vqgan["num_res_blocks"],
        "middle_blocks": vqgan["num_res_blocks"],
        "middle_attention": False,
        "bias": False,
        "code_channels": vqgan["embedding_dim"],
        "shortcut": "update",
    }
    return {"size": vqgan["num_embeddings"], "pyramid": pyramid}


def _quantizer(upstream: UpstreamConfig, dim: int) -> dict[str, Any]:
    """Options of the codebook, or of the continuous latents that stand for it."""
    mode = upstream.get("model.vq_model.quantize_mode", "vq")
    if mode not in ("vq", "vae"):
        raise ValueError(f"model.vq_model.quantize_mode is {mode!r}; it must be 'vq' or 'vae'.")
    if mode == "vae":
        return {"kind": "gaussian", "project": False}
    return {
        "kind": "vq",
        "size": upstream.get("model.vq_model.codebook_size"),
        "dim": dim,
        "normalize": upstream.get("model.vq_model.use_l2_norm", False),
        "project": False,
    }


def make_plan(
    upstream: UpstreamConfig, *, scramble: bool, two_stage: bool, prefixes: bool = False, conditioned: bool = False
) -> Plan:
    """The plan of any member of the family.

    Args:
        upstream: its configuration.
        scramble: the two-stage projection; see `LatentResamplerConfig`.
        two_stage: draws through the second codebook rather than predicting pixels.
        prefixes: whether fewer codes stand for a picture too.
        conditioned: whether the decoder reads text features.
    """
    side = upstream.get("dataset.preprocessing.crop_size", 256)
    encoder, decoder = _size(upstream, "enc"), _size(upstream, "dec")
    patch_in, patch_out = (upstream.get(f"model.vq_model.vit_{name}_patch_size") for name in ("enc", "dec"))
    tokens, dim = upstream.get("model.vq_model.num_latent_tokens"), upstream.get("model.vq_model.token_size")
    quantizer = _quantizer(upstream, dim)
    continuous = quantizer["kind"] == "gaussian"
    if continuous and two_stage:
        raise ValueError(
            "model.vq_model.quantize_mode is 'vae' and finetune_decoder True; continuous latents have no second stage."
        )
    decoder_options: dict[str, Any] = {
        "kind": "mask_vit",
        "dim": dim,
        "tokens": tokens,
        "rows": side // patch_out,
        "columns": side // patch_out,
        "patch": patch_out,
        "width": decoder["width"],
        "depth": decoder["layers"],
        "num_heads": decoder["heads"],
    }
    if two_stage:
        decoder_options["soft_codebook"] = soft_codebook(upstream)
    if conditioned:
        decoder_options["condition_tokens"] = upstream.get("model.vq_model.text_context_length", TEXT_TOKENS)
        decoder_options["condition_width"] = upstream.get("model.vq_model.text_embed_dim", TEXT_WIDTH)
    grid = {"rows": side // patch_in, "columns": side // patch_in}
    config = VisualCodecConfig(
        image_size=side,
        pixel_range=(0.0, 1.0),
        encoder={"kind": "patches", "patch": patch_in, "width": encoder["width"]},
        resampler={
            "kind": "latent",
            "tokens": tokens,
            "dim": 2 * dim if continuous else dim,  # means, then log variances
            "depth": encoder["layers"],
            "num_heads": encoder["heads"],
            "scramble": scramble,
            **grid,
        },
        quantizer=quantizer,
        length={"kind": "sequence", "tokens": tokens, "prefixes": prefixes, **grid},
        decoder=decoder_options,
    )
    if two_stage:
        head = soft_codebook_renames(len(decoder_options["soft_codebook"]["pyramid"]["channels"]))
    else:
        head = pixel_head_renames(patch_out)
    codebook = () if continuous else CODEBOOK
    renames = (*encoder_renames(), *decoder_renames(), *head, *codebook)
    return Plan(config, renames, without_effect=(r"quantize\.embed_prob",))


def plan_titok(upstream: UpstreamConfig, *, conditioned: bool = False) -> Plan:
    """The plan of `TiTok`; the latents are scrambled unless `is_legacy` is off, and two-stage is `finetune_decoder`."""
    return make_plan(
        upstream,
        scramble=upstream.get("model.vq_model.is_legacy", True),
        two_stage=upstream.get("model.vq_model.finetune_decoder", True),
        conditioned=conditioned,
    )


def plan_ta_titok(upstream: UpstreamConfig) -> Plan:
    """The plan of `TATiTok`, a `TiTok` with its defaults."""
    return plan_titok(upstream, conditioned=True)


def plan_one_d_piece(upstream: UpstreamConfig) -> Plan:
    """The plan of `OneDPiece`, which has no switch for the projection and always scrambles."""
    two_stage = upstream.get("model.vq_model.finetune_decoder", True)
    return make_plan(upstream, scramble=True, two_stage=two_stage, prefixes=True)


REPOSITORY, LICENCE = "bytedance/1d-tokenizer", "Apache-2.0"
TITOK_TWO_STAGE = Upstream(
    system="titok_two_stage",
    repository=REPOSITORY,
    licence=LICENCE,
    paper="arXiv 2406.07550",
    plan=plan_titok,
    aliases=("titok",),
)
TITOK_SINGLE_STAGE = Upstream(
    system="titok_single_stage",
    repository=REPOSITORY,
    licence=LICENCE,
    paper="arXiv 2406.07550, 2501.07730",
    plan=plan_titok,
)
TA_TITOK = Upstream(
    system="ta_titok", repository=REPOSITORY, licence=LICENCE, paper="arXiv 2501.07730", plan=plan_ta_titok
)
ONE_D_PIECE = Upstream(
    system="one_d_piece",
    repository="turingmotors/One-D-Piece",
    licence=LICENCE,
    paper="arXiv 2501.10064",
    plan=plan_one_d_piece,
    aliases=("onedpiece",),
)
