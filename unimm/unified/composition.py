"""What a text model and a codec make together: the processor and the configuration of the unified model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from unimm.codec import VisualCodecImageProcessor, VisualCodecModel
from unimm.sequence import UniMMProcessor, shape_fields
from unimm.unified.configuration import UniMMConfig


def processor_for(
    tokenizer: PreTrainedTokenizerBase, codec: VisualCodecModel, *, text_rows: int | None = None
) -> UniMMProcessor:
    """The processor of a text vocabulary and a codec."""
    policy = codec.config.length_policy
    return UniMMProcessor.from_tokenizer(
        tokenizer,
        VisualCodecImageProcessor.for_codec(codec.config),
        grids=policy.grids(),
        codebook_sizes=codec.spec_without_fingerprint.sizes,
        downsample=codec.config.downsample,
        text_rows=text_rows,
        lengths=None if policy.layout == "grid" else (policy.min_length, policy.max_length),
    )


def config_for(
    text_config: Any,
    codec: VisualCodecModel,
    processor: UniMMProcessor,
    *,
    vision_layers_before: int = 0,
    vision_layers_after: int = 0,
    reads_vectors: bool = False,
    codec_loss_weight: float = 0.0,
) -> UniMMConfig:
    """The configuration of a text model's architecture with a codec's rows, and layers for pictures, added."""
    vocabulary = processor.vocabulary
    text = text_config.to_dict() | {"vocab_size": vocabulary.size, "tie_word_embeddings": False}
    added = vision_layers_before + vision_layers_after
    if added:
        text["num_hidden_layers"] = text_config.num_hidden_layers + added
        if types := text.get("layer_types"):
            text["layer_types"] = types[:1] * vision_layers_before + types + types[-1:] * vision_layers_after
    return UniMMConfig(
        text_config=text,
        codec_config=codec.config.to_dict(),
        image_token_offset=vocabulary.image_token_offset,
        codebook_sizes=list(vocabulary.codebook_sizes),
        boi_token_id=vocabulary.boi_token_id,
        eoi_token_id=vocabulary.eoi_token_id,
        image_token_id=vocabulary.image_token_id,
        pad_token_id=vocabulary.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        span_shapes=[shape_fields(shape) for shape in processor.shapes],
        null_prompt_ids=processor.null_prompt_ids(),
        vision_layers_before=vision_layers_before,
        vision_layers_after=vision_layers_after,
        vision_norm=bool(added),
        reads_vectors=reads_vectors,
        codec_loss_weight=codec_loss_weight,
    )
