"""X-Omni's language model: a Qwen2 with layers, a norm, an embedding and a head of their own for picture positions.

Upstream's ids are ours. Text ids come first, codes begin at `vocab_size`, and the ids after the codes open, size and
close a picture; upstream keeps two tables each for embedding and head, which here are two parts of one. One special row
more than upstream has stands for codes that are yet to be computed, and rows of zeros fill up to a multiple of 128.
"""

from __future__ import annotations

import re
from typing import Any

from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig
from unimm.conversion.whole import filled_up, padded_rows
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration

SPECIALS = ("<SOM>", "<EOM>", "<IMAGE>")  # in the order of their ids
# Fields of the text model with the defaults of upstream's base class, by their name on both sides.
QWEN2: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "attention_dropout": 0.0,
}
ROPE_THETA = 10000.0
# Our tables, and upstream's of text rows and of image rows.
TABLES = {
    "model.language_model.embed_tokens.weight": ("model.lm_embed_tokens.weight", "model.mm_embed_tokens.weight"),
    "lm_head.weight": ("lm_head.weight", "mm_head.weight"),
}


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `XOmniForCausalLM`.

    Raises:
        ValueError: tied embeddings, or fewer image rows than codes.
    """
    config = UniMMConfig(**language_fields(upstream))
    return Plan(config, renames(config), model_class=UniMMForConditionalGeneration)


def language_fields(upstream: UpstreamConfig) -> dict[str, Any]:
    """Our configuration of the language model, as keywords."""
    text_rows, codes = upstream.get("vocab_size"), upstream.get("image_vocab_size")
    image_rows = upstream.get("mm_vocab_size")
    if upstream.get("tie_word_embeddings", False):
        raise ValueError("tie_word_embeddings is true; X-Omni's heads are tables of their own, so it must be false.")
    if image_rows < codes:
        raise ValueError(f"mm_vocab_size is {image_rows}, which must be at least image_vocab_size, {codes}.")
    names = list(upstream.get("mm_special_tokens", SPECIALS))
    if missing := [name for name in SPECIALS[:2] if name not in names]:
        raise ValueError(f"mm_special_tokens are {names}; they must name {' and '.join(missing)} too.")
    specials, first_special = max(image_rows - codes, len(names)), text_rows + codes
    rows = padded_rows(first_special + specials + 1)
    text = {name: upstream.get(name, default) for name, default in QWEN2.items()}
    theta, scaling = upstream.get("rope_theta", ROPE_THETA), upstream.get("rope_scaling", None)
    longest = text["max_position_embeddings"]
    return {
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": rows,
            "rope_theta": theta,
            "rope_scaling": scaling,
            **text,
        },
        "image_token_offset": text_rows,
        "codebook_sizes": [codes],
        "num_special_rows": specials + 1,
        "boi_token_id": first_special + names.index("<SOM>"),
        "eoi_token_id": first_special + names.index("<EOM>"),
        "image_token_id": first_special + specials,
        "pad_token_id": upstream.get("pad_token_id", None) or 0,
        "eos_token_id": upstream.get("eos_token_id", None),
        "span_shapes": [{"grid": None, "prefix": [], "min_positions": 1, "max_positions": longest}],
        "null_prompt_ids": [upstream.get("pad_token_id", None) or 0],
        "vision_layers_before": upstream.get("num_mm_adap_layers"),
        "vision_layers_after": upstream.get("num_mm_head_layers"),
        "vision_norm": True,
    }


def renames(config: UniMMConfig) -> tuple[Rename, ...]:
    """The language model's keys."""
    filled = filled_up(config.vocabulary.size - config.image_token_offset)
    return (
        Rename(r"model\.layers\.(?P<rest>.*)", r"model.language_model.layers.\g<rest>"),
        *(Rename(re.escape(names[0]), ours, part=0) for ours, names in TABLES.items()),
        *(Rename(re.escape(names[1]), ours, filled, part=1) for ours, names in TABLES.items()),
        Rename(r"model\.lm_norm\.weight", "model.norm.text.weight"),
        Rename(r"model\.mm_norm\.weight", "model.norm.image.weight"),
    )


LANGUAGE_MODEL = Upstream(
    system="xomni_lm",
    repository="X-Omni-Team/X-Omni",
    licence="Apache-2.0",
    paper="arXiv 2507.22058",
    plan=plan,
)
