"""Codecs that read and draw under texts learn from pictures with captions."""

import json

import numpy as np
import pytest
import torch
from test_heads import recipe_of
from towers import CAPTIONS, SIZES, TEXT, whole_model, write_text_tower
from transformers import AutoModel, CLIPTextModel, T5Config, T5EncoderModel

from unimm import VisualCodecConfig, VisualCodecModel
from unimm.config import from_dict
from unimm.training.captions import CaptionFeatures, TextConfig
from unimm.training.codec import CodecRecipe, CodecTask, check_objectives, train_codec
from unimm.training.pool import Pool

UNDER_TEXT = {"condition_tokens": 12, "condition_width": 16}


def codec_fields(*, reads=True, draws=True):
    sizes = {"tokens": 8, "rows": 4, "columns": 4, "dim": 4, "depth": 1, "num_heads": 2}
    return {
        "image_size": 32,
        "encoder": {"kind": "patches", "patch": 8, "width": 16},
        "resampler": {"kind": "latent", **sizes, **(UNDER_TEXT if reads else {})},
        "quantizer": {"kind": "vq", "size": 32, "dim": 4, "project": False, "ema_decay": 0.9, "restart_below": 0.1},
        "length": {"kind": "sequence", "tokens": 8, "rows": 4, "columns": 4},
        "decoder": {"kind": "mask_vit", "patch": 8, "width": 16, **sizes, **(UNDER_TEXT if draws else {})},
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folders of a CLIP, a SigLIP and a T5."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("clip", "siglip", "t5")}
    t5 = T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0)
    models = {kind: T5EncoderModel(t5) if kind == "t5" else whole_model(kind) for kind in folders}
    return {kind: write_text_tower(models[kind], folder) for kind, folder in folders.items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip", "t5"])
def test_features_are_the_last_hidden_states_of_the_text_side(texts, kind):
    features = CaptionFeatures(TextConfig(texts[kind]), 12)
    found = features(CAPTIONS)
    assert found.shape == (3, 12, 16)
    ids = features.tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
    whole = AutoModel.from_pretrained(texts[kind]).eval()
    side = whole.encoder if kind == "t5" else whole.text_model
    alone = side(input_ids=ids).last_hidden_state[0]
    if kind != "siglip":  # which sees its padding
        torch.testing.assert_close(found[0, : len(alone)], alone, atol=1e-5, rtol=0)
    long = features(["red " * 40])
    assert long.shape == (1, 12, 16)


@pytest.mark.parametrize("sides", [{"reads": False}, {"draws": False}, {}])
def test_a_codec_learns_under_captions(texts, tmp_path, monkeypatch, sides):
    monkeypatch.setattr("unimm.training.codec.HELD_OUT", 4)
    recipe = recipe_of(tmp_path, "run", codec_fields(**sides), text={"model": texts["clip"]})
    recipe |= {"data": {"worlds": {"shapes": 1.0}, "pool_size": 6, "batch_size": 2}}
    recipe |= {"optimizer": {"steps": 3, "warmup": 1}}
    directory = train_codec(from_dict(CodecRecipe, recipe))
    assert "psnr_shapes" in json.loads((directory.root / "finished.json").read_text())
    assert list(directory.samples.glob("*.png"))
    assert VisualCodecModel.from_pretrained(directory.model).condition_size == (12, 16)


def test_the_caption_of_a_picture_is_what_it_learns_under(texts, tmp_path):
    recipe = recipe_of(tmp_path, "run", codec_fields(reads=False), text={"model": texts["clip"]})
    torch.manual_seed(0)
    shown = np.full((2, 32, 32, 3), 200, np.uint8)
    task = CodecTask(from_dict(CodecRecipe, recipe), Pool(shown, {}, CAPTIONS[:2]))
    other = CodecTask(from_dict(CodecRecipe, recipe), Pool(shown, {}, CAPTIONS[1:]))
    other.codec.load_state_dict(task.codec.state_dict())
    losses = [made.losses(made.model.eval(), 0, 0)["loss"] for made in (task, other)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert task.codec.decoder.text.embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "changes", "said"),
    [
        (codec_fields(), {}, "text.model is '', and this codec does so under a text; name a model"),
        (codec_fields(reads=False, draws=False), {"text": {"model": "t5"}}, "reads or draws under no text"),
        (codec_fields(), {"text": {"model": "t5"}, "data": {"source": "photographs"}}, "data.text"),
        (codec_fields(), {"text": {"model": "WIDE"}}, "of width 20; condition_width of the codec is 16"),
        (codec_fields(), {"text": {"model": "BLIND"}}, "model_type 'qwen3'; take one of clip"),
    ],
)
def test_texts_that_do_not_fit_are_refused_before_a_picture_is_made(tmp_path, fields, changes, said):
    if (name := changes.get("text", {}).get("model")) in ("WIDE", "BLIND"):
        config = T5Config(d_model=20, num_heads=2) if name == "WIDE" else CLIPTextModel.config_class(**TEXT)
        config.save_pretrained(tmp_path / "text")
        if name == "BLIND":
            (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "qwen3", **SIZES}))
        changes = changes | {"text": {"model": str(tmp_path / "text")}}
    recipe = from_dict(CodecRecipe, recipe_of(tmp_path, "run", fields) | changes)
    with pytest.raises(ValueError, match=said):
        check_objectives(recipe, VisualCodecConfig(**fields))
    assert not (tmp_path / "run").exists()
