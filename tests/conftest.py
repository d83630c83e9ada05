"""One tiny random model, built once per process and shared by all rooms, and the fixtures of references."""

import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from unimm import UniMMForConditionalGeneration, VisualCodecModel
from unimm.codec import VisualCodecConfig
from unimm.codec.presets import load_preset
from unimm.pipelines import UniMM
from unimm.rewards import REWARDS, Reward
from unimm.scorers.glyphs import find_font
from unimm.sequence import train_text_tokenizer

CAPTIONS = ["a red heart above a blue star", "draw a picture of three green circles", "what color is it?"]
GOLDEN = Path(__file__).parent / "golden"
ELSEWHERE = Path(os.environ.get("UNIMM_GOLDEN", GOLDEN))  # further fixtures, more than fit into the repository


def pytest_collection_finish() -> None:
    """What was imported stays: the collections of garbage that every training asks for need not go through it."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that are marked `gpu` wait for a machine that has one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def stored(system: str) -> Path:
    """The folder of a system's fixture, which may not exist."""
    return GOLDEN / system if (GOLDEN / system).is_dir() else ELSEWHERE / system


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


def random_llm(tokenizer):
    """A language model of one layer whose logits are far from uniform."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """The folder of a system's fixture, its weights whole: system -> folder.

    Weights that two fixtures have in common are stored once; `same.json` says where: system -> key -> (system, key).
    """
    same = json.loads((GOLDEN / "same.json").read_text())
    root = tmp_path_factory.mktemp("golden")

    def folder(system):
        if system not in same:
            return stored(system)
        if not (root / system).exists():
            shutil.copytree(GOLDEN / system, root / system)
            weights = load_file(GOLDEN / system / "weights.safetensors")
            for key, (other, name) in same[system].items():
                assert key not in weights
                weights[key] = load_file(GOLDEN / other / "weights.safetensors")[name]
            save_file(weights, root / system / "weights.safetensors")
        return root / system

    return folder


@pytest.fixture(scope="session")
def worlds_folder(tokenizer, tmp_path_factory):
    """A saved random model whose pictures have the worlds' size."""
    torch.manual_seed(0)
    config = VisualCodecConfig(
        encoder={"kind": "conv", "patch": 32, "channels": [8], "blocks": 1},
        resampler={"kind": "grid", "dim": 8},
        quantizer={"kind": "fsq", "levels": [4, 4]},
        decoder={"kind": "conv", "patch": 32, "channels": [8], "blocks": 1},
    )
    folder = tmp_path_factory.mktemp("worlds") / "model"
    codec = VisualCodecModel(config).eval()
    for part in UniMMForConditionalGeneration.from_backbones(random_llm(tokenizer), codec, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def brightness(monkeypatch):
    """A reward that tells even the drawings of a random model apart."""

    def mean(images, drawings):
        return [float(np.asarray(image).mean() / 255) for image in images]

    monkeypatch.setitem(REWARDS, "brightness", Reward("brightness", 0.0, 1.0, lambda facts: True, mean))
