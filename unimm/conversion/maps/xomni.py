"""X-Omni's tokenizer: a SigLIP2 tower for pictures of any shape, and codes that a diffusion model draws from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.pyramids import BLOCK, GRID_PROJECTIONS
from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig, WeightFile, first, separate_or_one, under

# By the name of the tower in upstream's configuration.
TOWERS = {
    "siglip2_giant_patch16_384": {
        "image_size": 384,
        "patch_size": 16,
        "width": 1536,
        "layers": 40,
        "heads": 16,
        "mlp_ratio": 4,
    },
}
TABLE_PIXELS = 2048  # side of the picture whose grid the position table has
TRAINING_SIDE = 384
# The defaults of upstream's projector, and the groups of its norms, which no argument reaches.
RELEASED = {"z_channels": 1536, "codebook_size": 16384, "codebook_dim": 2048, "conv_layers": 2}
GROUPS = 32
MAX_SIDE = 256  # rows or columns of cells, at the least: twice those of the released table
RELEASED_SHAPES = {
    "short_size": 384,
    "long_size": 1152,
    "patch_size": 16,
    "min_short_size": 128,
    "max_aspect_ratio": 3.0,
}
PARTS = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
# The tower's own final norm and pooling head, which features are taken before.
WITHOUT_EFFECT = (r"vit\.norm\..*", r"vit\.attn_pool\..*", r"vit\.(?:fc_norm|head)\..*")


def separate_files(tower: str, projector: str) -> tuple[WeightFile, ...]:
    """Upstream's two files, whose names its configuration gives."""
    return WeightFile(tower, prefix="vit."), WeightFile(projector, prefix="vqproj.")


def plan(upstream: UpstreamConfig, *, shapes: Mapping[str, Any] | None = None) -> Plan:
    """The plan of `SiglipTokenizer`.

    Args:
        upstream: its configuration.
        shapes: how pictures are resized; as released, where they fit, if None.

    Raises:
        ValueError: a tower that neither the configuration nor this map describes, or a projector that does not fit it.
    """
    name = upstream.get("siglip_name")
    tower = upstream.field("siglip_model_config", TOWERS.get(name))
    if tower is None:
        raise ValueError(
            f"siglip_name is {name!r} and config.json has no siglip_model_config; known towers: {', '.join(TOWERS)}."
        )
    projector = {name: upstream.get(name, upstream.field(f"defaults_used.{name}", RELEASED[name])) for name in RELEASED}
    patch, width, dim = tower["patch_size"], tower["width"], projector["codebook_dim"]
    table_pixels = upstream.literal("img_size_of_position_table", TABLE_PIXELS)
    table_side = table_pixels // patch
    max_side = max(2 * table_side, MAX_SIDE)
    if projector["z_channels"] != width:
        raise ValueError(f"z_channels is {projector['z_channels']} and the tower {width} wide; they must be equal.")
    if (groups := upstream.field("defaults_used.num_groups", GROUPS)) != GROUPS:
        raise ValueError(f"num_groups is {groups}; only projectors whose norms have {GROUPS} groups are converted.")
    config = VisualCodecConfig(
        image_size=min(TRAINING_SIDE, table_pixels) // patch * patch,
        encoder={
            "kind": "vit",
            "patch": patch,
            "width": width,
            "depth": tower["layers"],
            "num_heads": tower["heads"],
            "mlp_width": int(width * tower["mlp_ratio"]),
            "eps": upstream.field("defaults_used.layer_norm_eps", 1e-6),
            "table_side": table_side,
            "final_norm": False,
        },
        resampler={"kind": "grid", "dim": dim, "norm": False},
        quantizer={
            "kind": "vq",
            "size": projector["codebook_size"],
            "dim": dim,
            "project": False,
            "raw_lookup": True,
        },
        # The table stretches to grids beyond its own.
        length={"kind": "resolution", "min_side": 1, "max_side": max_side, "max_positions": max_side**2},
        decoder={"kind": "features", "width": width, "blocks": projector["conv_layers"]},
    )
    renames = (
        *under(r"vit\.patch_embed", "encoder.patches", {"proj": "conv"}),
        Rename(r"vit\.pos_embed", "encoder.table", first),
        *under(r"vit\.blocks\.(?P<index>\d+)", r"encoder.blocks.\g<index>", PARTS),
        *(Rename(rf"vqproj\.{rule.pattern}", rule.target, rule.change) for rule in GRID_PROJECTIONS),
        Rename(r"vqproj\.quantize\.embedding\.weight", "quantizer.codebook"),
        *under(r"vqproj\.post_conv\.(?P<index>\d+)", r"decoder.blocks.\g<index>", BLOCK),
    )
    # A table that was cut to less cannot take pictures of the released sizes.
    any_shape = RELEASED_SHAPES if table_pixels >= RELEASED_SHAPES["long_size"] else None
    if shapes is not None:
        any_shape = {name: shapes.get(name, released) for name, released in RELEASED_SHAPES.items()}
    names = upstream.get("siglip_path", ""), upstream.get("projector_path", "")
    files = separate_or_one(upstream.folder, *separate_files(*names))
    return Plan(config, renames, without_effect=WITHOUT_EFFECT, any_shape=any_shape, files=files)


TOKENIZER = Upstream(
    system="xomni_tokenizer",
    repository="X-Omni-Team/X-Omni",
    licence="Apache-2.0",
    paper="arXiv 2507.22058",
    plan=plan,
    aliases=("siglip_vq",),
)
