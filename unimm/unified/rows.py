"""How the rows of a grown vocabulary begin."""

from __future__ import annotations

import math

import torch

LENGTH_SCALE = 0.5  # in standard deviations of the code vectors: how far alike rows reach
NOISE_SHARE = 0.25


def extend_rows(rows: torch.Tensor, size: int) -> torch.Tensor:
    """`[V, D]` with rows of noise appended up to `size`, of the given rows' mean norm."""
    norm = rows.float().norm(dim=1).mean()
    noise = torch.randn(size - len(rows), rows.shape[1], dtype=torch.float32) * norm / rows.shape[1] ** 0.5
    return torch.cat([rows, noise.to(rows.dtype)])


def code_rows(vectors: torch.Tensor, width: int, norm: float) -> torch.Tensor:
    """Rows of width `width` and mean norm `norm` for codes that stand for `vectors` `[S, D]`.

    Random Fourier features (Rahimi and Recht, 2007): codes of near vectors get near rows, so that what is learned of
    one code is learned of its neighbours. A share of noise keeps every row its own.
    """
    centred = vectors.float() - vectors.float().mean(dim=0)
    scaled = centred / centred.std().clamp_min(1e-6)
    frequencies = torch.randn(vectors.shape[1], width) / (LENGTH_SCALE * vectors.shape[1] ** 0.5)
    features = torch.cos(scaled @ frequencies + 2 * math.pi * torch.rand(width))
    features = features - features.mean(dim=0)
    rows = features / features.std() + NOISE_SHARE * torch.randn_like(features)
    return rows * norm / rows.norm(dim=1).mean()
