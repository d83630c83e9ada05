"""The fast way through a generation: the loop of stock `generate` for greedy and sampled answers, step by step cheaper.

In: prepared prompts, processors and stopping criteria. Out: the sequences that the stock loop gives, the same ids under
greedy decoding and the same distribution under sampling. Guidance doubles the batch for as long as it acts, equal
prompts are read once, the head computes only the rows that the grammar allows, sampling sees only those, and inside a
picture the host never waits for an id: which rows are legal at each place of a picture is known before it is drawn.

With a window the codes of a picture are guessed ahead and checked together (Jacobi iteration on fixed noise; compare
2410.01699 and 2510.24211). Sampling by the Gumbel trick makes a code a function of the codes before it and of its own
noise, so guesses that come out as they went in are the codes that one step at a time would have drawn.

A model that draws by levels is asked for all codes of a level at once, by placeholders in their places, which are
forgotten when the codes are known (see `unimm.unified.levels`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
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
from unimm.sequence import Levels, SpanGrammar

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

    def keep(self, rows: int) -> None:
        """Go on with the first rows only."""


@dataclass(frozen=True)
class Step:
    """A place to come: the state of the grammar there, and whether guidance acts."""

    state: int
    guided: bool


@dataclass(frozen=True)
class Choices:
    """Legal ids of a grammar state.

    Args:
        rows: of the head, a block or single rows.
        forbidden: bool `[S]`, rows of the block that are not legal; None where all are.
        device: of the scores.
    """

    rows: slice | torch.Tensor
    forbidden: torch.Tensor | None
    device: torch.device

    @classmethod
    def among(cls, legal: torch.Tensor, device: torch.device) -> Choices:
        """The rows to compute for legal ids, bool `[V]`."""
        ids = legal.nonzero().flatten()
        first, end = int(ids[0]), int(ids[-1]) + 1
        if end - first > SPARSE * len(ids):
            return cls(ids.to(device), None, device)
        forbidden = None if end - first == len(ids) else ~legal[first:end].to(device)
        return cls(slice(first, end), forbidden, device)

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
    """Sequences `[B, T]`, the scores `[B, V]` of every new position where they were kept, and the passes it took."""

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None
    passes: int


def is_covered(processors: Iterable[LogitsProcessor], criteria: Iterable[StoppingCriteria]) -> bool:
    """Whether the engine knows what these do."""
    known = all(type(processor) in COVERED for processor in processors)
    return known and all(type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria)


class Engine:
    """Generates one batch.

    Args:
        decoder: of the model, which no other batch uses.
        grammar: of the model.
        processors: those of the stock loop, all of them covered (`is_covered`).
        do_sample: False takes the likeliest id.
        pad_token_id: fills rows that ended.
        stop_ids: ids that end a row.
        window: codes that one pass checks inside a picture. They are drawn one at a time where it is 1, where rows of
            a batch are at different places, and where scores are kept.
        levels: of a model that draws by them; None draws one code after the other.
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
        window: int = 1,
        levels: Levels | None = None,
    ) -> None:
        self.window = window
        self.level_starts = None if levels is None else levels.starts(grammar.longest)
        self.decoder, self.grammar, self.do_sample = decoder, grammar, do_sample
        self.pad_token_id, self.stop_ids = pad_token_id, stop_ids
        self.warpers = [processor for processor in processors if isinstance(processor, WARPERS)]
        self.guidance = next((p for p in processors if isinstance(p, ClassifierFreeGuidance)), None)
        self.doubled = self.guidance is not None  # the unconditional rows stand below, until none is needed any more
        self.suppressed = [
            token
            for processor in processors
            if isinstance(processor, SuppressTokensLogitsProcessor)
            for token in processor.suppress_tokens.tolist()
        ]
        self.choices: dict[int, Choices] = {}
        self.passes = 0

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

        Raises:
            ValueError: a picture by levels that begins inside a level or has no known length, or rows that are at
                different places of one.
        """
        batch, length = input_ids.shape
        sequences = torch.nn.functional.pad(input_ids, (0, max_length - length), value=self.pad_token_id)
        rows, finished = input_ids.tolist(), [False] * batch
        scores: list[torch.Tensor] = []
        capacity = min(max_length, length + self.grammar.longest)
        hidden = self._read(prompt, attention_mask, unconditional, capacity)
        while True:
            plans = [None if done else self._plan(row) for row, done in zip(rows, finished, strict=True)]
            known = min(len(plan) for plan in plans if plan)
            steps = min(known, max_length - length)
            guided = max(self._guided(row) for row, done in zip(rows, finished, strict=True) if not done)
            places = {self._place(row) for row, done in zip(rows, finished, strict=True) if not done}
            if places != {None}:
                alive = torch.tensor([not done for done in finished], device=hidden.device)
                plan, kept = self._one_plan(plans, places), scores if keep_scores else None
                run = self._by_levels(plan, places.pop(), steps, alive, guided, kept)
            elif self.window > 1 and not keep_scores and all(plan == plans[0] for plan in plans):
                assert plans[0] is not None
                run = self._ahead(hidden[:, -1], plans[0][:steps], guided)
            else:
                cut = [plan and plan[:steps] for plan in plans]
                run = self._one_by_one(hidden[:, -1], cut, guided, scores, keep_scores)
            for step, ids in enumerate(run):
                sequences[:, length + step] = ids
                if streamer is not None:
                    streamer.put(ids.cpu())
            new = sequences[:, length : length + steps].tolist()
            length += steps
            for place, added in enumerate(new):
                rows[place] += added
                finished[place] = finished[place] or not self.stop_ids.isdisjoint(added)
            if all(finished) or length == max_length:
                break
            hidden = self._step(sequences[:, length - 1 : length], steps < guided)
        if streamer is not None:
            streamer.end()
        return Drawn(sequences[:, :length], tuple(scores) if keep_scores else None, self.passes)

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

    def _plan(self, row: Sequence[int]) -> list[Step]:
        """What is known of the places after a row's ids."""
        states = self.grammar.ahead(row)
        if self.guidance is None:
            return [Step(state, False) for state in states]
        inside = self.grammar.steps_within(row, self.guidance.interval)
        return [Step(state, step in inside) for step, state in enumerate(states)]

    def _guided(self, row: Sequence[int]) -> int:
        """After how many ids no guidance can act on a row any more; more than a picture has where that is open."""
        if self.guidance is None or self.grammar.vocabulary.eoi_token_id not in self.stop_ids:
            return self.grammar.longest
        return self.grammar.steps_within(row, self.guidance.interval).stop

    def _step(self, ids: torch.Tensor, guided: bool) -> torch.Tensor:
        """Hidden states after ids `[B, W]`, the unconditional rows below as long as places to come are guided."""
        if self.doubled and not guided:
            self.decoder.keep(len(ids))
            self.doubled = False
        self.passes += 1
        return self.decoder.step(ids.repeat(2, 1) if self.doubled else ids)

    def _one_by_one(
        self,
        hidden: torch.Tensor,
        plans: Sequence[Sequence[Step] | None],
        guided: int,
        scores: list[torch.Tensor],
        keep_scores: bool,
    ) -> Iterator[torch.Tensor]:
        """Ids `[B]` in turn for every row's plan, of which so many steps may be guided; the last is not read yet."""
        steps = max(len(plan) for plan in plans if plan)
        for step in range(steps):
            ids, kept = self._choose(hidden, [plan[step] if plan else None for plan in plans], keep_scores)
            yield ids
            if kept is not None:
                scores.append(kept)
            if step < steps - 1:
                hidden = self._step(ids[:, None], step + 1 < guided)[:, -1]

    def _place(self, row: Sequence[int]) -> int | None:
        """Which code of a picture comes after a row's ids; None where none comes, or where none is drawn by levels."""
        return None if self.level_starts is None else self.grammar.place_after(row)

    def _one_plan(self, plans: Sequence[Sequence[Step] | None], places: set[int | None]) -> Sequence[Step]:
        """The plan of all rows that have not ended, whose pictures are at these places."""
        one, *others = [plan for plan in plans if plan]
        if len(places) > 1 or any(plan != one for plan in others):
            raise ValueError(
                f"Rows are at codes {places} of their pictures, or these differ in size; drawing by levels takes rows "
                "that do neither: give generation_mode='image' and a grid."
            )
        if one[-1].state != self.grammar.num_states - 1:
            raise ValueError("Drawing by levels needs to know how long a picture is; give num_codes.")
        return one

    def _by_levels(
        self,
        plan: Sequence[Step],
        place: int | None,
        steps: int,
        alive: torch.Tensor,
        guided: int,
        kept: list[torch.Tensor] | None,
    ) -> Iterator[torch.Tensor]:
        """The same a level at a time: the codes from `place` on, then `<eoi>`; rows that are not alive are padded.

        Scores `[B, V]` of every id go to `kept`.
        """
        starts, token, end = self.level_starts, self.grammar.vocabulary.image_token_id, len(plan) - 1
        assert starts is not None
        assert place is not None
        if starts[place] != place:
            raise ValueError(
                f"The picture goes on at code {place}, inside the level of {starts[place]}; begin where a level does."
            )
        codes = groupby(range(min(end, steps)), key=lambda step: starts[place + step])
        levels = [list(level) for _, level in codes] + [[end]] * (steps > end)
        unread = list[torch.Tensor]()  # [B, n], drawn and not in the cache
        for level in levels:
            first, size = level[0], len(level)
            if first < end:
                asked = torch.full((len(alive), size), token, device=alive.device)
                states = self._step(torch.cat([*unread, asked], dim=1), first < guided)[:, -size:]
                self.decoder.rewind(size)
            else:
                states = self._step(unread[0], first < guided)[:, -1:]
            noise = [self._noise(len(alive), self._legal(plan[step].state, alive.device)) for step in level]
            found = torch.stack(self._choose_together(states, [plan[step] for step in level], noise, kept), dim=1)
            unread = [found.masked_fill(~alive[:, None], self.pad_token_id)]
            yield from unread[0].unbind(dim=1)

    def _ahead(self, hidden: torch.Tensor, plan: Sequence[Step], guided: int) -> Iterator[torch.Tensor]:
        """The same by guesses, for rows that all have one plan."""
        batch, end = len(hidden) // (2 if self.doubled else 1), len(plan)
        slots, noise = self.grammar.vocabulary.num_codebooks, list[torch.Tensor | None]()
        guesses = list[torch.Tensor]()  # [B] each, what is drawn and then what is guessed
        drawn = 0
        states, at = hidden[:, None], 0  # hidden states of the places from `at` on
        while True:
            for coming in plan[len(noise) : at + states.shape[1]]:  # in order, as one at a time would take it
                noise.append(self._noise(batch, self._legal(coming.state, hidden.device)))
            found = self._choose_together(states, plan[at : at + states.shape[1]], noise[at:])
            right = 1  # the first follows from what is drawn, the next where its guess was right
            for place in range(at, at + len(found) - 1):
                if place >= len(guesses) or not guesses[place].equal(found[place - at]):
                    break
                right += 1
            guesses[at:] = found
            yield from found[:right]
            drawn = at + right
            if drawn == end:
                return
            self.decoder.rewind(states.shape[1] - right)
            width = min(self.window, end - drawn)
            while len(guesses) < drawn + width - 1:  # the code to the left stands for one not guessed yet
                state = plan[len(guesses)].state
                left = len(guesses) - slots
                same = left >= 0 and plan[left].state == state
                first = self._legal(state, hidden.device).ids(torch.zeros_like(guesses[-1]))
                guesses.append(guesses[left] if same else first)
            read = torch.stack(guesses[drawn - 1 : drawn + width - 1], dim=1)
            states, at = self._step(read, drawn < guided), drawn

    def _choose_together(
        self,
        hidden: torch.Tensor,
        plan: Sequence[Step],
        noise: Sequence[torch.Tensor | None],
        kept: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Ids `[B]` of every place, for hidden states `[R, W, D]` and the places' steps and noise; `kept` is given the
        scores `[B, V]`.
        """
        found, spread = ([torch.empty(0)] * len(plan) for _ in range(2))
        for step in set(plan):
            places = [place for place, other in enumerate(plan) if other == step]
            choices = self._legal(step.state, hidden.device)
            picked = hidden[:, places]  # [R, n, D]
            scores = self._scores(picked.flatten(0, 1), None, step.guided, choices, repeats=len(places))
            noises = [noise[place] for place in places]
            drawn = self._draw(scores, _stacked(noises)).view(-1, len(places))
            for column, place in enumerate(places):
                found[place] = choices.ids(drawn[:, column])
                if kept is not None:
                    spread[place] = self._spread(scores.unflatten(0, (-1, len(places)))[:, column], choices)
        if kept is not None:
            kept += spread
        return found

    def _choose(
        self, hidden: torch.Tensor, steps: Sequence[Step | None], keep_scores: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Next ids `[B]` of rows at these steps, None for rows that ended, and their scores `[B, V]` if wanted."""
        batch = len(steps)
        ids = torch.full((batch,), self.pad_token_id, device=hidden.device)
        kept = None
        if keep_scores:
            kept = hidden.new_full((batch, self.grammar.vocabulary.size), -float("inf"), dtype=torch.float32)
        for step in {step for step in steps if step is not None}:
            members = [place for place, other in enumerate(steps) if other == step]
            at = None if len(members) == batch else torch.tensor(members, device=hidden.device)
            choices = self._legal(step.state, hidden.device)
            scores = self._scores(hidden, at, step.guided, choices)
            chosen = choices.ids(self._draw(scores, self._noise(len(scores), choices)))
            if at is None:
                ids = chosen
            else:
                ids[at] = chosen
            if kept is not None:
                kept[slice(None) if at is None else at] = self._spread(scores, choices)
        return ids, kept

    def _spread(self, scores: torch.Tensor, choices: Choices) -> torch.Tensor:
        """Scores `[M, S]` of choices as `[M, V]` of all ids."""
        spread = scores.new_full((len(scores), self.grammar.vocabulary.size), -float("inf"))
        spread[:, choices.ids(torch.arange(scores.shape[1], device=scores.device))] = scores
        return spread

    def _legal(self, state: int, device: torch.device) -> Choices:
        if state not in self.choices:
            legal = self.grammar.table[state].clone()
            legal[self.suppressed] = False
            self.choices[state] = Choices.among(legal, device)
        return self.choices[state]

    def _scores(
        self, hidden: torch.Tensor, at: torch.Tensor | None, guided: bool, choices: Choices, *, repeats: int = 1
    ) -> torch.Tensor:
        """Guided, warped scores `[B, S]` of the rows at `at`; every row of the batch stands `repeats` times."""
        conditional, unconditional = hidden.chunk(2) if self.doubled else (hidden, None)
        if at is not None:
            conditional = conditional[at]
            unconditional = None if unconditional is None else unconditional[at]
        if unconditional is None or not guided:
            scores = self.decoder.logits(conditional, choices.rows).float()
        else:
            assert self.guidance is not None
            scale = self.guidance.scale
            if isinstance(scale, torch.Tensor):
                scale = scale.repeat_interleave(repeats, dim=0) if at is None else scale[at]
            wanted, away = self.decoder.logits(torch.cat([conditional, unconditional]), choices.rows).float().chunk(2)
            scores = away + scale * (wanted - away)
        if choices.forbidden is not None:
            scores = scores.masked_fill(choices.forbidden, -float("inf"))
        for warper in self.warpers:
            scores = _keep_largest(scores, warper) if type(warper) is TopKLogitsWarper else warper(None, scores)
        return scores

    def _noise(self, rows: int, choices: Choices) -> torch.Tensor | None:
        """What decides among the choices, `[rows, S]`; None where nothing is left to chance."""
        places = choices.rows.stop - choices.rows.start if isinstance(choices.rows, slice) else len(choices.rows)
        if not self.do_sample or places == 1:
            return None
        # Uniform numbers of 53 bits, rounded to float32, have fine steps near 0, where the likeliest is decided.
        # `exponential_` gives the same distribution, in two and a half times the time on a CPU.
        uniform = torch.rand(rows, places, dtype=torch.float64, device=choices.device).float()
        return uniform.neg_().log1p_().neg_().clamp_min_(SMALLEST_NOISE).log_().neg_()

    def _draw(self, scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Places `[B]`: the likeliest, or one sampled by the Gumbel trick, which needs neither softmax nor sums."""
        return (scores if noise is None else scores + noise).argmax(dim=1)


def _keep_largest(scores: torch.Tensor, warper: TopKLogitsWarper) -> torch.Tensor:
    """What the warper does to scores `[B, S]`, without putting the largest in order."""
    largest = scores.topk(min(warper.top_k, scores.shape[1]), sorted=False).values
    return torch.where(scores < largest.amin(dim=1, keepdim=True), warper.filter_value, scores)


def _stacked(noise: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Noise `[B, S]` of n places as `[B n, S]`."""
    present = [single for single in noise if single is not None]
    return torch.stack(present, dim=1).flatten(0, 1) if present else None


def pad_left(rows: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """`[B, T]` to `[B, length]`."""
    return torch.nn.functional.pad(rows, (length - rows.shape[1], 0), value=value)
