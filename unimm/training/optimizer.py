"""AdamW with warm-up and cosine decay: the one optimiser of the codec and detokenizer stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        steps: optimiser steps in all.
        lr: peak learning rate; it rises over `warmup` steps and falls to zero by a cosine.
        clip: largest gradient norm.
        betas, weight_decay: of AdamW; vectors (norms, biases) are not decayed.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01


def build_optimizer(
    model: nn.Module, config: OptimizerConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimiser and schedule over the trainable weights of `model`."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trainable if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in trainable if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, config.warmup, config.steps)
