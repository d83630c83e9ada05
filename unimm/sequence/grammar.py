"""The grammar of a picture: `<boi>` [size] codes `<eoi>`, as one small state machine.

States are rows of a table of legal next ids. The state at a position follows from the ids before it alone, so one
machine serves generation, the scoring of sampled answers, and packed rows.

    0                 text: any text id or `<boi>`
    1 .. P            after `<boi>`: the ids that may spell a size, one state per node of their prefix tree
    P + 1 .. P + K    a code of slot 0, 1, .. K - 1; the slots of a position follow each other
    P + K + 1         a code of slot 0, or `<eoi>`
    P + K + 2         `<eoi>` only
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch

from unimm.codes import VisualCodes
from unimm.sequence.vocabulary import VisualVocabulary


@dataclass(frozen=True)
class SpanShape:
    """One legal picture.

    Args:
        grid: (rows, columns), or None for a 1-D code.
        prefix: text or special ids that spell the size after `<boi>`; empty where the codec makes one size only.
        min_positions, max_positions: legal numbers of positions, of K codes each.
    """

    grid: tuple[int, int] | None
    prefix: tuple[int, ...]
    min_positions: int
    max_positions: int


@dataclass(frozen=True)
class TextSpan:
    """Ids of text, structural ids of the chat included."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSpan:
    """A picture.

    Args:
        codes: the K codes of every whole position, without offset; None for a placeholder in a prompt.
        grid: (rows, columns), or None.
        complete: False where the sequence ended before `<eoi>`.
    """

    codes: tuple[tuple[int | None, ...], ...]
    grid: tuple[int, int] | None
    complete: bool


