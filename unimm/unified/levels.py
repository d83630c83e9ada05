"""What a model that draws by levels learns: all codes of a level at once, given the levels before (as in 2404.02905).

A code is asked for by a placeholder, which stands where the code will stand and sees what is before its level, and the
placeholders of the level before itself, so that it knows which one it is. Codes that are known are ids like any others:
text and later levels see them, and never a placeholder. In training all placeholders of a row stand behind it, each
with the position of its code, and the mask says who sees whom.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from unimm.sequence import IGNORED_LABEL, Levels, SpanGrammar


class Asked(NamedTuple):
    """Rows with Q placeholders behind them.

    Args:
        input_ids, position_ids: int64 `[B, T + Q]`.
        mask: bool `[B, 1, T + Q, T + Q]`, what each position sees.
        labels: int64 `[B, T + Q + 1]`, what the states of the positions before them are to predict.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def ask(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    grammar: SpanGrammar,
    levels: Levels,
) -> Asked:
    """Placeholders for every code that is a target.

    Args:
        input_ids, labels: int64 `[B, T]`, not shifted.
        attention_mask: int64 `[B, T]`, 0 at padding; None where all padding is on the right.
        position_ids: int64 `[B, T]`, which begin anew where rows are packed.

    Raises:
        ValueError: labels of another shape than the ids.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels are {tuple(labels.shape)} for input_ids of {tuple(input_ids.shape)}; give one each.")
    device, length = input_ids.device, input_ids.shape[1]
    columns = torch.arange(length, device=device).expand_as(input_ids)
    seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if position_ids is None:
        position_ids = columns if attention_mask is None else (seen.cumsum(dim=1) - 1).clamp_min(0)
    places = grammar.places(input_ids)  # [B, T]
    asked = (places >= 0) & (labels != IGNORED_LABEL)
    count = int(asked.sum(dim=1).max())
    targets = (~asked).int().argsort(dim=1, stable=True)[:, :count]  # [B, Q], columns of codes, then of anything
    present = asked.gather(1, targets)
    starts = torch.tensor(levels.starts(grammar.longest), device=device)
    place = places.gather(1, targets).clamp_min(0)
    begins = targets - place + starts[place]  # [B, Q], columns of the first codes of their levels

    rows = (position_ids == 0).cumsum(dim=1)  # [B, T], which of the rows that are packed into one
    sees_row = (columns[:, None] <= columns[:, :, None]) & (rows[:, None] == rows[:, :, None])
    sees_before = (columns[:, None] < begins[:, :, None]) & (rows[:, None] == rows.gather(1, targets)[:, :, None])
    order = torch.arange(count, device=device)
    sees_level = (begins[:, None] == begins[:, :, None]) & (order <= order[:, None]) & present[:, None]
    mask = torch.cat(
        [
            F.pad(sees_row & seen.bool()[:, None], (0, count)),
            torch.cat([sees_before & seen.bool()[:, None], sees_level], dim=2),
        ],
        dim=1,
    )
    mask |= torch.eye(length + count, dtype=torch.bool, device=device)  # padding, which no one else sees, too
    return Asked(
        input_ids=F.pad(input_ids, (0, count), value=grammar.vocabulary.image_token_id),
        position_ids=torch.cat([position_ids, position_ids.gather(1, targets)], dim=1),
        mask=mask[:, None],
        labels=torch.cat(
            [
                F.pad(labels.masked_fill(asked, IGNORED_LABEL), (0, 1), value=IGNORED_LABEL),
                labels.gather(1, targets).masked_fill(~present, IGNORED_LABEL),
            ],
            dim=1,
        ),
    )
