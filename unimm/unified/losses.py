"""The modality-factored loss: codes are scored among the codes of their slot, text among text.

Inside a picture only codes of one slot are legal, outside none is, so the softmax that generation samples from never
spans two blocks. Scoring each target on the rows of its own block learns that same distribution at a fraction of the
cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from unimm.sequence import VisualVocabulary


@dataclass
class FactoredLoss:
    """Scalars: the weighted mean that is minimised, and the plain means over text and over code targets."""

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
    num_targets: torch.Tensor | None = None,
) -> FactoredLoss:
    """Next-token loss of hidden states `[B, T, D]` under a plain head `[V, D]`.

    Args:
        hidden: final states.
        head_weight: rows of the head.
        labels: int64 `[B, T]`, not shifted; -100 is ignored.
        vocabulary: the blocks of rows.
        image_weight: weight of a code target against a text target.
        num_targets: weighted targets to divide by, where a batch is a part of a larger one.
    """
    flat = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    text_sum, texts = _block_loss(flat, head_weight, targets, vocabulary.text_blocks)
    slots = [_block_loss(flat, head_weight, targets, (block,)) for block in vocabulary.blocks]
    code_sum, codes = (torch.stack(values).sum() for values in zip(*slots, strict=True))
    divisor = texts + image_weight * codes if num_targets is None else num_targets
    return FactoredLoss(
        loss=(text_sum + image_weight * code_sum) / divisor.clamp_min(1),
        text_loss=text_sum.detach() / texts.clamp_min(1),
        image_loss=code_sum.detach() / codes.clamp_min(1),
    )


def _block_loss(
    hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor, blocks: tuple[slice, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of the targets in some blocks of rows, scored among those rows, and their number."""
    inside, columns, start = torch.zeros_like(targets, dtype=torch.bool), targets, 0
    for block in blocks:
        here = (targets >= block.start) & (targets < block.stop)
        inside, columns = inside | here, torch.where(here, targets - block.start + start, columns)
        start += block.stop - block.start
    kept = hidden[inside]
    parts = [F.linear(kept, head_weight[block]).float() for block in blocks]
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return F.cross_entropy(logits, columns[inside], reduction="sum"), inside.sum()
