"""How gradients pass a choice that has none: each takes vectors, the rows chosen for them, and all rows.

All give the value of the chosen rows; they differ in what the vectors and the rows learn from it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from unimm.codec.quantizers.base import straight_through

EPS = 1e-6
# Vectors [B, N, D], ids [B, N], rows [S, D] to the chosen rows [B, N, D].
Estimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def copied(vectors: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The vectors take the gradient of their rows as it is (1308.3432); rows learn nothing."""
    return straight_through(vectors, F.embedding(ids, rows))


def rotated(vectors: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The vectors take it through the rotation and stretch that would carry each onto its row (2410.06424)."""
    chosen = F.embedding(ids, rows).detach()
    still = vectors.detach()
    length, chosen_length = (each.norm(dim=-1, keepdim=True).clamp_min(EPS) for each in (still, chosen))
    one, other = still / length, chosen / chosen_length
    middle = F.normalize(one + other, dim=-1, eps=EPS)  # a reflection across it, after one at the origin
    turned = vectors - 2 * (vectors * middle).sum(-1, keepdim=True) * middle
    turned = turned + 2 * (vectors * one).sum(-1, keepdim=True) * other
    moved = turned * (chosen_length / length)
    return moved + (chosen - moved).detach()  # exactly the row, whatever the rounding


def weighed(vectors: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Vectors and all rows learn as if the choice were the softmax of their dot products (IBQ, 2412.02692)."""
    soft = (vectors @ rows.T).softmax(dim=-1)  # [B, N, S]
    hard = F.one_hot(ids, len(rows)).to(soft.dtype)
    mixed = (hard + soft - soft.detach()) @ rows
    return mixed + (F.embedding(ids, rows) - mixed).detach()


ESTIMATORS: dict[str, Estimator] = {"copied": copied, "rotated": rotated, "weighed": weighed}


def entropy_gap(scores: torch.Tensor) -> torch.Tensor:
    """Mean entropy of softmax(scores) `[M, S]`, less the entropy of their mean, in nats: low where every vector is sure
    of its row and all rows are used (2310.05737).
    """
    logs = scores.log_softmax(dim=-1)
    each = -(logs.exp() * logs).sum(dim=-1).mean()
    mean = logs.exp().mean(dim=0)
    return each + (mean * mean.clamp_min(1e-9).log()).sum()


def bit_entropy_gap(chances: torch.Tensor) -> torch.Tensor:
    """The same for bits that are 1 with `chances` `[M, bits]`, one bit at a time and summed (BSQ, 2406.07548)."""
    return _bit_entropy(chances).sum(dim=-1).mean() - _bit_entropy(chances.mean(dim=0)).sum()


def _bit_entropy(chances: torch.Tensor) -> torch.Tensor:
    chances = chances.clamp(1e-6, 1 - 1e-6)
    return -(chances * chances.log() + (1 - chances) * (1 - chances).log())
