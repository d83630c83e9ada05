"""What the checkpoints of VQGAN's descendants share: the names inside their blocks, and the layers around the codes."""

from __future__ import annotations

from typing import Any

from unimm.conversion.upstream import Rename, kernel_of_points, matrix, under

BLOCK = {
    "norm1": "norm_in",
    "conv1": "conv_in",
    "norm2": "norm_out",
    "conv2": "conv_out",
    "nin_shortcut": "shortcut",
}
ATTENTION = {"norm": "norm", "q": "query", "k": "key", "v": "value", "proj_out": "out"}
ENDS = {"conv_in": "stem", "norm_out": "norm", "conv_out": "out"}
GRID_PROJECTIONS = (
    Rename(r"quant_conv\.weight", "resampler.to_positions.weight", kernel_of_points),
    Rename(r"quant_conv\.bias", "resampler.to_positions.bias"),
    Rename(r"post_quant_conv\.weight", "resampler.to_grid.weight", matrix),
    Rename(r"post_quant_conv\.bias", "resampler.to_grid.bias"),
)
CODEBOOK = (Rename(r"quantize\.embedding\.weight", "quantizer.codebook"),)
LARGEST = 4  # times the size of training, on each side


def level(source: str, target: str, *, block: str = "block", attention: str = "attn") -> tuple[Rename, ...]:
    """The blocks and attentions of one level; `target` may name it by the groups of `source`."""
    blocks = under(rf"{source}\.{block}\.(?P<block>\d+)", rf"{target}.blocks.\g<block>", BLOCK)
    attentions = under(rf"{source}\.{attention}\.(?P<block>\d+)", rf"{target}.attention.\g<block>", ATTENTION)
    return (*blocks, *attentions)


def whole_cells(resolution: int, factor: int) -> int:
    """The side in pixels of a picture of at most `resolution` that cells of `factor` pixels tile, one at the least."""
    return max(resolution // factor, 1) * factor


def any_size(image_size: int, factor: int) -> dict[str, Any]:
    """The length policy of a fully convolutional codec that was made for square pictures of `image_size`."""
    side = LARGEST * image_size // factor
    return {"kind": "resolution", "min_side": 1, "max_side": side, "max_positions": side * side}


def channels(width: int, multipliers: Any) -> list[int]:
    """Widths of the levels, fine to coarse."""
    return [width * multiplier for multiplier in multipliers]
