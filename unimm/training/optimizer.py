"""The optimiser of every stage: AdamW, with Muon for the hidden matrices where a recipe says so, and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import nn
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from unimm.nn.blocks import MLP, SelfAttention
from unimm.nn.conv import LocalBlock, ResidualBlock
from unimm.nn.processor import has_fast_bf16

SCHEDULES = ("cosine", "linear", "constant_with_warmup")
# The decoder layers of every language model of transformers are of the first class.
RESIDUAL_BLOCKS = (GradientCheckpointingLayer, SelfAttention, MLP, LocalBlock, ResidualBlock)


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates and their schedule.

    Args:
        steps: optimiser steps in all.
        lr: peak learning rate; it rises over `warmup` steps.
        schedule: what follows: `cosine` falls to zero, `linear` too, `constant_with_warmup` stays.
        muon_lr: peak learning rate of Muon (Jordan et al., 2024), which then takes the matrices of residual
            blocks; None leaves all weights to AdamW.
        clip: largest gradient norm.
        betas, weight_decay: of AdamW; vectors (norms, biases) are not decayed.

    Raises:
        ValueError: an unknown schedule, or no step.
    """

    steps: int
    lr: float = 1e-3
    schedule: str = "cosine"
    muon_lr: float | None = None
    warmup: int = 100
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        if self.steps < 1:
            raise ValueError(f"optimizer.steps is {self.steps}; train one step or more.")


class ExactMuon(Muon):
    """Muon whose updates are orthogonalised in their own precision, for processors that are slow in bfloat16."""

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[torch.Tensor]) -> list[torch.Tensor]:
        steps, weights = group["ns_steps"], group["ns_coeffs"]
        return [
            zero_power_via_newton_schulz_5(update.flatten(1), num_steps=steps, weights=weights, dtype=update.dtype)
            for update in updates
        ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """One optimiser over the trainable weights of `model`."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    hidden = set() if config.muon_lr is None else _hidden_matrices(model)
    adamw: list[dict[str, Any]] = [
        {"params": [w for w in trainable if w.ndim > 1 and w not in hidden], "weight_decay": config.weight_decay},
        {"params": [w for w in trainable if w.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.muon_lr is None:
        return torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas)
    matrices = [weight for weight in trainable if weight in hidden]
    groups = [group | {"use_muon": False, "lr": config.lr, "betas": config.betas} for group in adamw]
    kind = Muon if all(has_fast_bf16(weight.device) for weight in matrices) else ExactMuon
    return kind([{"params": matrices, "use_muon": True, "lr": config.muon_lr}, *groups])


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then what the recipe says."""
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)


def _hidden_matrices(model: nn.Module) -> set[torch.Tensor]:
    """Weights of linear layers and convolutions inside residual blocks: neither embedding, nor head, nor codebook."""
    blocks = [module for module in model.modules() if isinstance(module, RESIDUAL_BLOCKS)]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return {layer.weight for layer in layers}
