"""SEED-Voken's two tokenizers: IBQ, a VQGAN whose codes are chosen by dot product, and Open-MAGVIT2, signs as codes."""

from __future__ import annotations

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.pyramids import (
    ATTENTION,
    BLOCK,
    CODEBOOK,
    ENDS,
    GRID_PROJECTIONS,
    any_size,
    channels,
    level,
    whole_cells,
)
from unimm.conversion.upstream import (
    LEAVES,
    LIGHTNING_FILES,
    Plan,
    Rename,
    Upstream,
    UpstreamConfig,
    blocks_last_to_first,
    under,
)

REPOSITORY = "TencentARC/SEED-Voken"
LICENCE = "Apache-2.0"
# What stands before the moving averages of weights, which upstream evaluates: also those of the losses, and two counts.
AVERAGES = "model_ema."
TRAINING_STATE = (r"loss\..*", r"model_ema\.(?:decay|num_updates|loss.*)")


def level_renames(num_levels: int) -> tuple[Rename, ...]:
    """Levels of both sides; upstream counts the decoder's fine to coarse, we count them as they run."""
    renames = level(r"encoder\.down\.(?P<level>\d+)", r"encoder.levels.\g<level>")
    for index in range(num_levels):
        renames += level(rf"decoder\.up\.{index}", f"decoder.levels.{num_levels - 1 - index}")
    return renames


def _check(upstream: UpstreamConfig) -> None:
    for name, legal in {"double_z": False, "in_channels": 3, "out_ch": 3}.items():
        value = upstream.get(f"ddconfig.{name}", legal)
        if value != legal:
            raise ValueError(f"ddconfig.{name} is {value!r}; this codec exists for {legal!r} only.")


def _plan(upstream: UpstreamConfig, config: VisualCodecConfig, renames: list[Rename]) -> Plan:
    """With the averages in the weights' places, unless the configuration says that there are none to use."""
    if upstream.get("use_ema", True):
        return Plan(config, tuple(renames), TRAINING_STATE, files=LIGHTNING_FILES, averages=AVERAGES)
    return Plan(config, tuple(renames), (*TRAINING_STATE, r"model_ema\..*"), files=LIGHTNING_FILES)


