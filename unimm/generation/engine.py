"""The fast way through a generation: the loop of stock `generate` for greedy and sampled answers, step by step cheaper.

In: prepared prompts, processors and stopping criteria. Out: the sequences that the stock loop gives, the same ids under
greedy decoding and the same distribution under sampling. Guidance doubles the batch, equal prompts are read once, the
head computes only the rows that the grammar allows, sampling sees only those, and inside a picture the host never waits
for an id: which rows are legal at each place of a picture is known before it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import EosTokenCriteria, LogitsProcessor, MaxLengthCriteria, StoppingCriteria
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from unimm.generation.processors import ClassifierFreeGuidance, GrammarLogitsProcessor
from unimm.sequence import SpanGrammar

# Warpers see scores only, so they do the same on the legal ids alone as on a row where the others are -inf.
WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
COVERED = (*WARPERS, ClassifierFreeGuidance, GrammarLogitsProcessor, SuppressTokensLogitsProcessor)
SPARSE = 1.25  # legal ids that spread over more rows than this times their number are gathered
SMALLEST_NOISE = torch.finfo(torch.float32).tiny


class Decoder(Protocol):
    """A language model over a cache, as the engine drives it; R rows, W ids per row, S rows of the head."""

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, capacity: int) -> torch.Tensor:
        """Hidden states `[R, 1, D]` after prompts `[R, T]`, padded on the left."""

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[R, W, D]` of the next ids `[R, W]`."""

    def rewind(self, positions: int) -> None:
        """Forget the last ids."""

    def logits(self, hidden: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """Logits `[R, S]` of hidden states `[R, D]`."""


@dataclass(frozen=True)
class Choices:
    """Legal ids of a grammar state.

    Args:
        rows: of the head, a block or single rows.
        forbidden: bool `[S]`, rows of the block that are not legal; None where all are.
    """

    rows: slice | torch.Tensor
    forbidden: torch.Tensor | None

    @classmethod
    def among(cls, legal: torch.Tensor) -> Choices:
        """The rows to compute for legal ids, bool `[V]`."""
        ids = legal.nonzero().flatten()
        first, end = int(ids[0]), int(ids[-1]) + 1
        if end - first > SPARSE * len(ids):
            return cls(ids, None)
        return cls(slice(first, end), None if end - first == len(ids) else ~legal[first:end])

    def to(self, device: torch.device) -> Choices:
        """The same on another device."""
        rows = self.rows.to(device) if isinstance(self.rows, torch.Tensor) else self.rows
        return Choices(rows, None if self.forbidden is None else self.forbidden.to(device))

    def ids(self, chosen: torch.Tensor) -> torch.Tensor:
        """Ids of places among the rows."""
        return self.rows[chosen] if isinstance(self.rows, torch.Tensor) else chosen + self.rows.start


@dataclass(frozen=True)
class Unconditional:
    """Prompts `[B, U]` of the unconditional rows and their mask."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """Sequences `[B, T]`, and the scores `[B, V]` of every new position where they were kept."""

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None


def is_covered(processors: Iterable[LogitsProcessor], criteria: Iterable[StoppingCriteria]) -> bool:
    """Whether the engine knows what these do."""
    known = all(type(processor) in COVERED for processor in processors)
    return known and all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)


class Engine:
    """Generates one batch.

    Args:
        decoder: of the model, fresh.
        grammar: of the model.
        processors: those of the stock loop, all of them covered (`is_covered`).
        do_sample: False takes the likeliest id.
        pad_token_id: fills rows that ended.
        stop_ids: ids that end a row.
    """

    def __init__(
        self,
        decoder: Decoder,
        grammar: SpanGrammar,
        processors: Sequence[LogitsProcessor],
        *,
        do_sample: bool,
        pad_token_id: int,
        stop_ids: frozenset[int],
    ) -> None:
        self.decoder, self.grammar, self.do_sample = decoder, grammar, do_sample
        self.pad_token_id, self.stop_ids = pad_token_id, stop_ids
        self.warpers = [processor for processor in processors if isinstance(processor, WARPERS)]
        self.guidance = next((p for p in processors if isinstance(p, ClassifierFreeGuidance)), None)
        self.suppressed = [
            token
            for processor in processors
            if isinstance(processor, SuppressTokensLogitsProcessor)
            for token in processor.suppress_tokens.tolist()
        ]
        self.choices: dict[int, Choices] = {}

    def generate(
        self,
        input_ids: torch.Tensor,
        prompt: torch.Tensor,
        attention_mask: torch.Tensor,
        unconditional: Unconditional | None,
        *,
        max_length: int,
        streamer: BaseStreamer | None,
        keep_scores: bool,
    ) -> Drawn:
        """Continue `input_ids` `[B, T]`.

        Args:
            prompt: the same with the codes of its pictures in place of placeholders.
            attention_mask: of the prompt.
            unconditional: rows that guidance steers away from; needed with guidance.
            max_length: of a whole sequence.
            streamer: is given every new id.
            keep_scores: return the processed scores, `-inf` at ids that were not legal.
        """
        batch, length = input_ids.shape
        sequences = torch.nn.functional.pad(input_ids, (0, max_length - length), value=self.pad_token_id)
        rows, finished, scores = input_ids.tolist(), [False] * batch, []
        capacity = min(max_length, length + self.grammar.longest)
        hidden = self._read(prompt, attention_mask, unconditional, capacity)
        while True:
            plans = [None if done else self.grammar.ahead(row) for row, done in zip(rows, finished, strict=True)]
            known = min(len(plan) for plan in plans if plan)
            steps = min(known, max_length - length)
            for step in range(steps):
                states = [plan[step] if plan else None for plan in plans]
                ids, kept = self._choose(hidden[:, -1], states, keep_scores)
                sequences[:, length + step] = ids
                if kept is not None:
                    scores.append(kept)
                if streamer is not None:
                    streamer.put(ids.cpu())
                if step < steps - 1:
                    hidden = self._step(ids)
            new = sequences[:, length : length + steps].tolist()
            length += steps
            for place, added in enumerate(new):
                rows[place] += added
                finished[place] = finished[place] or not self.stop_ids.isdisjoint(added)
            if all(finished) or length == max_length:
                break
            hidden = self._step(ids)
        if streamer is not None:
            streamer.end()
        return Drawn(sequences[:, :length], tuple(scores) if keep_scores else None)

    def _read(
        self, prompt: torch.Tensor, mask: torch.Tensor, unconditional: Unconditional | None, capacity: int
    ) -> torch.Tensor:
        if self.guidance is None:
            return self.decoder.prefill(prompt, mask, capacity)
        assert unconditional is not None
        width = max(prompt.shape[1], unconditional.input_ids.shape[1])
        ids = (prompt, unconditional.input_ids)
        masks = (mask, unconditional.attention_mask)
        return self.decoder.prefill(
            torch.cat([pad_left(row, width, self.pad_token_id) for row in ids]),
            torch.cat([pad_left(row, width, 0) for row in masks]),
            capacity + width - prompt.shape[1],
        )

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.step((ids if self.guidance is None else ids.repeat(2))[:, None])

    def _choose(
        self, hidden: torch.Tensor, states: Sequence[int | None], keep_scores: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Next ids `[B]` of rows in these states, None for rows that ended, and their scores `[B, V]` if wanted."""
        batch = len(states)
        ids = torch.full((batch,), self.pad_token_id, device=hidden.device)
        kept = None
        if keep_scores:
            kept = hidden.new_full((batch, self.grammar.vocabulary.size), -float("inf"), dtype=torch.float32)
        for state in {state for state in states if state is not None}:
            members = [place for place, other in enumerate(states) if other == state]
            at = None if len(members) == batch else torch.tensor(members, device=hidden.device)
            choices = self._legal(state, hidden.device)
            scores = self._scores(hidden, at, state, choices)
            chosen = choices.ids(self._draw(scores))
            if at is None:
                ids = chosen
            else:
                ids[at] = chosen
            if kept is not None:
                rows = torch.arange(batch, device=hidden.device) if at is None else at
                places = torch.arange(scores.shape[1], device=hidden.device)
                kept[rows[:, None], choices.ids(places)] = scores
        return ids, kept

    def _legal(self, state: int, device: torch.device) -> Choices:
        if state not in self.choices:
            legal = self.grammar.table[state].clone()
            legal[self.suppressed] = False
            self.choices[state] = Choices.among(legal).to(device)
        return self.choices[state]

    def _scores(self, hidden: torch.Tensor, at: torch.Tensor | None, state: int, choices: Choices) -> torch.Tensor:
        """Guided, warped scores `[B, S]` of the rows at `at`."""
        conditional, unconditional = (hidden, None) if self.guidance is None else hidden.chunk(2)
        if at is not None:
            conditional = conditional[at]
            unconditional = None if unconditional is None else unconditional[at]
        if unconditional is None or not state:
            scores = self.decoder.logits(conditional, choices.rows).float()
        else:
            assert self.guidance is not None
            scale = self.guidance.scale
            if isinstance(scale, torch.Tensor) and at is not None:
                scale = scale[at]
            guided, away = self.decoder.logits(torch.cat([conditional, unconditional]), choices.rows).float().chunk(2)
            scores = away + scale * (guided - away)
        if choices.forbidden is not None:
            scores = scores.masked_fill(choices.forbidden, -float("inf"))
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Places `[B]`: the likeliest, or one sampled by the Gumbel trick, which needs neither softmax nor sums."""
        if not self.do_sample or scores.shape[1] == 1:
            return scores.argmax(dim=1)
        noise = torch.empty_like(scores).exponential_().clamp_min_(SMALLEST_NOISE)
        return (scores - noise.log_()).argmax(dim=1)


def pad_left(rows: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """`[B, T]` to `[B, length]`."""
    return torch.nn.functional.pad(rows, (length - rows.shape[1], 0), value=value)
