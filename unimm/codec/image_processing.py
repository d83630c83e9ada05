"""Pictures of any mode and size to the codec's pixels, with Pillow and NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ImageInput

from unimm.codec.configuration import VisualCodecConfig

WHITE = (255, 255, 255)


class VisualCodecImageProcessor(PilBackend):
    """Centre-crop to a square, resize to `size`, scale to [-1, 1] or as `image_mean` and `image_std` say.

    With `any_shape`, the arguments of `any_shape_size`, pictures keep their shape and are resized to that size; with
    `stretch` they are stretched to the square.
    Alpha is laid over white; 16-bit, palette and CMYK pictures are converted; an animation gives its first frame.
    """

    model_input_names = ["pixel_values"]
    size = {"height": 128, "width": 128}
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    any_shape: dict[str, Any] | None = None
    stretch: bool = False

    @classmethod
    def for_codec(
        cls, config: VisualCodecConfig, any_shape: dict[str, Any] | None = None, *, stretch: bool = False
    ) -> VisualCodecImageProcessor:
        """The processor that gives a codec its size, or pictures of any shape, and its range of pixels."""
        spreads = [1 / (white - black) for black, white in zip(*config.pixel_bounds, strict=True)]
        return cls(
            size={"height": config.image_size, "width": config.image_size},
            image_mean=[-black * spread for black, spread in zip(config.pixel_bounds[0], spreads, strict=True)],
            image_std=spreads,
            any_shape=any_shape,
            stretch=stretch,
        )

    def _preprocess(
        self, images: list[np.ndarray], *args: Any, return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Pictures of one shape as a batch, those of several as a list."""
        prepared = super()._preprocess(images, *args, return_tensors=None, **kwargs)["pixel_values"]
        if return_tensors is None or len({picture.shape for picture in prepared}) == 1:
            return BatchFeature({"pixel_values": prepared}, tensor_type=return_tensors)
        return BatchFeature({"pixel_values": [torch.from_numpy(picture) for picture in prepared]})

    def process_image(self, image: ImageInput, *args: Any, **kwargs: Any) -> np.ndarray:
        """One picture to uint8 `[3, H, W]` of the codec's size."""
        if not isinstance(image, Image.Image):
            image = array_to_picture(super().process_image(image, *args, **kwargs))
        if self.any_shape is not None:
            picture = to_rgb(image)
            target = any_shape_size(picture.width, picture.height, **self.any_shape)
            return np.asarray(picture.resize(target, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        height, width = self.size["height"], self.size["width"]
        if self.stretch:
            picture = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
            return np.asarray(picture).transpose(2, 0, 1)
        picture = centre_square(to_rgb(image))
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(picture).transpose(2, 0, 1)


def any_shape_size(
    width: int,
    height: int,
    *,
    short_size: int = 384,
    long_size: int = 1152,
    patch_size: int = 16,
    min_short_size: int = 128,
    max_aspect_ratio: float = 3.0,
) -> tuple[int, int]:
    """The (width, height) a picture is resized to by X-Omni (2507.22058), whose defaults these are.

    A small picture grows until its short side is `short_size`, a large one shrinks until its long side is `long_size`,
    and both sides go to the nearest multiple of `patch_size`.

    Raises:
        ValueError: a picture that is too small or too elongated.
    """
    short, long = sorted((width, height))
    if short < min_short_size or long / short > max_aspect_ratio:
        raise ValueError(
            f"The picture is {width} x {height}; its short side must have at least {min_short_size} pixels and "
            f"its long side at most {max_aspect_ratio:g} times as many. Crop it."
        )
    scale = max(1.0, short_size / short)
    scale = min(scale, long_size / long)
    return round(width * scale / patch_size) * patch_size, round(height * scale / patch_size) * patch_size


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, transparency over white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image)
        levels = values * 255 if values.max() <= 1 else values
        image = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*WHITE, 255))
        image = Image.alpha_composite(ground, layer)
    return image.convert("RGB")


def centre_square(image: Image.Image) -> Image.Image:
    """The largest centred square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def array_to_picture(array: np.ndarray) -> Image.Image:
    """`[C, H, W]`, uint8 or floats in [0, 1], to a picture.

    Raises:
        ValueError: values outside both ranges, or a channel count other than 1, 3 or 4.
    """
    if array.shape[0] not in (1, 3, 4):
        raise ValueError(f"The picture has {array.shape[0]} channels; 1, 3 or 4 are taken.")
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if np.issubdtype(array.dtype, np.floating) and 0 <= low <= high <= 1:
            array = array * 255
        elif not 0 <= low <= high <= 255:
            raise ValueError(
                f"The picture ranges over [{low:.2f}, {high:.2f}]; use [0, 1] floats or [0, 255] integers."
            )
        array = array.round().astype(np.uint8)
    channels_last = array.transpose(1, 2, 0)
    return Image.fromarray(channels_last[..., 0] if array.shape[0] == 1 else np.ascontiguousarray(channels_last))
