"""What a codec refuses of what it is given, before it computes anything."""

from __future__ import annotations

import torch

from unimm.codec.configuration import VisualCodecConfig

SLACK = 0.01  # beyond the range of pixels, for resampled pictures
NORMALISED_SLACK = 8.0  # for pixels normalised by channel: any noise of their scale passes, bytes do not


def check_pixels(config: VisualCodecConfig, pixel_values: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of the grid of pictures.

    Raises:
        ValueError: no floats `[B, C, H, W]` in the codec's range, or a size that it cannot take.
    """
    shaped = pixel_values.ndim == 4 and pixel_values.shape[1] == config.in_channels and pixel_values.numel() > 0
    if not shaped or not pixel_values.is_floating_point():
        way_out = "Use the codec's image processor." if config.reads_pixels else "They are a VAE's latents."
        raise ValueError(
            f"pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}; they must be floats "
            f"[B, {config.in_channels}, H, W]. {way_out}"
        )
    if config.reads_pixels:
        _check_range(config, pixel_values)
    return config.grid(pixel_values.shape[2], pixel_values.shape[3])


def _check_range(config: VisualCodecConfig, pixel_values: torch.Tensor) -> None:
    low, high = pixel_values.aminmax()
    black, white = config.pixel_range
    slack = SLACK if config.pixel_mean is None else NORMALISED_SLACK
    if not black - slack <= float(low) <= float(high) <= white + slack:
        raise ValueError(
            f"pixel_values range over [{float(low):.2f}, {float(high):.2f}]; the codec takes "
            f"[{black:g}, {white:g}]. Use the codec's image processor, or scale by "
            f"{white - black:g} * x / 255 {black:+g}."
        )


def check_condition(condition: torch.Tensor | None, batch: int, size: tuple[int, int] | None, does: str) -> None:
    """Check the text features of a batch.

    Args:
        condition: floats `[batch, *size]`, or None.
        size: (tokens, width) that is wanted; None where nothing is.
        does: what the codec does under them, for the error.

    Raises:
        ValueError: they are missing, not wanted, or of another shape.
    """
    if size is None and condition is not None:
        raise ValueError(f"This codec takes no condition, and one of {tuple(condition.shape)} was given.")
    if size is not None and (condition is None or condition.shape != (batch, *size)):
        seen = "missing" if condition is None else str(tuple(condition.shape))
        raise ValueError(
            f"This codec {does} under a text, and its features are {seen}; give condition=, floats {(batch, *size)}."
        )
