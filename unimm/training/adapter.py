"""Low-rank adapters (LoRA, 2106.09685) through peft, as a section of a recipe: without it all weights are trained.

The text model's linear layers get low-rank updates; of the embedding and of the head only the code rows are trained, so
text rows stay as they were, bit by bit. The saved model has the adapter merged in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from torch import nn

from unimm.unified import UniMMForConditionalGeneration


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter.

    Args:
        rank: of the updates.
        alpha: their scale is alpha / rank.
        dropout: before the updates.
        target_modules: names of the linear layers of the text model that are adapted.
        code_rows: also train the code rows of embedding and head.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    code_rows: bool = True


def lora_config(model: UniMMForConditionalGeneration, config: AdapterConfig) -> LoraConfig:
    """What peft needs to know.

    Raises:
        ValueError: target modules that the text model does not have.
    """
    text = model.model.language_model
    linear = {name.rsplit(".", 1)[-1] for name, module in text.named_modules() if isinstance(module, nn.Linear)}
    missing = sorted(set(config.target_modules) - linear)
    if missing or not config.target_modules:
        raise ValueError(
            f"adapter.target_modules are {list(config.target_modules)}; the text model has {', '.join(sorted(linear))}."
        )
    vocabulary = model.config.vocabulary
    rows = list(range(vocabulary.image_token_offset, vocabulary.image_token_end))
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        # Anchored, since the codec may have layers of the same names.
        target_modules=rf"model\.language_model\..*\.({'|'.join(map(re.escape, config.target_modules))})",
        trainable_token_indices=dict.fromkeys(_row_modules(model), rows) if config.code_rows else None,
    )


def merge_adapter(model: nn.Module) -> UniMMForConditionalGeneration:
    """The model that is saved: a trained adapter goes into the weights, anything else is what it was."""
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    assert isinstance(merged, UniMMForConditionalGeneration)
    return merged


def _row_modules(model: UniMMForConditionalGeneration) -> list[str]:
    """Names of the embedding and of the head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if module in wanted]
