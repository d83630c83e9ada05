"""Full-reference scores between pictures in [-1, 1]."""

from __future__ import annotations

import torch


def psnr(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per picture, `[B]`, of `[B, 3, H, W]` with values in [-1, 1]."""
    mse = ((pictures.float() - references.float()) / 2).square().mean(dim=(1, 2, 3))
    return -10 * mse.clamp_min(1e-10).log10()
