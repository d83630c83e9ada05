"""Adapters through peft, as a section of a recipe: without it all weights are trained.

The text model's linear layers get low-rank updates (LoRA, 2106.09685) over weights that may be quantised (QLoRA,
2305.14314); of the embedding and of the head only the code rows are trained, so text rows stay as they were, bit by
bit. With rank 0 the text model is left alone altogether, and new rows, and new layers where there are any, are fitted
to it. The saved model has the adapter merged in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import BitsAndBytesConfig

from unimm.unified import UniMMConfig, UniMMForConditionalGeneration, four_bits
from unimm.unified.compression import NOT_QUANTIZED

FROZEN = ("float32", "bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter.

    Args:
        rank: of the updates; 0 leaves the text model's layers as they are.
        alpha: their scale is alpha / rank.
        dropout: before the updates.
        target_modules: names of the linear layers of the text model that are adapted.
        code_rows: also train the code rows of embedding and head, of the head alone where the embedding is frozen.
        vision_layers: also train the layers and the norm for pictures, where the model has them.
        frozen: how the weights that are not trained are held: float32, bfloat16, or int8 and nf4 of bitsandbytes.

    Raises:
        ValueError: an unknown way to hold weights, or nothing to train.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    code_rows: bool = True
    vision_layers: bool = True
    frozen: str = "float32"

    def __post_init__(self) -> None:
        if self.frozen not in FROZEN:
            raise ValueError(f"adapter.frozen is {self.frozen!r}; it must be one of {', '.join(FROZEN)}.")
        if not self.rank and not self.code_rows:
            raise ValueError("adapter.rank is 0 and adapter.code_rows false, which trains nothing; set one of them.")

    @property
    def quantized(self) -> bool:
        return self.frozen in ("int8", "nf4")

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights that are not quantised."""
        return torch.float32 if self.frozen in ("float32", "int8") else torch.bfloat16


def load_model(path: str, adapter: AdapterConfig | None) -> UniMMForConditionalGeneration:
    """A saved model to train: in float32, or as an adapter holds it.

    Raises:
        ValueError: its codec learns too, which takes pictures, where recipes have their codes.
    """
    config = UniMMConfig.from_pretrained(path)
    if config.codec_loss_weight:
        raise ValueError(
            f"{path} has a codec that learns from pictures, by codec_loss_weight {config.codec_loss_weight:g}, and "
            "rows hold codes; set that to 0 in its config.json, or give forward pixel_values and labels yourself."
        )
    if adapter is None or not adapter.quantized:
        dtype = torch.float32 if adapter is None else adapter.dtype
        return UniMMForConditionalGeneration.from_pretrained(path, dtype=dtype)
    eight_bits = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    quantization = eight_bits if adapter.frozen == "int8" else four_bits(config)
    return UniMMForConditionalGeneration.from_pretrained(path, dtype=adapter.dtype, quantization_config=quantization)


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
    if model.config.levels is not None:
        rows.append(vocabulary.image_token_id)  # which asks for codes
    whole = _vision_parts(model) if config.vision_layers else []
    # Anchored, since the codec may have layers of the same names; layers that are trained whole need no update.
    wholly = "".join(rf"(?!{re.escape(name)}\.)" for name in whole)
    return LoraConfig(
        r=config.rank or 1,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=(
            rf"{wholly}model\.language_model\..*\.({'|'.join(map(re.escape, config.target_modules))})"
            if config.rank
            else DUMMY_TARGET_MODULES
        ),
        modules_to_save=whole or None,
        trainable_token_indices=dict.fromkeys(_row_modules(model), rows) if config.code_rows else None,
    )


def begin_adapter(model: UniMMForConditionalGeneration, config: AdapterConfig) -> PeftModel:
    """The model with a new adapter, the only part that is trained."""
    adapted = get_peft_model(model, lora_config(model, config))
    hold_in_float32(adapted)
    return adapted


def hold_in_float32(model: nn.Module) -> None:
    """Keep what is trained in float32, where steps smaller than a half-precision number's spacing still count."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def merge_adapter(model: PeftModel, config: AdapterConfig, folder: Path) -> UniMMForConditionalGeneration:
    """The model that is saved, with a trained adapter in its weights.

    Args:
        folder: where the adapter is saved; weights that were quantised are read anew for it, in bfloat16.
    """
    if config.quantized:
        source = model.peft_config["default"].base_model_name_or_path
        base = UniMMForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
        base.generation_config = model.get_base_model().generation_config
        model = PeftModel.from_pretrained(base, folder)
    merged = model.merge_and_unload()
    assert isinstance(merged, UniMMForConditionalGeneration)
    return merged


def _row_modules(model: UniMMForConditionalGeneration) -> list[str]:
    """Names of the head and of an embedding that learns."""
    frozen = model.config.frozen_embedding
    wanted = (model.get_output_embeddings(), *(() if frozen else (model.get_input_embeddings(),)))
    return [name for name, module in model.named_modules() if module in wanted]


def _vision_parts(model: UniMMForConditionalGeneration) -> list[str]:
    """Names of the layers and of the norm that change picture positions only."""
    before, after = model.config.vision_layers_before, model.config.vision_layers_after
    last = model.config.text_config.num_hidden_layers
    layers = [f"model.language_model.layers.{index}" for index in (*range(before), *range(last - after, last))]
    return layers + (["model.norm.image"] if model.config.vision_norm else [])
