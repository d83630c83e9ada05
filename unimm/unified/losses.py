"""The modality-factored loss: codes are scored among codes, text among text.

Inside a picture only codes are legal, outside none is, so the softmax that generation samples from never spans both
blocks. Scoring each target on the rows of its own block learns that same distribution at a fraction of the cost.
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
        vocabulary: the two blocks of rows.
        image_weight: weight of a code target against a text target.
        num_targets: weighted targets to divide by, where a batch is a part of a larger one.
    """
    flat = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    is_code = vocabulary.is_code(targets)
    is_text = (targets >= 0) & ~is_code
    code_rows = slice(vocabulary.image_token_offset, vocabulary.image_token_end)
    code_sum = _sum_loss(flat[is_code], head_weight[code_rows], targets[is_code] - vocabulary.image_token_offset)
    text_sum = _sum_loss(flat[is_text], head_weight[: vocabulary.image_token_offset], targets[is_text])
    codes, texts = is_code.sum(), is_text.sum()
    divisor = texts + image_weight * codes if num_targets is None else num_targets
    return FactoredLoss(
        loss=(text_sum + image_weight * code_sum) / divisor.clamp_min(1),
        text_loss=text_sum.detach() / texts.clamp_min(1),
        image_loss=code_sum.detach() / codes.clamp_min(1),
    )


def _sum_loss(hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, rows).float(), targets, reduction="sum")
