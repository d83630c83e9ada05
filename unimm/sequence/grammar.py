"""The grammar of a picture: `<boi>` [size] codes `<eoi>`, as one small state machine.

States are rows of a table of legal next ids. The state at a position follows from the ids before it alone, so one
machine serves generation, the scoring of sampled answers, and packed rows.

    0                 text: any text id or `<boi>`
    1 .. P            after `<boi>`: ids that may go on spelling a size, one state for each set of them
    P + 1 .. P + K    a code of slot 0, 1, .. K - 1; the slots of a position follow each other
    P + K + 1         a code of slot 0, or `<eoi>`
    P + K + 2         `<eoi>` only
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import torch

from unimm.codes import VisualCodes
from unimm.sequence.shapes import SpanShape
from unimm.sequence.vocabulary import VisualVocabulary


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


@dataclass(frozen=True)
class _Tree:
    """Prefixes as a prefix tree.

    Args:
        depth: ids of the longest.
        ids: every id in them, sorted `[A]`.
        next: node after each node and id, `[nodes, A + 1]`; the last column is for all other ids.
        nodes: for each node `[nodes]`, ids of the prefix, shortest and longest number of positions, and the state in
            which the prefix waits to be gone on with; 0 where it is whole.
    """

    depth: int
    ids: torch.Tensor
    next: torch.Tensor
    nodes: tuple[torch.Tensor, ...]


class SpanGrammar:
    """Builds, reads and constrains picture spans.

    Raises:
        ValueError: no shape, or size prefixes of which one begins another.
    """

    def __init__(self, vocabulary: VisualVocabulary, shapes: tuple[SpanShape, ...]) -> None:
        self.vocabulary = vocabulary
        self.shapes = shapes
        # The prefix tree: children of each node by id, and the shape whose prefix ends there.
        self._children: list[dict[int, int]] = [{}]
        self._ends: dict[int, SpanShape] = {}
        for shape in shapes:
            self._plant(shape)
        if not shapes or any(self._children[node] for node in self._ends):
            raise ValueError(f"Size prefixes are {self._shown()}; there must be some and none may begin another.")
        open_nodes = [node for node in range(len(self._children)) if node not in self._ends]
        self._continuations = list(dict.fromkeys(frozenset(self._children[node]) for node in open_nodes))

    def _plant(self, shape: SpanShape) -> None:
        node = 0
        for token in shape.prefix:
            if token not in self._children[node]:
                self._children[node][token] = len(self._children)
                self._children.append({})
            node = self._children[node][token]
        if node in self._ends:
            raise ValueError(f"Size prefixes are {self._shown()}; {shape.prefix} spells two pictures.")
        self._ends[node] = shape

    def _shown(self) -> str:
        prefixes = [shape.prefix for shape in self.shapes]
        return f"{prefixes[:8]}" + (f" and {len(prefixes) - 8} more" if len(prefixes) > 8 else "")

    @property
    def num_states(self) -> int:
        return 1 + len(self._continuations) + self.vocabulary.num_codebooks + 2

    @property
    def longest(self) -> int:
        """Ids of the longest picture, its opening and end included."""
        return max(len(s.prefix) + s.max_positions * self.vocabulary.num_codebooks + 2 for s in self.shapes)

    @property
    def _slot_state(self) -> int:
        """The state before a code of slot 0; those of the other slots follow."""
        return 1 + len(self._continuations)

    @cached_property
    def table(self) -> torch.Tensor:
        """Legal next ids of every state, bool `[num_states, vocabulary.size]`."""
        vocabulary, table = self.vocabulary, torch.zeros(self.num_states, self.vocabulary.size, dtype=torch.bool)
        table[0, : vocabulary.image_token_offset] = True
        table[0, vocabulary.boi_token_id] = True
        table[0, [vocabulary.eoi_token_id, vocabulary.image_token_id]] = False
        for state, legal in enumerate(self._continuations, start=1):
            table[state, list(legal)] = True
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
        opened, since, node = self._read(input_ids)
        spelled, shortest, longest, waiting = (values.to(input_ids.device)[node] for values in self._tree.nodes)
        slot = (since - spelled) % self.vocabulary.num_codebooks
        seen = (since - spelled) // self.vocabulary.num_codebooks
        code_state = torch.where(seen >= longest, self.num_states - 1, self.num_states - 2)
        code_state = torch.where(seen < shortest, self._slot_state, code_state)
        code_state = torch.where(slot > 0, self._slot_state + slot, code_state)
        return torch.where(opened, torch.where(waiting > 0, waiting, code_state), 0)

    def places(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Which code of its picture stands at every position, counted from 0 over all slots, int64 `[B, T]` of ids
        `[B, T]`; -1 where there is no code.
        """
        opened, since, node = self._read(input_ids)
        spelled, _, longest, waiting = (values.to(input_ids.device)[node] for values in self._tree.nodes)
        place = since - spelled - 1
        is_code = opened & (waiting == 0) & (place >= 0) & (place < longest * self.vocabulary.num_codebooks)
        return torch.where(is_code, place, -1)

    def within(self, input_ids: torch.Tensor, share: tuple[float, float]) -> torch.Tensor:
        """Whether what follows every position lies in a share of the codes of an open picture, bool `[B, T]`.

        Args:
            input_ids: int64 `[B, T]`.
            share: (start, end) in [0, 1], rounded to whole codes of the longest picture of its size. Ids that spell
                the size stand before all codes and count where the share begins at 0; `<eoi>` stands after them.
        """
        opened, since, node = self._read(input_ids)
        spelled, _, longest, waiting = self._tree.nodes
        codes = (longest * self.vocabulary.num_codebooks).double()
        first, end = ((codes * bound).round().long() + spelled for bound in share)
        first = torch.where(waiting > 0, self.longest if share[0] else 0, first).to(input_ids.device)[node]
        end = torch.where(waiting > 0, self.longest, end).to(input_ids.device)[node]
        return opened & (since >= first) & (since < end)

    def steps_within(self, ids: Sequence[int], share: tuple[float, float]) -> range:
        """Which of the ids after `ids` lie in a share of the codes of an open picture, counted from the next one on.

        What `within` will say of them, as far as it is known: where no size is known yet, the end is further off than
        any picture is long.
        """
        if (after := self._after_opening(ids)) is None:
            return range(self.longest, self.longest)
        if (shape := self.shape_after(after)) is None:
            return range(self.longest if share[0] else 0, self.longest)
        first, end = (
            round(shape.max_positions * self.vocabulary.num_codebooks * bound) + len(shape.prefix) - len(after)
            for bound in share
        )
        return range(max(first, 0), max(end, 0))

    def _read(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whether a span is open after each position, how many ids follow its `<boi>`, and their node of the prefix
        tree, all `[B, T]`.
        """
        opened, since = self._last_opening(input_ids)
        tree, device = self._tree, input_ids.device
        node, positions = torch.zeros_like(since), torch.arange(input_ids.shape[1], device=device).expand_as(since)
        for depth in range(tree.depth):
            token = input_ids.gather(1, (positions - since + 1 + depth).clamp(0, input_ids.shape[1] - 1))
            column = torch.searchsorted(tree.ids.to(device), token).clamp_max(len(tree.ids) - 1)
            column = torch.where(tree.ids.to(device)[column] == token, column, len(tree.ids))
            node = torch.where(since > depth, tree.next.to(device)[node, column], node)
        return opened, since, node

    @cached_property
    def _tree(self) -> _Tree:
        """The prefix tree as tensors; its last node is where no prefix leads."""
        ids = sorted({token for children in self._children for token in children}) or [0]
        places, lost = {token: place for place, token in enumerate(ids)}, len(self._children)
        follow = torch.full((lost + 1, len(ids) + 1), lost)
        nodes = torch.zeros(4, lost + 1, dtype=torch.int64)
        nodes[3, lost] = self.num_states - 1
        states = {legal: state for state, legal in enumerate(self._continuations, start=1)}
        for node, children in enumerate(self._children):
            if (shape := self._ends.get(node)) is not None:
                follow[node] = node
                nodes[:3, node] = torch.tensor([len(shape.prefix), shape.min_positions, shape.max_positions])
            else:
                nodes[3, node] = states[frozenset(children)]
                for token, child in children.items():
                    follow[node, places[token]] = child
        depth = max(len(shape.prefix) for shape in self.shapes)
        return _Tree(depth, torch.tensor(ids), follow, tuple(nodes.unbind()))

    def shape_after(self, ids: Sequence[int]) -> SpanShape | None:
        """The shape whose prefix the ids after a `<boi>` begin with, once it is whole."""
        node = self._node_after(ids)
        return None if node is None else self._ends.get(node)

    def _node_after(self, ids: Sequence[int]) -> int | None:
        """Where the ids after a `<boi>` lead in the prefix tree; None where no prefix goes on with them."""
        node = 0
        for token in ids:
            if node in self._ends:
                break
            if token not in self._children[node]:
                return None
            node = self._children[node][token]
        return node

    def shape_of(self, grid: tuple[int, int] | None) -> SpanShape:
        """The shape of pictures of a grid, or of 1-D codes.

        Raises:
            ValueError: there is none.
        """
        for shape in self.shapes:
            if shape.grid == grid:
                return shape
        raise ValueError(f"A picture of grid {grid} is not legal here; legal are {self._shown_shapes()}.")

    def _shown_shapes(self) -> str:
        legal = [str(s.grid or f"{s.min_positions} to {s.max_positions} positions") for s in self.shapes]
        return ", ".join(legal[:8]) + (f" and {len(legal) - 8} more" if len(legal) > 8 else "")

    def of_length(self, num_positions: int) -> SpanGrammar:
        """The grammar of those pictures only that have so many positions; longer ones end there.

        Raises:
            ValueError: no legal picture has.
        """
        shapes = tuple(
            replace(shape, min_positions=num_positions, max_positions=num_positions)
            for shape in self.shapes
            if shape.min_positions <= num_positions <= shape.max_positions
        )
        if not shapes:
            lengths = sorted({(shape.min_positions, shape.max_positions) for shape in self.shapes})
            legal = [str(low) if low == high else f"{low} to {high}" for low, high in lengths]
            shown = ", ".join(legal[:8]) + (", ..." if len(legal) > 8 else "")
            raise ValueError(
                f"There is no picture of {num_positions} positions here: pictures have {shown}. Fewer are for codecs "
                "whose first codes alone stand for the picture."
            )
        return SpanGrammar(self.vocabulary, shapes)

    def ahead(self, ids: Sequence[int]) -> list[int]:
        """The state after `ids`, and those that follow whatever the ids to come are.

        Inside a picture of known size that is the rest of it; where the next id decides, it is one state.
        """
        return list(self.coming(ids))

    def coming(self, ids: Sequence[int]) -> Iterator[int]:
        """The states of `ahead`, one after the other."""
        if (after := self._after_opening(ids)) is None:
            yield 0
            return
        if (node := self._node_after(after)) is None:
            yield self.num_states - 1
            return
        if (shape := self._ends.get(node)) is None:
            yield 1 + self._continuations.index(frozenset(self._children[node]))
            return
        for seen in count(len(after) - len(shape.prefix)):
            positions, slot = divmod(seen, self.vocabulary.num_codebooks)
            if not slot and positions >= shape.min_positions:
                yield self.num_states - (1 if positions >= shape.max_positions else 2)
                return
            yield self._slot_state + slot

    def place_after(self, ids: Sequence[int]) -> int | None:
        """Which code of its picture comes after `ids`, as `places` counts them; None where no code can come, or where
        the size of the picture is not known yet.
        """
        after = self._after_opening(ids)
        shape = None if after is None else self.shape_after(after)
        if after is None or shape is None:
            return None
        place = len(after) - len(shape.prefix)
        return place if place < shape.max_positions * self.vocabulary.num_codebooks else None

    def _after_opening(self, ids: Sequence[int]) -> Sequence[int] | None:
        """The ids after the `<boi>` of an open picture; None where none is open."""
        ends = (self.vocabulary.boi_token_id, self.vocabulary.eoi_token_id)
        since = next((back for back, token in enumerate(reversed(ids)) if token in ends), None)
        if since is None or ids[-1 - since] == self.vocabulary.eoi_token_id:
            return None
        return ids[len(ids) - since :]

    def allowed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Legal next ids, bool `[B, V]`, after ids `[B, T]`."""
        return self.table.to(input_ids.device)[self.states(input_ids)[:, -1]]

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
        raise ValueError(
            f"A picture of grid {grid} with {len(kept)} positions is not legal here; legal are {self._shown_shapes()}."
        )

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
        shape = self.shape_after(ids[start : start + self._tree.depth])
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
