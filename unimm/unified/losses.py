"""The modality-factored loss: codes are scored among the codes of their slot, text among text.

Inside a picture only codes of one slot are legal, outside none is, so the softmax that generation samples from never
spans two blocks. Scoring each target on the rows of its own block learns that same distribution at a fraction of the
cost. Logits are made for a few targets at a time and never kept: their gradient is taken at once, into one gradient of
the head, as fused kernels do it (Cut Your Losses, 2411.09009; Liger Kernel, 2410.10989), which need Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from unimm.sequence import VisualVocabulary

CHUNK_TARGETS = 512  # logits of 152k text rows are then 0.3 GB


@dataclass
class FactoredLoss:
    """Scalars: what is minimised, and the plain means over text and over code targets."""

    loss: torch.Tensor
    text_loss: torch.Tensor
    image_loss: torch.Tensor


def factored_cross_entropy(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: VisualVocabulary,
    *,
    image_weight: float = 1.0,
    z_weight: float = 0.0,
    num_targets: torch.Tensor | None = None,
) -> FactoredLoss:
    """Next-token loss of hidden states `[B, T, D]` under a plain head `[V, D]`.

    Args:
        hidden: final states.
        head_weight: rows of the head.
        labels: int64 `[B, T]`, not shifted; -100 is ignored.
        vocabulary: the blocks of rows.
        image_weight: weight of a code target against a text target.
        z_weight: weight of the squared log of the softmax's divisor, which keeps logits from drifting (PaLM,
            2204.02311).
        num_targets: weighted targets to divide by, where a batch is a part of a larger one.

    Raises:
        ValueError: labels of another shape than the states.
    """
    if labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels are {tuple(labels.shape)} for input of {tuple(hidden.shape[:2])}; give one label per position, "
            "-100 where nothing is learned, and do not shift them."
        )
    flat = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    groups = (vocabulary.text_blocks, *((block,) for block in vocabulary.blocks))
    weights = (1.0, *[image_weight] * vocabulary.num_codebooks)
    total, sums, counts = _FactoredSum.apply(flat, head_weight, targets, groups, weights, z_weight)
    divisor = (counts * counts.new_tensor(weights)).sum() if num_targets is None else num_targets
    return FactoredLoss(
        loss=total / divisor.clamp_min(1),
        text_loss=sums[0] / counts[0].clamp_min(1),
        image_loss=sums[1:].sum() / counts[1:].sum().clamp_min(1),
    )


class _FactoredSum(torch.autograd.Function):
    """Weighted sum over all targets; beside it, without gradient, plain sums and counts per group `[G]`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [M, D]
        weight: torch.Tensor,  # [V, D]
        targets: torch.Tensor,  # [M]
        groups: tuple[tuple[slice, ...], ...],
        weights: tuple[float, ...],
        z_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        sums, counts = total.new_zeros(len(groups)), total.new_zeros(len(groups))
        for group, blocks in enumerate(groups):
            inside, columns = _columns(targets, blocks)
            counts[group] = len(inside)
            rows = [weight[block].to(dtype) for block in blocks]
            for places, chosen in zip(inside.split(CHUNK_TARGETS), columns.split(CHUNK_TARGETS), strict=True):
                states = hidden[places].to(dtype)
                parts = [F.linear(states, block_rows).float() for block_rows in rows]
                logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
                divisors = logits.logsumexp(dim=1)  # their logs
                losses = divisors - logits.gather(1, chosen[:, None]).squeeze(1)
                sums[group] += losses.sum()
                total += weights[group] * (losses + z_weight * divisors.square()).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                slopes = logits.sub_(divisors[:, None]).exp_()
                slopes *= (1 + 2 * z_weight * divisors)[:, None]
                slopes[torch.arange(len(chosen), device=chosen.device), chosen] -= 1
                slopes = slopes.mul_(weights[group]).to(dtype)
                start = 0
                for block, block_rows in zip(blocks, rows, strict=True):
                    part = slopes[:, start : start + block.stop - block.start]
                    start += block.stop - block.start
                    if grad_hidden is not None:
                        grad_hidden[places] += (part @ block_rows).to(hidden.dtype)
                    if grad_weight is not None and dtype == weight.dtype:
                        grad_weight[block].addmm_(part.T, states)
                    elif grad_weight is not None:
                        grad_weight[block] += part.T @ states
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(sums, counts)
        return total, sums, counts

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The weight's gradient is its own and large, so it is scaled where it lies.
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight.mul_(grad_total.to(grad_weight.dtype)),
            None,
            None,
            None,
            None,
        )


def _columns(targets: torch.Tensor, blocks: tuple[slice, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the targets in some blocks of rows, and their columns among those rows side by side."""
    inside, columns, start = torch.zeros_like(targets, dtype=torch.bool), targets, 0
    for block in blocks:
        here = (targets >= block.start) & (targets < block.stop)
        inside, columns = inside | here, torch.where(here, targets - block.start + start, columns)
        start += block.stop - block.start
    places = inside.nonzero().squeeze(1)
    return places, columns[places]
