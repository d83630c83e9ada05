"""Positions computed for any grid, so that one model takes pictures of every size."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sincos_2d(rows: int, columns: int, width: int, device: torch.device) -> torch.Tensor:
    """Sine-cosine positions of a grid in raster order, float32 `[rows * columns, width]`.

    Half of the width encodes the row, half the column.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"Width {width} is not a multiple of 4, which two axes of sines and cosines need.")
    frequencies = 10000 ** -(torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4))
    row_angles = torch.arange(rows, device=device, dtype=torch.float32)[:, None] * frequencies
    column_angles = torch.arange(columns, device=device, dtype=torch.float32)[:, None] * frequencies
    row_part = torch.cat([row_angles.sin(), row_angles.cos()], dim=-1)[:, None].expand(-1, columns, -1)
    column_part = torch.cat([column_angles.sin(), column_angles.cos()], dim=-1)[None].expand(rows, -1, -1)
    return torch.cat([row_part, column_part], dim=-1).reshape(rows * columns, width)


def time_features(time: torch.Tensor, width: int, period: float) -> torch.Tensor:
    """Cosines, then sines, of times `[B]` at frequencies falling from 1 to almost 1 / `period`, `[B, width]`."""
    frequencies = period ** -(torch.arange(width // 2, device=time.device, dtype=torch.float32) / (width // 2))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def resized_table(table: torch.Tensor, rows: int, columns: int, *, antialias: bool = False) -> torch.Tensor:
    """Learned positions `[side * side, width]` of a square grid, resized bilinearly to `[rows * columns, width]`."""
    side = round(len(table) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    square = table.T.unflatten(1, (side, side))[None]
    resized = F.interpolate(square, (rows, columns), mode="bilinear", align_corners=False, antialias=antialias)
    return resized[0].flatten(1).T


def nearest_table(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Learned positions `[side * side, width]` of a square grid, the nearest of them for each of `rows * columns`."""
    side = round(len(table) ** 0.5)
    square = table.T.unflatten(1, (side, side))[None]
    return F.interpolate(square, (rows, columns), mode="nearest")[0].flatten(1).T