def plan_ibq(upstream: UpstreamConfig) -> Plan:
    """The plan of `IBQ`, whose rows are never normalised: `cosine_similarity` is kept by upstream and read by nothing.

    Raises:
        ValueError: a model that normalises them by `l2_normalize`.
    """
    _check(upstream)
    upstream.require({"l2_normalize": False, "ddconfig.resamp_with_conv": True, "ddconfig.tanh_out": False})
    width, blocks = upstream.get("ddconfig.ch"), upstream.get("ddconfig.num_res_blocks")
    widths = channels(width, upstream.get("ddconfig.ch_mult"))
    resolution, rows = upstream.get("ddconfig.resolution"), upstream.get("embed_dim")
    factor = 2 ** (len(widths) - 1)
    pixels = whole_cells(resolution, factor)
    # By the nominal size of each level, whatever the size of the picture; upstream halves it on the way down and
    # doubles it on the way up.
    attention_at = upstream.get("ddconfig.attn_resolutions", ())
    read, drawn = (
        [index for index in range(len(widths)) if nominal // 2**index in attention_at]
        for nominal in (resolution, pixels)
    )
    pyramid = {
        "kind": "pyramid",
        "channels": widths,
        "code_channels": upstream.get("ddconfig.z_channels"),
    }
    config = VisualCodecConfig(
        image_size=pixels,
        encoder={**pyramid, "blocks": blocks, "stem_channels": width, "attention_levels": read},
        resampler={"kind": "grid", "dim": rows, "norm": False},
        quantizer={
            "kind": "vq",
            "size": upstream.get("n_embed"),
            "dim": rows,
            "metric": "dot",
            "normalize": False,
            "project": False,
        },
        length=any_size(pixels, factor),
        decoder={**pyramid, "blocks": blocks + 1, "attention_levels": drawn},
    )
    middle = {"block_1": ("0", BLOCK), "attn_1": ("1", ATTENTION), "block_2": ("2", BLOCK)}
    renames = [*GRID_PROJECTIONS, *CODEBOOK, *level_renames(len(widths))]
    for side in ("encoder", "decoder"):
        renames += under(side, side, ENDS)
        for theirs, (ours, names) in middle.items():
            renames += under(rf"{side}\.mid\.{theirs}", f"{side}.middle.{ours}", names)
    renames += under(r"encoder\.down\.(?P<level>\d+)\.downsample", r"encoder.levels.\g<level>.resize", {"conv": "conv"})
    for index in range(len(widths)):
        resize = f"decoder.levels.{len(widths) - 1 - index}.resize"
        renames += under(rf"decoder\.up\.{index}\.upsample", resize, {"conv": "conv"})
    return _plan(upstream, config, renames)


def plan_open_magvit2(upstream: UpstreamConfig) -> Plan:
    """The plan of Open-MAGVIT2's `VQModel`.

    Raises:
        ValueError: a codebook whose size is not a power of two of the channels.
    """
    _check(upstream)
    width, blocks = upstream.get("ddconfig.ch"), upstream.get("ddconfig.num_res_blocks")
    widths = channels(width, upstream.get("ddconfig.ch_mult"))
    factor = 2 ** (len(widths) - 1)
    pixels = whole_cells(upstream.get("ddconfig.resolution"), factor)
    bits, size = upstream.get("ddconfig.z_channels"), upstream.get("n_embed")
    if size != 2**bits:
        raise ValueError(f"n_embed is {size} and z_channels {bits}; one bit per channel makes {2**bits} codes.")
    pyramid = {
        "kind": "pyramid",
        "channels": widths,
        "blocks": blocks,
        "middle_blocks": blocks,
        "middle_attention": False,
        "bias": False,
        "code_channels": bits,
    }
    config = VisualCodecConfig(
        image_size=pixels,
        encoder={**pyramid, "stem_channels": width, "centred": True, "out_kernel": 1},
        resampler={"kind": "grid", "dim": bits, "norm": False, "project": False},
        quantizer={"kind": "sign", "lowest_first": True},
        length=any_size(pixels, factor),
        decoder={**pyramid, "upsampling": "shuffle", "adaptive": True},
    )
    renames = [*level_renames(len(widths))]
    for side in ("encoder", "decoder"):
        renames += under(side, side, ENDS)
        renames += under(rf"{side}\.mid_block\.(?P<index>\d+)", rf"{side}.middle.\g<index>", BLOCK)
    renames += under(r"encoder\.down\.(?P<level>\d+)", r"encoder.levels.\g<level>.resize", {"downsample": "conv"})
    renames += adaptive_renames(len(widths))
    return _plan(upstream, config, renames)


def adaptive_renames(num_levels: int, resize: str = r"decoder\.up\.{index}\.upsample\.conv1") -> tuple[Rename, ...]:
    """A decoder's conditioned norms, and its convolutions before space is made of channels."""
    renames: list[Rename] = []
    for index in range(num_levels):
        ours = num_levels - 1 - index
        names = {"gamma": "to_scale", "beta": "to_shift"}
        renames += under(rf"decoder\.adaptive\.{index}", f"decoder.adaptive.{ours}", names)
        target = rf"decoder.levels.{ours}.resize.conv.\g<leaf>"
        renames.append(Rename(resize.format(index=index) + rf"\.{LEAVES}", target, blocks_last_to_first(2)))
    return tuple(renames)


IBQ = Upstream(system="ibq", repository=REPOSITORY, licence=LICENCE, paper="arXiv 2412.02692", plan=plan_ibq)
OPEN_MAGVIT2 = Upstream(
    system="open_magvit2",
    repository=REPOSITORY,
    licence=LICENCE,
    paper="arXiv 2409.04410",
    plan=plan_open_magvit2,
    aliases=("open_magvit", "magvit2"),
)
