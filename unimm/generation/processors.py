"""The grammar and the guidance as logits processors, so that every caller of `generate` obeys them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from unimm.sequence import SpanGrammar

EVERYWHERE = (0.0, 1.0)


class GrammarLogitsProcessor(LogitsProcessor):
    """Forbids every id that the span grammar does not allow next."""

    def __init__(self, grammar: SpanGrammar, device: torch.device | str) -> None:
        self.grammar = grammar
        self.forbidden = ~grammar.table.to(device)  # [states, V]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        states = self.grammar.states(input_ids)[:, -1]
        return scores.masked_fill(self.forbidden[states], -float("inf"))


def check_interval(interval: Sequence[float]) -> tuple[float, float]:
    """A guidance interval as a pair.

    Raises:
        ValueError: no two rising numbers from 0 to 1.
    """
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"guidance_interval is {tuple(interval)}; give where guidance begins and ends as shares of a picture's "
            "codes, for example (0, 0.5) for the first half, and (0, 1) for the whole."
        )
    return interval[0], interval[1]


class ClassifierFreeGuidance(LogitsProcessor):
    """Steers pictures away from what the model would draw without a prompt (2207.12598, on logits).

    Scores come as `[2 B, V]`, conditional rows first; inside a picture they become `u + scale * (c - u)`, elsewhere
    `c`.

    Args:
        grammar: tells where pictures are open.
        scale: one factor, or one per sample `[B]`; 1 leaves the conditional scores as they are.
        interval: share of a picture's codes that is guided, (start, end) in [0, 1]; less than the whole approximates
            guidance by what matters of it, an idea from diffusion (2404.07724).

    Raises:
        ValueError: an interval that is none.
    """

    def __init__(
        self, grammar: SpanGrammar, scale: float | torch.Tensor, interval: Sequence[float] = EVERYWHERE
    ) -> None:
        self.grammar = grammar
        self.scale = scale[:, None] if isinstance(scale, torch.Tensor) else scale
        self.interval = check_interval(interval)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = scores.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        return torch.where(self.grammar.within(input_ids, self.interval)[:, -1:], guided, conditional)
