"""The unified model's configuration: a text model, a codec, and where their rows meet."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from unimm.codec import VisualCodecConfig
from unimm.sequence import SpanGrammar, SpanShape, VisualVocabulary


@strict
class UniMMConfig(PreTrainedConfig):
    """One causal language model over text rows and code rows.

    Args:
        text_config: of any causal language model; its `vocab_size` counts all rows, code rows included.
        codec_config: of the visual tokenizer; None for a model that only sees pre-tokenised rows.
        image_token_offset, codebook_sizes: the block of code rows, one codebook per slot of a position.
        boi_token_id, eoi_token_id, image_token_id: structural ids; see `VisualVocabulary`.
        span_shapes: legal pictures, each `{"grid": [rows, columns] | None, "prefix": ids, "min_positions",
            "max_positions"}`.
        null_prompt_ids: the unconditional prompt of guidance.
        image_loss_weight: weight of a code against a text token in the loss.

    Raises:
        ValueError: rows, structural ids and shapes that do not fit each other.
    """

    model_type = "unimm"
    sub_configs = {"text_config": AutoConfig, "codec_config": VisualCodecConfig}

    text_config: Any = None
    codec_config: Any = None
    image_token_offset: int = 256
    codebook_sizes: list[int] | None = None
    boi_token_id: int = 1
    eoi_token_id: int = 2
    image_token_id: int = 3
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None
    span_shapes: list[dict[str, Any]] | None = None
    null_prompt_ids: list[int] | None = None
    image_loss_weight: float = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.codebook_sizes is None:
            self.codebook_sizes = [64]
        if isinstance(self.text_config, dict):
            self.text_config = CONFIG_MAPPING[self.text_config.get("model_type", "qwen3")](**self.text_config)
        elif self.text_config is None:
            rows = VisualVocabulary(self.image_token_offset, tuple(self.codebook_sizes), 1, 2, 3, 0).size
            self.text_config = CONFIG_MAPPING["qwen3"](vocab_size=rows)
        if isinstance(self.codec_config, dict):
            self.codec_config = VisualCodecConfig(**self.codec_config)
        if self.span_shapes is None:
            self.span_shapes = [{"grid": [2, 2], "prefix": [], "min_positions": 4, "max_positions": 4}]
        self._check_vocabulary()
        super().__post_init__(**kwargs)

    def _check_vocabulary(self) -> None:
        """Check that the text model has exactly the rows that the vocabulary needs."""
        rows = self.vocabulary.size
        if self.text_config.vocab_size != rows:
            raise ValueError(
                f"text_config.vocab_size is {self.text_config.vocab_size}; {self.image_token_offset} text rows and "
                f"codebooks of {self.codebook_sizes} need {rows} (a multiple of 128)."
            )

    @property
    def vocabulary(self) -> VisualVocabulary:
        assert self.codebook_sizes is not None
        return VisualVocabulary(
            image_token_offset=self.image_token_offset,
            codebook_sizes=tuple(self.codebook_sizes),
            boi_token_id=self.boi_token_id,
            eoi_token_id=self.eoi_token_id,
            image_token_id=self.image_token_id,
            pad_token_id=self.pad_token_id or 0,
        )

    @property
    def grammar(self) -> SpanGrammar:
        assert self.span_shapes is not None
        shapes = tuple(
            SpanShape(
                grid=tuple(shape["grid"]) if shape["grid"] else None,
                prefix=tuple(shape["prefix"]),
                min_positions=shape["min_positions"],
                max_positions=shape["max_positions"],
            )
            for shape in self.span_shapes
        )
        return SpanGrammar(self.vocabulary, shapes)