class SpanGrammar:
    """Builds, reads and constrains picture spans.

    Raises:
        ValueError: no shape, or size prefixes of which one begins another.
    """

    def __init__(self, vocabulary: VisualVocabulary, shapes: tuple[SpanShape, ...]) -> None:
        prefixes = [shape.prefix for shape in shapes]
        ambiguous = any(a is not b and b[: len(a)] == a for a in prefixes for b in prefixes)
        if not shapes or ambiguous:
            raise ValueError(f"Size prefixes are {prefixes}; there must be some and none may begin another.")
        self.vocabulary = vocabulary
        self.shapes = shapes
        nodes = {prefix[:depth] for prefix in prefixes for depth in range(len(prefix))}
        self._nodes = {node: 1 + index for index, node in enumerate(sorted(nodes, key=lambda node: (len(node), node)))}
        self._by_prefix = {shape.prefix: shape for shape in shapes}

    @property
    def num_states(self) -> int:
        return 1 + len(self._nodes) + self.vocabulary.num_codebooks + 2

    @property
    def longest(self) -> int:
        """Ids of the longest picture, its opening and end included."""
        return max(len(s.prefix) + s.max_positions * self.vocabulary.num_codebooks + 2 for s in self.shapes)

    @property
    def _slot_state(self) -> int:
        """The state before a code of slot 0; those of the other slots follow."""
        return 1 + len(self._nodes)

    @cached_property
    def table(self) -> torch.Tensor:
        """Legal next ids of every state, bool `[num_states, vocabulary.size]`."""
        vocabulary, table = self.vocabulary, torch.zeros(self.num_states, self.vocabulary.size, dtype=torch.bool)
        table[0, : vocabulary.image_token_offset] = True
        table[0, vocabulary.boi_token_id] = True
        table[0, [vocabulary.eoi_token_id, vocabulary.image_token_id]] = False
        for prefix in self._by_prefix:
            for depth in range(len(prefix)):
                table[self._nodes[prefix[:depth]], prefix[depth]] = True
        for slot, block in enumerate(vocabulary.blocks):
            table[self._slot_state + slot, block] = True
        table[-2, vocabulary.blocks[0]] = True
        table[-2, vocabulary.eoi_token_id] = table[-1, vocabulary.eoi_token_id] = True
        return table

    def states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """State after every position, int64 `[B, T]` of ids `[B, T]`: row t says what may stand at t + 1.

        A sequence that breaks the grammar (a hand-written prompt) is read as far as it can be: in a span of unknown
        size any legal size is assumed, and ids after a full span leave `<eoi>` as the only way on.
        """
        opened, since = self._last_opening(input_ids)
        after = input_ids.new_full(input_ids.shape, self.num_states)  # filled below wherever a span is open
        for shape in self.shapes:
            matches = self._matches(input_ids, since, shape)
            seen = since - len(shape.prefix)
            slot, positions = seen % self.vocabulary.num_codebooks, seen // self.vocabulary.num_codebooks
            code_state = torch.where(positions >= shape.max_positions, self.num_states - 1, self.num_states - 2)
            code_state = torch.where(positions < shape.min_positions, self._slot_state, code_state)
            code_state = torch.where(slot > 0, self._slot_state + slot, code_state)
            after = torch.where(matches & (seen >= 0), code_state, after)
        for node, state in self._nodes.items():
            here = self._matches(input_ids, since, SpanShape(None, node, 0, 0)) & (since == len(node))
            after = torch.where(here, state, after)
        after = torch.where(after == self.num_states, self.num_states - 1, after)
        return torch.where(opened, after, 0)

    def ahead(self, ids: Sequence[int]) -> list[int]:
        """The state after `ids`, and those that follow whatever the ids to come are.

        Inside a picture of known size that is the rest of it; where the next id decides, it is one state.
        """
        vocabulary = self.vocabulary
        ends = (vocabulary.boi_token_id, vocabulary.eoi_token_id)
        since = next((back for back, token in enumerate(reversed(ids)) if token in ends), None)
        if since is None or ids[-1 - since] == vocabulary.eoi_token_id:
            return [0]
        after = tuple(ids[len(ids) - since :])
        shape = next((s for s in self.shapes if after[: len(s.prefix)] == s.prefix), None)
        if shape is None:
            return [self._nodes.get(after, self.num_states - 1)]
        states: list[int] = []
        for seen in count(len(after) - len(shape.prefix)):
            positions, slot = divmod(seen, vocabulary.num_codebooks)
            if not slot and positions >= shape.min_positions:
                return [*states, self.num_states - (1 if positions >= shape.max_positions else 2)]
            states.append(self._slot_state + slot)
        raise AssertionError("a picture has an end")

    def allowed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Legal next ids, bool `[B, V]`, after ids `[B, T]`."""
        return self.table.to(input_ids.device)[self.states(input_ids)[:, -1]]

    def in_span(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Whether a picture is open at the end, bool `[B]`."""
        return self.states(input_ids)[:, -1] != 0

    def build(self, codes: VisualCodes) -> list[int]:
        """Ids of the one picture in `codes`: `<boi>` size codes `<eoi>`.

        Raises:
            ValueError: not one picture, another K, a grid that no shape allows, or codes out of range.
        """
        if len(codes) != 1:
            raise ValueError(f"Codes are {tuple(codes.ids.shape)}; a span holds one picture.")
        kept = codes.ids[0, codes.mask[0]]  # [N, K]
        grid = None if codes.grid is None else codes.grid[0]
        body = self.vocabulary.to_token_ids(kept).flatten().tolist()
        for shape in self.shapes:
            if shape.grid == grid and shape.min_positions <= len(kept) <= shape.max_positions:
                return [self.vocabulary.boi_token_id, *shape.prefix, *body, self.vocabulary.eoi_token_id]
        legal = ", ".join(
            str(shape.grid or f"{shape.min_positions} to {shape.max_positions} positions") for shape in self.shapes[:8]
        )
        raise ValueError(f"A picture of grid {grid} with {len(kept)} positions is not legal here; legal are {legal}.")

    def parse(self, ids: list[int]) -> list[TextSpan | ImageSpan]:
        """Split ids into text and pictures, in order; empty text is left out."""
        spans: list[TextSpan | ImageSpan] = []
        text: list[int] = []
        position = 0
        while position < len(ids):
            if ids[position] != self.vocabulary.boi_token_id:
                text.append(ids[position])
                position += 1
                continue
            if text:
                spans.append(TextSpan(tuple(text)))
                text = []
            span, position = self._parse_picture(ids, position + 1)
            spans.append(span)
        return [*spans, TextSpan(tuple(text))] if text else spans

    def _parse_picture(self, ids: list[int], start: int) -> tuple[ImageSpan, int]:
        vocabulary = self.vocabulary
        shape = next((s for s in self.shapes if tuple(ids[start : start + len(s.prefix)]) == s.prefix), None)
        position = start + (len(shape.prefix) if shape else 0)
        flat: list[int | None] = []
        while position < len(ids):
            token, block = ids[position], vocabulary.blocks[len(flat) % vocabulary.num_codebooks]
            if token == vocabulary.image_token_id:
                flat.append(None)
            elif block.start <= token < block.stop:
                flat.append(token - block.start)
            else:
                break
            position += 1
        codes = tuple(zip(*[iter(flat)] * vocabulary.num_codebooks, strict=False))
        closed = position < len(ids) and ids[position] == vocabulary.eoi_token_id
        whole = len(codes) * vocabulary.num_codebooks == len(flat)
        legal = whole and shape is not None and shape.min_positions <= len(codes) <= shape.max_positions
        grid = shape.grid if shape is not None and legal else None
        return ImageSpan(codes, grid, closed and legal), position + closed

    def _last_opening(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether a span is open after each position, and how many ids follow its `<boi>`; both `[B, T]`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        opening = torch.where(input_ids == self.vocabulary.boi_token_id, positions, -1).cummax(dim=1).values
        closing = torch.where(input_ids == self.vocabulary.eoi_token_id, positions, -1).cummax(dim=1).values
        return opening > closing, positions - opening

    def _matches(self, input_ids: torch.Tensor, since: torch.Tensor, shape: SpanShape) -> torch.Tensor:
        """Where the ids after the last `<boi>` begin with the shape's prefix, bool `[B, T]`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        found = since >= len(shape.prefix)
        for depth, token in enumerate(shape.prefix):
            place = (positions - since + 1 + depth).clamp(0, input_ids.shape[1] - 1)
            found = found & (input_ids.gather(1, place) == token)
        return found
