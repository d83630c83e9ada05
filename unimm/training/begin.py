"""How a unified model begins: from nothing, or from a language model, around a trained codec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from unimm.codec import VisualCodecModel
from unimm.data.conversations import TaskRates
from unimm.data.rows import write_rows
from unimm.generation import EVERYWHERE, check_interval
from unimm.sequence import UniMMProcessor, train_text_tokenizer
from unimm.training.adapter import AdapterConfig
from unimm.training.language_data import RowsConfig, open_mixture, row_messages
from unimm.training.loop import ON_CPU
from unimm.unified import UniMMForConditionalGeneration, config_for, processor_for

WORDS_PER_ANSWER = 64  # room beside one picture
TEXT_SAMPLES = 4_000  # rows whose words the text vocabulary is learned from


@dataclass(frozen=True)
class TextModelConfig:
    """A text model from nothing: an architecture of transformers, its sizes, and at most `vocab_size` text rows.

    With `glyphs` the embedding has pictures of its texts as rows, and does not learn (Emergent Semantics, 2507.04886).
    """

    model_type: str = "qwen3"
    vocab_size: int = 2048
    max_length: int = 512
    glyphs: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BackboneConfig:
    """A language model to begin with.

    Args:
        llm: folder or Hub name of a causal language model with its tokenizer.
        chat_template: a Jinja file that takes image parts and marks answers for `answers_only`; None keeps the
            tokenizer's.
        eos_token: ends an answer under that template, where it is not the tokenizer's own.
        max_length: longest conversation in tokens; None keeps the tokenizer's.
        vision_layers_before, vision_layers_after: new layers for pictures, as in X-Omni (2507.22058).
    """

    llm: str
    chat_template: str | None = None
    eos_token: str | None = None
    max_length: int | None = None
    vision_layers_before: int = 0
    vision_layers_after: int = 0


@dataclass(frozen=True)
class SamplingConfig:
    """How the trained model samples unless told otherwise; saved in its generation config.

    Raises:
        ValueError: a `guidance_interval` that is none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = EVERYWHERE

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)


def begin_model(
    codec_path: str,
    data: RowsConfig,
    text_model: TextModelConfig,
    backbone: BackboneConfig | None,
    adapter: AdapterConfig | None,
) -> tuple[UniMMForConditionalGeneration, UniMMProcessor]:
    """A model around a trained codec; rows of rendered worlds are written first where they are missing.

    Raises:
        ValueError: a language model without chat template, or rows of another codec.
    """
    codec = VisualCodecModel.from_pretrained(codec_path)
    if data.worlds:
        with PartialState(cpu=ON_CPU).local_main_process_first():
            write_rows(codec, data.worlds, num_rows=data.num_rows, seed=data.seed, folder=Path(data.folder))
    if backbone is not None:
        return begin_from_backbone(backbone, codec, torch.float32 if adapter is None else adapter.dtype)
    rows = [part for part, _ in open_mixture(data, codec)]
    tokenizer = train_text_tokenizer(texts_of(rows), vocab_size=text_model.vocab_size, max_length=text_model.max_length)
    processor = processor_for(tokenizer, codec)
    text_config = CONFIG_MAPPING[text_model.model_type](**text_model.options)
    model = UniMMForConditionalGeneration(config_for(text_config, codec, processor))
    model.model.visual = codec.eval().requires_grad_(False)
    model.begin_code_rows()
    if text_model.glyphs:
        model.begin_glyph_rows(tokenizer)
    return model, processor


def begin_from_backbone(
    backbone: BackboneConfig, codec: VisualCodecModel, dtype: torch.dtype
) -> tuple[UniMMForConditionalGeneration, UniMMProcessor]:
    """A language model with rows, and where the recipe says so layers, for pictures.

    Raises:
        ValueError: no chat template, or an unknown end of answers.
    """
    tokenizer = AutoTokenizer.from_pretrained(backbone.llm)
    if backbone.chat_template is not None:
        tokenizer.chat_template = Path(backbone.chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {backbone.llm} has no chat template, as base models have none; name a Jinja file in "
            "backbone.chat_template, for example recipes/qwen3-0.6b/chat_template.jinja."
        )
    if backbone.eos_token is not None:
        if backbone.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"backbone.eos_token is {backbone.eos_token!r}, which {backbone.llm} has no token for.")
        tokenizer.eos_token = backbone.eos_token
    if backbone.max_length is not None:
        tokenizer.model_max_length = backbone.max_length
    return UniMMForConditionalGeneration.from_backbones(
        AutoModelForCausalLM.from_pretrained(backbone.llm, dtype=dtype),
        codec,
        tokenizer,
        vision_layers_before=backbone.vision_layers_before,
        vision_layers_after=backbone.vision_layers_after,
    )


def generation_config(processor: UniMMProcessor, sampling: SamplingConfig) -> GenerationConfig:
    """Defaults of `generate` that are saved with the model."""
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,  # transformers would keep the 50 likeliest ids only
        guidance_scale=sampling.guidance_scale,
        guidance_interval=list(sampling.guidance_interval),
        max_new_tokens=processor.grammar.longest + WORDS_PER_ANSWER,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )


def texts_of(parts: Sequence[Dataset]) -> Iterator[str]:
    """Everything that is said about a sample of the rows, in the chat's phrasings."""
    rng = np.random.default_rng(0)
    for rows in parts:
        for index in rng.permutation(len(rows))[:TEXT_SAMPLES].tolist():
            row = rows[index]
            yield from row["captions"] or ()
            for _ in range(2):
                for message in row_messages(row, TaskRates(), rng):
                    content = message["content"]
                    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
                    yield from (piece["text"] for piece in pieces if piece["type"] == "text")
