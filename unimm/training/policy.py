"""The distribution that drawings are sampled from, and the log-probabilities of what was sampled from it.

A rollout is drawn under the grammar, and where a recipe says so under guidance, a temperature and a nucleus. Scored
without them it looks off-policy: part of the softmax lies on ids that could never be drawn, and a guided sample is
unlikely under the unguided model. Here the same steps are taken in the same order as in `generate`, on logits of the
ids only that the grammar allows somewhere, so that memory grows with the codes and not with the text rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import TopPLogitsWarper

from unimm.generation import EVERYWHERE
from unimm.sequence import IGNORED_LABEL, Levels, SpanGrammar
from unimm.unified.levels import ask


@dataclass(frozen=True)
class Scores:
    """Log-probabilities and entropies (without gradient) of sampled ids, float32 `[B, C]`; 0 at padding."""

    log_probs: torch.Tensor
    entropies: torch.Tensor


@dataclass(frozen=True)
class SamplingPolicy:
    """How pictures are sampled: guidance, grammar, temperature, nucleus, in this order.

    Args:
        grammar: of the model.
        null_prompt_ids: the unconditional prompt, which ends before the picture opens.
        temperature, top_p, guidance_scale: as in `generate`; 1 turns each off.
        guidance_interval: as in `generate`; (0, 1) guides everywhere.
        levels: that the model draws by; None where it draws code after code.
    """

    grammar: SpanGrammar
    null_prompt_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE
    levels: Levels | None = None

    def score(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_sampled: int
    ) -> Scores:
        """Scores of the last `num_sampled` ids of every row, which follow an open picture.

        Args:
            model: called with `input_ids`, `attention_mask`, `position_ids`, `logits_to_keep` and `rows_to_keep`, so
                that wrappers of parallel training and adapters stay in place.
            input_ids: int64 `[B, T]`, prompts padded on the left, which all end in the same opening of a picture, and
                samples padded on the right.
            attention_mask: int64 `[B, T]`, 0 at padding.
            num_sampled: C.
        """
        sampled = attention_mask[:, -num_sampled:].bool()
        states = self.grammar.states(input_ids)[:, -num_sampled - 1 : -1]
        table = self.grammar.table.to(input_ids.device)
        rows = table[states[sampled].unique()].any(dim=0).nonzero().squeeze(1)  # [R], ascending
        logits = self._logits(model, input_ids, attention_mask, num_sampled, rows)
        if self.guidance_scale != 1:
            null = torch.tensor(self.null_prompt_ids, device=input_ids.device).expand(len(input_ids), -1)
            opened = (input_ids[0, :-num_sampled] == self.grammar.vocabulary.boi_token_id).nonzero()
            drawn = slice(int(opened[-1]), None)  # `<boi>`, the size where the prompt gives it, and what follows
            ids = torch.cat([null, input_ids[:, drawn]], dim=1)
            mask = torch.cat([torch.ones_like(null), attention_mask[:, drawn]], dim=1)
            unconditional = self._logits(model, ids, mask, num_sampled, rows)
            guided = unconditional + self.guidance_scale * (logits - unconditional)
            inside = self.grammar.within(input_ids, self.guidance_interval)[:, -num_sampled - 1 : -1]
            logits = torch.where(inside[..., None], guided, logits)
        targets = input_ids[:, -num_sampled:]
        places = torch.searchsorted(rows, targets.contiguous()).clamp_max(len(rows) - 1)
        assert bool((rows[places] == targets)[sampled].all()), "an id was sampled that the grammar never allows"
        return self._score(logits, states, places, sampled, table[:, rows])

    def _logits(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_sampled: int,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Logits `[B, C, R]` of `rows` before each sampled id, at the positions that `generate` gives padded rows."""
        positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        if self.levels is None:
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                logits_to_keep=num_sampled + 1,
                rows_to_keep=rows,
                use_cache=False,
            )
            return output.logits[:, :-1]
        length = input_ids.shape[1]
        labels = input_ids.masked_fill(attention_mask == 0, IGNORED_LABEL)
        labels[:, :-num_sampled] = IGNORED_LABEL
        asked = ask(input_ids, labels, attention_mask, positions, self.grammar, self.levels)
        kept = torch.arange(length - num_sampled - 1, asked.input_ids.shape[1], device=input_ids.device)
        output = model(
            input_ids=asked.input_ids,
            attention_mask=asked.mask,
            position_ids=asked.position_ids,
            logits_to_keep=kept,
            rows_to_keep=rows,
            use_cache=False,
        )
        before, placeholders = output.logits[:, :num_sampled], output.logits[:, num_sampled + 1 :]
        is_code = (self.grammar.places(input_ids) >= 0) & (labels != IGNORED_LABEL)
        present = asked.labels[:, length + 1 :] != IGNORED_LABEL
        return before.masked_scatter(is_code[:, -num_sampled:, None], placeholders[present])

    def _score(
        self,
        logits: torch.Tensor,
        states: torch.Tensor,
        targets: torch.Tensor,
        sampled: torch.Tensor,
        table: torch.Tensor,
    ) -> Scores:
        """Softmax over the legal ids only, one grammar state at a time, since they share their legal ids.

        Targets and the columns of logits and table count within the rows that were kept.
        """
        log_probs = logits.new_zeros(targets.shape, dtype=torch.float32)
        entropies = torch.zeros_like(log_probs)
        for state in states[sampled].unique():
            here = (states == state) & sampled
            legal = table[state].nonzero().squeeze(1)
            scores = logits[here][:, legal].float() / self.temperature  # [M, legal]
            chosen = torch.searchsorted(legal, targets[here]).clamp_max(len(legal) - 1)
            assert bool((legal[chosen] == targets[here]).all()), "an id was sampled that the grammar forbids"
            if self.top_p < 1:
                scores = self._nucleus(scores, chosen)
            normal = scores.log_softmax(dim=1)
            log_probs = log_probs.masked_scatter(here, normal.gather(1, chosen[:, None]).squeeze(1))
            entropies[here] = torch.special.entr(normal.detach().exp()).sum(dim=1)
        return Scores(log_probs, entropies)

    def _nucleus(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Drop what lies outside the nucleus; the sampled id was inside when it was sampled, and stays."""
        kept = torch.isfinite(TopPLogitsWarper(self.top_p)(None, scores))
        return scores.masked_fill(~kept.scatter(1, chosen[:, None], True), -float("inf"))
