"""JPEG and WebP as a yardstick: how well they do with as many bytes as a codec's codes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS: dict[str, dict[str, int]] = {"JPEG": {}, "WEBP": {"method": 4}}
QUALITIES = (0, 2, 5, 10, 20, 35, 50, 70, 85, 95)


@dataclass(frozen=True)
class Rate:
    """A point of a curve of rate and distortion.

    Args:
        size: bytes of a file, averaged over pictures; its header counts, as it has to be sent.
        psnr: dB, averaged over pictures.
    """

    size: float
    psnr: float


def psnr_of(copies: np.ndarray, references: np.ndarray) -> np.ndarray:
    """dB of each of uint8 `[B, H, W, 3]`, `[B]`; the range is 255."""
    errors = np.square(copies.astype(np.float64) - references).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(errors, 255**2 * 1e-10))


def curve(name: str, pictures: np.ndarray) -> list[Rate]:
    """One point per quality, small to large files, of uint8 `[N, H, W, 3]`."""
    return [rate(name, quality, pictures) for quality in QUALITIES]


def rate(name: str, quality: int, pictures: np.ndarray) -> Rate:
    """All pictures at one quality of a format."""
    ratios, sizes = [], []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, format=name, quality=quality, **FORMATS[name])
        sizes.append(file.tell())
        copy = np.asarray(Image.open(file).convert("RGB"))
        ratios.append(psnr_of(copy[None], picture[None])[0])
    return Rate(float(np.mean(sizes)), float(np.mean(ratios)))


def at_equal_bytes(points: list[Rate], size: float) -> Rate | None:
    """The largest point that needs no more than `size` bytes; None where even the smallest file is larger."""
    within = [point for point in points if point.size <= size]
    return max(within, key=lambda point: point.size) if within else None
