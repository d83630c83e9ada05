"""Sixteen outlines as antialiased coverage masks: what the renderer fills and what the judge compares with."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

SUBSAMPLES = 8  # per pixel and axis

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _polygon(points: list[tuple[float, float]]) -> Inside:
    """Even-odd test against a closed polygon."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        odd = np.zeros(x.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if y0 == y1:
                continue
            crosses = (y0 > y) != (y1 > y)
            odd ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        return odd

    return inside


def _star_points() -> list[tuple[float, float]]:
    angles = np.pi * np.arange(10) / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return [(float(r * np.cos(a)), float(r * np.sin(a)) + 0.06) for r, a in zip(radii, angles, strict=True)]


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across, up = 1.18 * x, 0.12 - 1.18 * y
    return (across**2 + up**2 - 1) ** 3 - across**2 * up**3 <= 0


# x grows to the right, y downwards; every outline fills most of [-1, 1] x [-1, 1].
OUTLINES: dict[str, Inside] = {
    "circle": lambda x, y: x**2 + y**2 <= 0.95**2,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) <= 0.85,
    "triangle": _polygon([(0.0, -0.95), (0.98, 0.8), (-0.98, 0.8)]),
    "diamond": lambda x, y: np.abs(x) / 0.72 + np.abs(y) <= 1,
    "star": _polygon(_star_points()),
    "heart": _heart,
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (np.maximum(np.abs(x), np.abs(y)) <= 0.92),
    "ring": lambda x, y: (x**2 + y**2 <= 0.95**2) & (x**2 + y**2 >= 0.52**2),
    "moon": lambda x, y: (x**2 + y**2 <= 0.95**2) & ((x - 0.5) ** 2 + y**2 >= 0.8**2),
    "arrow": _polygon(
        [(0.95, 0.0), (0.1, -0.85), (0.1, -0.32), (-0.95, -0.32), (-0.95, 0.32), (0.1, 0.32), (0.1, 0.85)]
    ),
    "hourglass": _polygon([(-0.85, -0.9), (0.85, -0.9), (0.2, 0.0), (0.85, 0.9), (-0.85, 0.9), (-0.2, 0.0)]),
    "frame": lambda x, y: (np.maximum(np.abs(x), np.abs(y)) <= 0.85) & (np.maximum(np.abs(x), np.abs(y)) >= 0.45),
    "crown": _polygon(
        [(-0.92, 0.75), (-0.92, -0.75), (-0.45, -0.05), (0.0, -0.85), (0.45, -0.05), (0.92, -0.75), (0.92, 0.75)]
    ),
    "bolt": _polygon([(0.25, -0.95), (-0.7, 0.15), (-0.1, 0.15), (-0.3, 0.95), (0.7, -0.25), (0.05, -0.25)]),
    "house": _polygon(
        [(0.0, -0.95), (0.95, -0.1), (0.62, -0.1), (0.62, 0.85), (-0.62, 0.85), (-0.62, -0.1), (-0.95, -0.1)]
    ),
    "tree": _polygon([(0.0, -0.95), (0.8, 0.4), (0.2, 0.4), (0.2, 0.92), (-0.2, 0.92), (-0.2, 0.4), (-0.8, 0.4)]),
}
SHAPES = tuple(OUTLINES)


@lru_cache(maxsize=256)
def coverage(shape: str, size: int) -> np.ndarray:
    """Share of each pixel inside the outline, float32 `[size, size]`, read-only."""
    ticks = (np.arange(size * SUBSAMPLES) + 0.5) / (size * SUBSAMPLES) * 2 - 1
    x, y = np.meshgrid(ticks, ticks)
    fine = OUTLINES[shape](x, y).reshape(size, SUBSAMPLES, size, SUBSAMPLES)
    mask = fine.mean(axis=(1, 3), dtype=np.float64).astype(np.float32)
    mask.setflags(write=False)
    return mask
