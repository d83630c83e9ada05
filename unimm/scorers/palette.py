"""The colours of the rendered worlds, far apart in CIE Lab, and the pale grounds they stand on."""

from __future__ import annotations

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 135, 0),
    "yellow": (245, 205, 20),
    "green": (35, 150, 60),
    "blue": (30, 90, 220),
    "purple": (130, 45, 165),
    "pink": (250, 120, 185),
    "black": (25, 25, 30),
    "brown": (125, 70, 30),
    "gray": (130, 132, 138),
    "cyan": (40, 195, 225),
    "lime": (150, 215, 30),
    "navy": (25, 30, 110),
    "olive": (120, 120, 20),
    "lavender": (175, 155, 240),
    "maroon": (125, 15, 45),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "cream": (252, 246, 228),
    "mist": (228, 240, 252),
}

_RGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_D65 = np.array([0.9505, 1.0, 1.089])


def _to_linear(values: np.ndarray) -> np.ndarray:
    scaled = np.asarray(values, dtype=np.float64) / 255
    return np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)


_LINEAR = _to_linear(np.arange(256))  # powers are most of the work, and bytes have only these


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 255], `[..., 3]`, to CIE Lab under D65."""
    linear = _LINEAR[rgb] if rgb.dtype == np.uint8 else _to_linear(rgb)
    ratio = linear @ _RGB_TO_XYZ.T / _D65
    cube = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * cube[..., 1] - 16, 500 * (cube[..., 0] - cube[..., 1]), 200 * (cube[..., 1] - cube[..., 2])], axis=-1
    )


def nearest_colour(rgb: np.ndarray) -> str:
    """The palette entry nearest in CIE Lab to one sRGB value `[3]`."""
    names = list(COLOURS)
    distances = np.linalg.norm(to_lab(np.array([COLOURS[name] for name in names])) - to_lab(rgb), axis=1)
    return names[int(distances.argmin())]
