"""LaVIT's tokenizer: an EVA-CLIP tower, cells that are kept or dropped, and the decoder for one diffusion model."""

from __future__ import annotations

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.eva import CLIP_MEAN, CLIP_STD, EVA_G, tower_options, tower_renames
from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig, WeightFile, first, separate_or_one, under

VISUAL = "visual_tokenizer"  # upstream's folder
# The names of its files, and the prefixes under which their weights stand.
ENCODER, DECODER, LARGE_DECODER = "tokenizer_encoder", "tokenizer_decoder", "highres_tokenizer_decoder"
MERGER_MLP_RATIO = 4.3637
FEATURE_WIDTH, OUT_WIDTH = 1408, 768  # of the tower, and of what the first diffusion model reads
RELEASED = {
    "img_size": 224,
    "patch_size": 14,
    "width": 1408,
    "layers": 12,
    "heads": 16,
    "n_code": 16384,
    "code_dim": 32,
}
RELEASED_DECODER = {"in_chans": 32, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4}
TOWER_DEPTH = 40  # one block more than SEED's tower, whose last one is left out
MERGER_PARTS = {
    "norm0": "kept_norm",
    "token_causal_attn.qkv": "kept.qkv",
    "token_causal_attn.proj": "kept.out",
    "norm1": "dropped_norm",
    "token_cross_attn.query": "dropped.query",
    "token_cross_attn.key": "dropped.key",
    "token_cross_attn.value": "dropped.value",
    "token_cross_attn.proj": "dropped.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
DECODER_PARTS = {
    "norm0": "attention_norm",
    "self_attn.qkv": "attention.qkv",
    "self_attn.proj": "attention.out",
    "norm1": "cross_norm",
    "cross_attn.query": "cross.query",
    "cross_attn.key": "cross.key",
    "cross_attn.value": "cross.value",
    "cross_attn.proj": "cross.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
CONDITION_KEYS = "unet_"  # begin the names of what the second diffusion model reads through
# The tower's unused norm; the path without codes, by which upstream's language model reads.
WITHOUT_EFFECT = (rf"{ENCODER}\.encoder\.norm\..*", rf"{ENCODER}\.vit_proj\..*")


def merger_renames(source: str, target: str) -> tuple[Rename, ...]:
    """The merger's keys; `source` is a pattern."""
    return (
        *under(source, target, {"ln_vision": "features_norm", "norm": "norm"}),
        *under(rf"{source}\.blocks\.(?P<index>\d+)", target + r".blocks.\g<index>", MERGER_PARTS),
    )


def separate_files(folder: str, *, large: bool) -> tuple[WeightFile, ...]:
    """Upstream's files in a folder; the tower may lie in one of its own, and each diffusion model has a decoder."""
    decoder = LARGE_DECODER if large else DECODER
    return (
        WeightFile(f"{folder}/{ENCODER}.bin", prefix=f"{ENCODER}."),
        WeightFile(f"{folder}/eva_vitg_psz14.bin", prefix=f"{ENCODER}.encoder.", optional=True),
        WeightFile(f"{folder}/{decoder}.bin", prefix=f"{decoder}."),
    )


def plan(upstream: UpstreamConfig, *, large: bool = False) -> Plan:
    """The plan of `DynamicVisualTokenizer` and `VQDecoder`.

    Args:
        large: `HighresVQDecoder` instead, whose features Stable Diffusion XL reads through maps of its own.

    Raises:
        ValueError: a tower or a decoder of other sizes than the tokenizer.
    """
    name = "DynamicVisualTokenizer"
    size, patch, width = (
        upstream.get(f"{name}.{field}", RELEASED[field]) for field in ("img_size", "patch_size", "width")
    )
    tower = {**EVA_G, **upstream.get("EVAVisionTransformer", {"depth": TOWER_DEPTH})}
    if (tower["patch_size"], tower["embed_dim"]) != (patch, width):
        raise ValueError(
            f"The tower has patches of {tower['patch_size']} and width {tower['embed_dim']}, "
            f"the tokenizer {patch} and {width}; they must be equal."
        )
    dim, side = upstream.get(f"{name}.code_dim", RELEASED["code_dim"]), size // patch
    prefix, reference = (LARGE_DECODER, "HighresVQDecoder") if large else (DECODER, "VQDecoder")
    drawn = {**RELEASED_DECODER, **upstream.get(reference, {"in_chans": dim})}
    decoder_width = drawn["embed_dim"]
    if drawn["in_chans"] != dim:
        raise ValueError(f"{reference}.in_chans is {drawn['in_chans']}; codes have {dim} channels.")
    grid = {"rows": side, "columns": side}
    config = VisualCodecConfig(
        image_size=size,
        pixel_mean=CLIP_MEAN,
        pixel_std=CLIP_STD,
        encoder={**tower_options(tower, size), "final_norm": False},
        resampler={
            "kind": "select",
            "dim": dim,
            "depth": upstream.get(f"{name}.layers", RELEASED["layers"]),
            "num_heads": upstream.get(f"{name}.heads", RELEASED["heads"]),
            "mlp_width": int(width * upstream.field("literals_kept.merger_mlp_ratio", MERGER_MLP_RATIO)),
        },
        quantizer={
            "kind": "vq",
            "size": upstream.get(f"{name}.n_code", RELEASED["n_code"]),
            "dim": dim,
            "project": False,
            "raw_rows": True,
        },
        length={"kind": "kept", **grid},
        decoder={
            "kind": "cross_vit",
            "dim": dim,
            "tokens": (drawn.get("img_size", size) // drawn.get("patch_size", patch)) ** 2,
            "width": decoder_width,
            "depth": drawn["depth"],
            "num_heads": drawn["num_heads"],
            "mlp_width": int(decoder_width * drawn["mlp_ratio"]),
            "feature_width": upstream.literal("decoder_out_dim", FEATURE_WIDTH),
            "out_dim": 0 if large else upstream.literal("unet_proj", OUT_WIDTH),
        },
    )
    predictor, merger = rf"{ENCODER}\.token_predictor", rf"{ENCODER}\.causal_encoder"
    renames = (
        *tower_renames(rf"{ENCODER}\.encoder"),
        *under(rf"{predictor}\.in_conv", "resampler.selector.before", {"0": "0", "1": "1"}),
        *under(rf"{predictor}\.out_conv", "resampler.selector.after", {"0": "0", "2": "2", "4": "4"}),
        *merger_renames(merger, "resampler.merger"),
        *under(rf"{ENCODER}\.encode_task_layer", "resampler.to_positions", {"0": "0", "2": "2"}),
        Rename(rf"{ENCODER}\.quantize\.embedding\.weight", "quantizer.codebook"),
        *under(prefix, "decoder", {"in_proj": "embed", "norm": "norm"} | ({} if large else {"unet_proj": "out"})),
        Rename(rf"{prefix}\.pos_embed", "decoder.positions", first),
        Rename(rf"{prefix}\.query_embed", "decoder.queries", first),
        *under(rf"{prefix}\.blocks\.(?P<index>\d+)", r"decoder.blocks.\g<index>", DECODER_PARTS),
        *under(rf"{prefix}\.decode_task_layer", "decoder.head", {"0": "0", "2": "2"}),
    )
    elsewhere = rf"{LARGE_DECODER}\.{CONDITION_KEYS}.*" if large else rf"{LARGE_DECODER}\..*"
    folder = VISUAL if (upstream.folder / VISUAL).is_dir() else "."
    files = separate_or_one(upstream.folder, *separate_files(folder, large=large))
    return Plan(config, renames, (*WITHOUT_EFFECT, elsewhere), files=files)


TOKENIZER = Upstream(
    system="lavit_tokenizer",
    repository="jy0205/LaVIT",
    licence="LaVIT Community License",
    paper="arXiv 2309.04669",
    plan=plan,
    restricted=True,
    aliases=("lavit_codec",),
)
