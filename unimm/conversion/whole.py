"""A whole published system, language model, tokenizers and detokenizer, as one repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig

from unimm.codec import VisualCodecImageProcessor
from unimm.conversion.text import tokenizer_of_rows
from unimm.conversion.upstream import CODEC, Plan, Rename, UpstreamConfig, WeightFile
from unimm.detokenizer.drawers import SETTINGS
from unimm.sequence import UniMMProcessor
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration
from unimm.unified.shims import write_shims

DETOKENIZER = "detokenizer"
WORDS = 512  # tokens of text in an answer, besides one picture
# Fields of a text model that upstream's configuration holds beside others, by model type.
LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "head_dim",
    "attention_dropout",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Front:
    """What a user of the model meets.

    Args:
        tokenizer: arguments of `tokenizer_of_rows`.
        processor: further arguments of `UniMMProcessor`.
        sampling: the published settings of `generate`.
        codec: plan of the visual tokenizer.
        detokenizer: writes a saved pipeline into a folder; None where there is none.
    """

    tokenizer: dict[str, Any]
    processor: dict[str, Any]
    sampling: dict[str, Any]
    codec: Plan
    detokenizer: Callable[[Path], None] | None = None


def padded_rows(count: int) -> int:
    """Rows of a table that holds `count`, as `VisualVocabulary.size` has them."""
    return -(-count // 128) * 128


def filled_up(rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of zeros below a table, up to `rows` in all."""

    def change(table: torch.Tensor) -> torch.Tensor:
        return pad(table, (0, 0, 0, rows - len(table)))

    return change


def text_fields(upstream: UpstreamConfig, model_type: str, rows: int) -> dict[str, Any]:
    """Our text configuration of a plain language model of upstream."""
    given = {name: upstream.get(name, None) for name in LLAMA_FIELDS}
    return {"model_type": model_type, "vocab_size": rows} | {k: v for k, v in given.items() if v is not None}


def plain_renames(rows: int, *, prefix: str = "", tied: bool = False) -> tuple[Rename, ...]:
    """The keys of a stock Llama or Qwen2 model, whose tables grow to `rows`; `prefix` is a pattern."""
    body = "model.language_model."
    return (
        Rename(rf"{prefix}model\.embed_tokens\.weight", EMBEDDING, filled_up(rows)),
        *(() if tied else (Rename(rf"{prefix}lm_head\.weight", HEAD, filled_up(rows)),)),
        Rename(rf"{prefix}model\.layers\.(?P<rest>(?!\d+\.self_attn\.rotary_emb).*)", rf"{body}layers.\g<rest>"),
        Rename(rf"{prefix}model\.norm\.weight", f"{body}norm.weight"),
    )


def whole_plan(
    config: UniMMConfig, renames: tuple[Rename, ...], front: Front, *, files: tuple[WeightFile, ...], tied: bool = False
) -> Plan:
    """The plan of a language model with its codec inside.

    Args:
        config: with the codec's configuration.
        renames: of the language model.
        front: what lies beside the weights.
        files: where language model and codec lie.
        tied: whether upstream's head is its embedding.
    """
    codec = front.codec
    return Plan(
        config,
        renames=(*renames, *(replace(rule, target=CODEC + rule.target) for rule in codec.renames)),
        without_effect=(*codec.without_effect, r".*\.rotary_emb\.inv_freq", *([r"lm_head\.weight"] if tied else [])),
        constants=codec.constants,
        model_class=UniMMForConditionalGeneration,
        files=files,
        copies={HEAD: EMBEDDING} if tied else {},
        finish=lambda folder: _write_front(config, front, folder),
    )


def _write_front(config: UniMMConfig, front: Front, folder: Path) -> None:
    tokenizer = tokenizer_of_rows(**front.tokenizer, rows=config.vocabulary.size)
    processor = UniMMProcessor(
        VisualCodecImageProcessor.for_codec(config.codec_config, front.codec.any_shape, stretch=front.codec.stretch),
        tokenizer,
        codebook_sizes=config.codebook_sizes or (),
        text_rows=config.image_token_offset,
        downsample=config.codec_config.downsample,
        num_special_rows=config.num_special_rows,
        span_shapes=config.span_shapes,
        spelled_sizes=config.spelled_sizes,
        **front.processor,
    )
    vocabulary = config.vocabulary
    if processor.vocabulary != vocabulary:
        raise ValueError(
            f"The text tokenizer says {processor.vocabulary}, the model {vocabulary}; the two do not belong together."
        )
    processor.save_pretrained(folder)
    sampling = {"do_sample": True, "guidance_scale": 1.0, "max_new_tokens": config.grammar.longest + WORDS}
    GenerationConfig(
        **sampling | front.sampling, pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id
    ).save_pretrained(folder)
    write_shims(folder)
    if front.detokenizer is not None:
        shutil.rmtree(folder / DETOKENIZER, ignore_errors=True)
        front.detokenizer(folder / DETOKENIZER)


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Fields as a file, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def stock_detokenizer(
    upstream: UpstreamConfig, class_name: str, *, steps: int, guidance: float
) -> Callable[[Path], None] | None:
    """Copies the pipeline that the user names, with the published settings beside it; None where none is named.

    Args:
        upstream: with the pipeline's folder.
        class_name: of the pipeline.
        steps, guidance: as published.
    """
    source = upstream.detokenizer
    if source is None:
        return None
    index = source / "model_index.json"
    found = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index.is_file() else "no pipeline"
    if found != class_name:
        raise ValueError(f"{source} holds {found}; this system draws by a {class_name}, saved by diffusers.")

    def write(folder: Path) -> None:
        shutil.copytree(source, folder)
        write_json(folder / SETTINGS, {"num_inference_steps": steps, "guidance_scale": guidance})

    return write
