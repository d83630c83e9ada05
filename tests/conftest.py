"""One tiny random model, built once per process and shared by all rooms."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from unimm import UniMMForConditionalGeneration, VisualCodecModel
from unimm.codec.presets import load_preset
from unimm.pipelines import UniMM
from unimm.scorers.glyphs import find_font
from unimm.sequence import train_text_tokenizer

CAPTIONS = ["a red heart above a blue star", "draw a picture of three green circles", "what color is it?"]


def font_missing() -> bool:
    try:
        find_font()
    except FileNotFoundError:
        return True
    return False


needs_font = pytest.mark.skipif(font_missing(), reason="needs fonts-noto-color-emoji")


@pytest.fixture(scope="session")
def tokenizer():
    return train_text_tokenizer(CAPTIONS * 5, vocab_size=400, max_length=512)


@pytest.fixture(scope="session")
def codec():
    torch.manual_seed(0)
    return VisualCodecModel(load_preset("smallest")).eval()


@pytest.fixture(scope="session")
def tiny(codec, tokenizer):
    """A random model of a few thousand weights and its processor."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
    )
    return UniMMForConditionalGeneration.from_backbones(AutoModelForCausalLM.from_config(config), codec, tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def unimm_tiny(tiny):
    return UniMM(*tiny)
