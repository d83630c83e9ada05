"""Messages to ids and pixels, and generated ids back to text and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from unimm.codes import VisualCodes
from unimm.sequence.grammar import ImageSpan, SpanGrammar
from unimm.sequence.shapes import SpanShape, read_shapes, shape_fields
from unimm.sequence.vocabulary import VisualVocabulary

OWN_CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
ESCAPE = "\u200b"  # zero-width space: breaks the spelling of a special token, not the look of the text
IGNORED_LABEL = -100
PARTS = ("text", "image", "image_url")

Message = dict[str, Any]


@dataclass(frozen=True)
class TextPart:
    """A piece of an answer that is text."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A piece of an answer that is a picture; `complete` is False where generation stopped inside it."""

    codes: VisualCodes
    complete: bool


@dataclass(frozen=True)
class EncodedMessages:
    """A training row: ids, and labels that are -100 where nothing is learned."""

    input_ids: list[int]
    labels: list[int]


def size_text(grid: Sequence[int]) -> str:
    """How a picture's size is spelled after `<boi>`; the colon ends the number."""
    return f"{grid[0]}*{grid[1]}:"


class UniMMProcessor(ProcessorMixin):
    """Owns a text tokenizer and an image processor; the visual tokenizer is a model and stays outside.

    Args:
        image_processor: of the codec.
        tokenizer: with `boi_token`, `eoi_token` and `image_token`; see `from_tokenizer`.
        grids: legal (rows, columns) of pictures; with one, spans spell no size.
        codebook_sizes: of the codec's slots; a position of a picture takes one id per slot.
        text_rows: rows of the language model that belong to text.
        downsample: pixels per grid cell.
        chat_template: Jinja; None takes the tokenizer's, or ours.
        num_special_rows: rows right after the codes for structural ids, of a published model that has them there.
        span_shapes, spelled_sizes: the legal pictures as in `UniMMConfig`, where `grids` does not say it all.
        num_placeholders: positions that a picture takes in a prompt, where their number is not that of its cells.
        frames_pictures: whether a picture in a prompt stands between `<boi>`, size and `<eoi>`; where it does not, the
            chat template writes what is around it.
        draws_from_bare_prompts: whether a request to draw is the prompt itself, without the chat template.
    """

    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "pixel_values"]  # may be a list of many shapes

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        grids: Sequence[Sequence[int]] = ((8, 8),),
        codebook_sizes: Sequence[int] = (4096,),
        text_rows: int | None = None,
        downsample: int = 16,
        chat_template: str | None = None,
        num_special_rows: int = 0,
        span_shapes: list[dict[str, Any]] | None = None,
        spelled_sizes: dict[str, Any] | None = None,
        num_placeholders: int | None = None,
        frames_pictures: bool = True,
        draws_from_bare_prompts: bool = False,
    ) -> None:
        self.grids = [list(grid) for grid in grids]
        self.codebook_sizes = list(codebook_sizes)
        self.text_rows = text_rows or len(tokenizer)
        self.downsample = downsample
        self.num_special_rows = num_special_rows
        self.span_shapes, self.spelled_sizes = span_shapes, spelled_sizes
        self.num_placeholders = num_placeholders
        self.frames_pictures = frames_pictures
        self.draws_from_bare_prompts = draws_from_bare_prompts
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        template = chat_template or tokenizer.chat_template or OWN_CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=template)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        *,
        grids: Sequence[Sequence[int]],
        codebook_sizes: Sequence[int],
        downsample: int,
        text_rows: int | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> UniMMProcessor:
        """A processor over any text tokenizer; the three structural tokens are added where they are missing.

        Args:
            lengths: fewest and most codes of a picture, where its codes lie on no grid.

        Raises:
            ValueError: the structural tokens do not fit into `text_rows`.
        """
        named = {"boi_token": "<|boi|>", "eoi_token": "<|eoi|>", "image_token": "<|image|>"}
        missing = {name: token for name, token in named.items() if name not in tokenizer.special_tokens_map}
        if missing:
            tokenizer.add_special_tokens({**missing}, replace_extra_special_tokens=False)
        if text_rows is not None and len(tokenizer) > text_rows:
            raise ValueError(
                f"The text vocabulary has {len(tokenizer)} tokens with the structural ones, the model has {text_rows} "
                "text rows; pass text_rows of at least that many."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        if lengths is None:
            return cls(image_processor, tokenizer, grids, codebook_sizes, text_rows, downsample)
        shapes = [shape_fields(SpanShape(None, (), *lengths))]
        return cls(
            image_processor,
            tokenizer,
            grids,
            codebook_sizes,
            text_rows,
            downsample,
            span_shapes=shapes,
            num_placeholders=lengths[1],
        )

    @property
    def shapes(self) -> tuple[SpanShape, ...]:
        """The legal pictures."""
        if self.span_shapes is not None:
            return read_shapes(self.span_shapes, self.spelled_sizes)
        spelled = len(self.grids) > 1
        prefixes = [self._text_ids(size_text(grid)) if spelled else [] for grid in self.grids]
        return tuple(
            SpanShape((rows, columns), tuple(prefix), rows * columns, rows * columns)
            for (rows, columns), prefix in zip(self.grids, prefixes, strict=True)
        )

    @property
    def vocabulary(self) -> VisualVocabulary:
        tokenizer = self.tokenizer
        return VisualVocabulary(
            image_token_offset=self.text_rows,
            codebook_sizes=tuple(self.codebook_sizes),
            boi_token_id=tokenizer.boi_token_id,
            eoi_token_id=tokenizer.eoi_token_id,
            image_token_id=tokenizer.image_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_special_rows=self.num_special_rows,
        )

    @property
    def grammar(self) -> SpanGrammar:
        return SpanGrammar(self.vocabulary, self.shapes)

    def escape(self, text: str) -> str:
        """Text in which nothing spells a special token."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, token[0] + ESCAPE + token[1:])
        return text

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers, with the text of every message escaped first.

        Raises:
            ValueError: no message, one without role and content or of parts that are neither text nor pictures, or a
                prompt longer than the model takes, when it is tokenized here.
        """
        batched = bool(conversation) and isinstance(conversation[0], list)
        conversations = conversation if batched else [conversation]
        if not conversation or not all(conversations):
            raise ValueError(
                'There is no message; give at least one, for example {"role": "user", "content": "hello"}.'
            )
        escaped = [[self._escape_message(message) for message in messages] for messages in conversations]
        encoded = super().apply_chat_template(escaped if batched else escaped[0], chat_template, **kwargs)
        if isinstance(encoded, BatchFeature):
            longest = max(len(row) for row in encoded["input_ids"])
            self._check_length(longest)
        return encoded

    def drawing_inputs(self, prompts: Sequence[str]) -> BatchFeature:
        """Ids of requests to draw, `[B, T]`, padded on the left; the picture's opening is up to `generate`.

        Raises:
            ValueError: a prompt longer than the model takes.
        """
        if self.draws_from_bare_prompts:
            encoded = self(text=[self.escape(prompt) for prompt in prompts], return_tensors="pt", padding=True)
            self._check_length(encoded["input_ids"].shape[1])
            return encoded
        return self.chat_inputs([[{"role": "user", "content": prompt}] for prompt in prompts])

    def chat_inputs(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> BatchFeature:
        """Ids of conversations whose next turn is the assistant's, `[B, T]`, padded on the left, and their pictures.

        Raises:
            ValueError: a conversation longer than the model takes.
        """
        return self.apply_chat_template(
            [list(messages) for messages in conversations],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that one picture becomes in a prompt: `<boi>` size placeholders `<eoi>`."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        grid = (height // self.downsample, width // self.downsample)
        positions = self.num_placeholders or grid[0] * grid[1]
        placeholders = self.image_token * (positions * len(self.codebook_sizes))
        if not self.frames_pictures:
            return placeholders
        size = "" if self.num_placeholders else self.size_text(grid)
        return f"{self.tokenizer.boi_token}{size}{placeholders}{self.tokenizer.eoi_token}"

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of a picture of so many pixels.

        Raises:
            ValueError: sides that are no whole cells.
        """
        if height % self.downsample or width % self.downsample:
            raise ValueError(
                f"size is {height} x {width}; both must be multiples of {self.downsample}, a cell's pixels."
            )
        return height // self.downsample, width // self.downsample

    def size_text(self, grid: tuple[int, int]) -> str:
        """What spells the size of a picture after `<boi>`.

        Raises:
            ValueError: no legal picture has this grid.
        """
        if self.span_shapes is not None:
            return self.tokenizer.decode(list(self.grammar.shape_of(grid).prefix))
        return size_text(grid) if len(self.grids) > 1 else ""

    def encode_messages(
        self, messages: list[Message], images: Sequence[VisualCodes], *, answers_only: bool
    ) -> EncodedMessages:
        """A training row of pre-tokenised pictures.

        Args:
            messages: chat messages whose image parts stand for `images`, in order.
            images: one picture each.
            answers_only: learn the assistant's turns only, their end tokens included.

        Raises:
            ValueError: another number of pictures than image parts, a row that is too long, or a chat template without
                generation markers where `answers_only` needs them.
        """
        escaped = [self._escape_message(message) for message in messages]
        encoded = self.tokenizer.apply_chat_template(
            escaped,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=answers_only,
        )
        ids: list[int] = encoded["input_ids"]
        learned = encoded["assistant_masks"] if answers_only else [1] * len(ids)
        if answers_only and not any(learned):
            raise ValueError(
                "The chat template marks no assistant turn; add {% generation %} markers around the answers."
            )
        if ids.count(self.image_token_id) != len(images):
            raise ValueError(
                f"The messages have {ids.count(self.image_token_id)} image parts for {len(images)} pictures."
            )
        grammar, pictures = self.grammar, iter(images)
        row = EncodedMessages([], [])
        for token, keep in zip(ids, learned, strict=True):
            piece = self._picture_ids(grammar, next(pictures)) if token == self.image_token_id else [token]
            row.input_ids.extend(piece)
            row.labels.extend(piece if keep else [IGNORED_LABEL] * len(piece))
        self._check_length(len(row.input_ids))
        return row

    def _picture_ids(self, grammar: SpanGrammar, codes: VisualCodes) -> list[int]:
        ids = grammar.build(codes)
        if self.frames_pictures:
            return ids
        return [token for token in ids if self.text_rows <= token < self.vocabulary.image_token_end]

    def null_prompt_ids(self) -> list[int]:
        """The prompt of an empty request: what guidance steers away from."""
        messages = [{"role": "user", "content": ""}]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )
        return self._text_ids(text)

    def parse(self, ids: Sequence[int] | torch.Tensor) -> list[TextPart | ImagePart]:
        """Generated ids to the parts of an answer, in order; structural tokens and empty text are left out."""
        plain = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        parts: list[TextPart | ImagePart] = []
        for span in self.grammar.parse(plain):
            if isinstance(span, ImageSpan):
                flat = [code or 0 for position in span.codes for code in position]
                codes = torch.tensor(flat, dtype=torch.int64).view(1, -1, len(self.codebook_sizes))
                grid = [span.grid] if span.grid else None
                parts.append(
                    ImagePart(VisualCodes(codes, torch.ones_like(codes[..., 0], dtype=torch.bool), grid), span.complete)
                )
            elif text := self.tokenizer.decode(list(span.ids), skip_special_tokens=True).replace(ESCAPE, ""):
                parts.append(TextPart(text))
        return parts

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _escape_message(self, message: Message) -> Message:
        _check_message(message)
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": self.escape(content)}
        parts = [{**part, "text": self.escape(part["text"])} if part["type"] == "text" else part for part in content]
        return {**message, "content": parts}

    def _check_length(self, length: int) -> None:
        limit = self.tokenizer.model_max_length
        if length > limit:
            raise ValueError(f"The prompt is {length} tokens long; this model takes {limit}. Shorten the text.")


def _check_message(message: Any) -> None:
    """Raise `ValueError` where a message is not what chat templates read; they leave out what they do not know."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"A message is {message!r}; it must have a role and content.")
    content = message["content"]
    if isinstance(content, str):
        return
    for part in content if isinstance(content, (list, tuple)) else [content]:
        known = isinstance(part, Mapping) and part.get("type") in PARTS
        if not known or (part["type"] == "text" and not isinstance(part.get("text"), str)):
            raise ValueError(
                f"The content of a message has {part!r}; it must be a text, or a list of parts of type "
                f"{', '.join(PARTS)}."
            )
