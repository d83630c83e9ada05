"""The grammar and the guidance as logits processors, so that every caller of `generate` obeys them."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from unimm.sequence import SpanGrammar


class GrammarLogitsProcessor(LogitsProcessor):
    """Forbids every id that the span grammar does not allow next."""

    def __init__(self, grammar: SpanGrammar, device: torch.device | str) -> None:
        self.grammar = grammar
        self.forbidden = ~grammar.table.to(device)  # [states, V]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        states = self.grammar.states(input_ids)[:, -1]
        return scores.masked_fill(self.forbidden[states], -float("inf"))


class ClassifierFreeGuidance(LogitsProcessor):
    """Steers pictures away from what the model would draw without a prompt (2207.12598, on logits).

    Scores come as `[2 B, V]`, conditional rows first; inside a picture they become `u + scale * (c - u)`, elsewhere
    `c`.

    Args:
        grammar: tells where pictures are open.
        scale: one factor, or one per sample `[B]`; 1 leaves the conditional scores as they are.
    """

    def __init__(self, grammar: SpanGrammar, scale: float | torch.Tensor) -> None:
        self.grammar = grammar
        self.scale = scale[:, None] if isinstance(scale, torch.Tensor) else scale

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = scores.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        return torch.where(self.grammar.in_span(input_ids)[:, None], guided, conditional)
