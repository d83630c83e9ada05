"""Tiny towers as they lie in a folder: models with what prepares their inputs."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

CAPTIONS = ["a red heart", "two blue stars", "a green arrow above a star"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 24, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}


def write_tower(folder):
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SIZES), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def write_text_tower(model, folder, *, sees=False):
    """A model and a tokenizer of the words of the captions, which ends texts as CLIP and SigLIP do."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted({word for caption in CAPTIONS for word in caption.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    if sees:
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return str(folder)


def whole_model(kind):
    """A tiny CLIP or SigLIP."""
    torch.manual_seed(0)
    vision = SIZES | {"image_size": 32, "patch_size": 8}
    if kind == "siglip":
        return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision)).eval()
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=12)).eval()
