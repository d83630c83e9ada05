"""A codec that learns from what is said of its pictures (ETT)."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import random_llm

from unimm import UniMMForConditionalGeneration, VisualCodecConfig, VisualCodecModel
from unimm.training.adapter import load_model
from unimm.unified import UniMMConfig

WEIGHT = 0.25


@pytest.fixture(scope="module")
def eyes():
    torch.manual_seed(0)
    config = VisualCodecConfig(
        image_size=32,
        encoder={"kind": "conv", "patch": 16, "channels": [16], "blocks": 1},
        resampler={"kind": "grid", "dim": 8},
        quantizer={"kind": "vq", "size": 32, "dim": 8, "project": False},
        decoder={"kind": "conv", "patch": 16, "channels": [16], "blocks": 1},
    )
    return VisualCodecModel(config)


@pytest.fixture(scope="module")
def begin(eyes, tokenizer):
    def begun(**options):
        torch.manual_seed(1)
        llm = random_llm(tokenizer)
        return UniMMForConditionalGeneration.from_backbones(llm, deepcopy(eyes), tokenizer, **options)[0].train()

    return begun


def batch(model):
    """Two pictures, and another text about each."""
    config = model.config
    span = [config.boi_token_id, *[config.image_token_id] * 4, config.eoi_token_id]
    ids = torch.tensor([[9, *span, 20, 21, 22], [9, *span, 30, 31, 32]])
    labels = ids.clone()
    labels[:, :8] = -100
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels}


def taught(part):
    return [weight.grad is not None and bool(weight.grad.any()) for weight in part.parameters()]


def test_what_is_said_of_a_picture_reaches_the_encoder_and_nothing_else_of_the_codec(begin):
    model = begin(reads_vectors=True, codec_loss_weight=WEIGHT)
    output = model(**batch(model))
    (output.loss - WEIGHT * output.codec_loss).backward()
    assert all(taught(model.codec.encoder))
    assert any(taught(model.codec.resampler))
    assert not any(taught(model.codec.decoder))


@pytest.mark.parametrize("options", [{}, {"reads_vectors": True}])
def test_without_it_nothing_does(begin, options):
    model = begin(**options)
    output = model(**batch(model))
    output.loss.backward()
    assert output.codec_loss is None
    assert not any(taught(model.codec))
    assert not model.codec.training
    assert any(taught(model.model.language_model))


def test_the_loss_is_that_of_the_text_and_of_the_copy(begin):
    model = begin(reads_vectors=True, codec_loss_weight=WEIGHT)
    given = batch(model)
    output, trip = model(**given), model.codec(given["pixel_values"])
    copied = F.mse_loss(trip.reconstruction, given["pixel_values"]) + trip.quantizer_loss
    torch.testing.assert_close(output.codec_loss, copied)
    torch.testing.assert_close(output.loss, output.text_loss + WEIGHT * copied)
    plain = model.eval()(**given)  # read as codes are: by lookup, without a copy
    assert plain.codec_loss is None
    torch.testing.assert_close(plain.loss, output.text_loss, atol=1e-5, rtol=1e-5)


def test_a_codec_comes_to_tell_apart_what_a_frozen_model_says_of_it(begin):
    model = begin(reads_vectors=True, codec_loss_weight=WEIGHT)
    given, learns = batch(model), [*model.codec.parameters()]
    optimizer, curve = torch.optim.AdamW(learns, lr=1e-2), []
    for _ in range(25):
        output = model(**given)
        output.loss.backward()
        optimizer.step()
        model.zero_grad()
        curve.append((output.text_loss.item(), output.codec_loss.item()))
    assert curve[-1][0] < 0.97 * curve[0][0]
    assert curve[-1][1] < 0.9 * curve[0][1]


def test_it_survives_a_reload_and_writes(begin, tmp_path):
    model = begin(reads_vectors=True, codec_loss_weight=WEIGHT).eval()
    model.save_pretrained(tmp_path)
    again = UniMMForConditionalGeneration.from_pretrained(tmp_path)
    given = batch(model)
    del given["labels"]
    torch.testing.assert_close(again(**given).logits, model(**given).logits)
    assert not again.codec.training
    assert again.train().codec.training
    ids = again.eval().generate(**given, max_new_tokens=3, do_sample=False)
    assert ids.shape == (2, 13)
    with pytest.raises(ValueError, match="a codec that learns from pictures"):
        load_model(str(tmp_path), None)  # as recipes do, whose rows hold codes
    with pytest.raises(ValueError, match="8 picture placeholders for 4 cells"):
        again.train()(**given | {"pixel_values": given["pixel_values"][:1], "labels": given["input_ids"]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"codec_loss_weight": 0.1}, "a codec learns by the vectors"),
        ({"reads_vectors": True, "codec_loss_weight": -1.0}, "codec_loss_weight is -1"),
    ],
)
def test_a_codec_that_nothing_teaches_is_refused(begin, options, said):
    with pytest.raises(ValueError, match=said):
        begin(**options)


def test_vectors_of_no_codec_or_of_several_slots_are_refused():
    with pytest.raises(ValueError, match="a codec_config of one codebook"):
        UniMMConfig(reads_vectors=True)


def test_what_a_codec_keeps_frozen_stays_so_where_it_learns(eyes, tokenizer):
    fields = eyes.config.to_dict()
    averaged = fields | {"quantizer": fields["quantizer"] | {"ema_decay": 0.9}}
    codec = VisualCodecModel(VisualCodecConfig.from_dict(averaged))
    options = {"reads_vectors": True, "codec_loss_weight": WEIGHT}
    model = UniMMForConditionalGeneration.from_backbones(random_llm(tokenizer), codec, tokenizer, **options)[0].train()
    assert not model.codec.quantizer.codebook.requires_grad
    assert all(weight.requires_grad for weight in model.codec.encoder.parameters())
