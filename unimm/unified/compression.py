"""A model whose language model's linear layers are stored for drawing: int8, bfloat16, or four bits.

The codec stays as it is, so pictures keep their codes.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from unimm.nn.stored import NF4_BLOCK, Int8Linear, store_linears
from unimm.unified.configuration import UniMMConfig
from unimm.unified.modeling import UniMMForConditionalGeneration

NOT_QUANTIZED = ["lm_head", "model.visual", "model.reader"]


def four_bits(config: UniMMConfig) -> BitsAndBytesConfig:
    """How a model is loaded whose text layers are stored in NF4 while they are read: they never lie whole in memory.

    Layers whose inputs are no multiple of `NF4_BLOCK` stay as they are.
    """
    with torch.device("meta"):
        modules = dict(UniMMForConditionalGeneration(config).named_modules())
    uneven = [
        name for name, module in modules.items() if isinstance(module, nn.Linear) and module.in_features % NF4_BLOCK
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=[*NOT_QUANTIZED, *uneven],
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )


def compress(model: UniMMForConditionalGeneration, weights: str) -> None:
    """Turn the language model's linear layers, in place, into layers of another format; the rest becomes bfloat16.

    Args:
        weights: `bfloat16` or `int8`. The scales of int8 are by rows, the head included; the codec stays as it is.
    """
    store_linears(model.model.language_model, weights)
    model.requires_grad_(False)
    if weights == "int8":
        model.set_submodule("lm_head", Int8Linear.from_linear(model.lm_head))
    for part in (model.model.language_model, model.model.norm, model.lm_head):
        if part is not None:
            part.to(torch.bfloat16)
