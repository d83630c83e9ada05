"""Watch an answer grow: text as it is written, pictures row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from unimm.sequence import ImageSpan, SpanGrammar


@dataclass(frozen=True)
class TextPiece:
    """New text."""

    text: str


@dataclass(frozen=True)
class PictureRows:
    """A picture so far.

    Args:
        codes: the K codes of every position that is known, without offset, in raster order.
        rows: whole rows among them.
        grid: (rows, columns) of the whole picture.
    """

    codes: tuple[tuple[int | None, ...], ...]
    rows: int
    grid: tuple[int, int]


class AnswerStreamer(BaseStreamer):
    """A streamer for `generate` with one sample; it hands events to `receive`, one per piece of text or row of codes.

    Args:
        grammar: of the model.
        tokenizer: of the processor.
        receive: called with every `TextPiece` and `PictureRows`.

    Raises:
        ValueError: a batch of more than one sample.
    """

    def __init__(
        self,
        grammar: SpanGrammar,
        tokenizer: PreTrainedTokenizerBase,
        receive: Callable[[TextPiece | PictureRows], None],
    ) -> None:
        self.grammar, self.tokenizer, self.receive = grammar, tokenizer, receive
        self.prompt_seen = False
        self.text: list[int] = []
        self.written = ""
        self.span: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then one id at a time."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(f"{len(value)} samples arrive at once; stream one sample at a time.")
        ids = value.flatten().tolist()
        if not self.prompt_seen:
            self.prompt_seen = True
            self.span = self._open_span(ids)
            return
        for token in ids:
            self._take(token)

    def end(self) -> None:
        """Hand over text that was held back."""
        self._write(final=True)

    def _take(self, token: int) -> None:
        vocabulary = self.grammar.vocabulary
        if self.span is not None:
            self.span.append(token)
            if token == vocabulary.eoi_token_id:
                self.span = None
            else:
                self._show(self.span)
        elif token == vocabulary.boi_token_id:
            self._write(final=True)
            self.span = [token]
        else:
            self.text.append(token)
            self._write(final=False)

    def _open_span(self, prompt: list[int]) -> list[int] | None:
        """The picture that a prompt opens and does not close."""
        vocabulary = self.grammar.vocabulary
        for place in range(len(prompt) - 1, -1, -1):
            if prompt[place] == vocabulary.eoi_token_id:
                return None
            if prompt[place] == vocabulary.boi_token_id:
                return prompt[place:]
        return None

    def _show(self, span: Sequence[int]) -> None:
        shape = self.grammar.shape_after(span[1:])
        if shape is None or shape.grid is None:
            return
        codes = span[1 + len(shape.prefix) :]
        rows, rest = divmod(len(codes), shape.grid[1] * self.grammar.vocabulary.num_codebooks)
        if codes and not rest:
            (picture,) = self.grammar.parse(list(span))
            assert isinstance(picture, ImageSpan)
            self.receive(PictureRows(picture.codes, rows, shape.grid))

    def _write(self, *, final: bool) -> None:
        decoded = self.tokenizer.decode(self.text, skip_special_tokens=True)
        # A character of several bytes decodes to a replacement mark until its last byte is there.
        if decoded.endswith("\ufffd") and not final:
            return
        if len(decoded) > len(self.written):
            self.receive(TextPiece(decoded[len(self.written) :]))
        self.written = decoded
        if final:
            self.text, self.written = [], ""
