"""Training in stages: what goes on, what is held, and what an encoder is held near."""

import numpy as np
import pytest
import torch
from test_stages import SHAPES, TINY_CODEC, codec_recipe, write_recipe
from towers import write_tower

from unimm.codec import VisualCodecModel
from unimm.config import from_dict
from unimm.training.codec import CodecRecipe, CodecTask, train_codec
from unimm.training.continuing import continued, continued_fields
from unimm.training.pool import Pool
from unimm.training.recipe import train

AROUND = {
    "resampler": {"kind": "grid", "dim": 8},
    "quantizer": {"kind": "vq", "size": 16, "dim": 8, "project": False},
    "decoder": {"kind": "conv", "patch": 8, "channels": [8], "blocks": 1},
}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A saved codec."""
    return str(train(codec_recipe(tmp_path_factory.mktemp("first"), "first", steps=1)).model)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


def parts(codec, *names):
    """Weights of some sockets."""
    return {name: weight for name, weight in codec.state_dict().items() if name.partition(".")[0] in names}


def same(one, other):
    return one.keys() == other.keys() and all(weight.equal(other[name]) for name, weight in one.items())


def test_a_second_stage_learns_what_is_not_held(first, tmp_path):
    held = ["encoder", "resampler", "quantizer"]
    run = train(
        write_recipe(
            tmp_path / "second.yaml",
            task="codec",
            run={"name": "second", "directory": str(tmp_path)},
            data={"worlds": SHAPES, "pool_size": 8, "batch_size": 4},
            optimizer={"steps": 2, "warmup": 0},
            logging={"every": 1, "validate_every": 1, "save_every": 2},
            begin=first,
            held=held,
            bf16=False,
        )
    )
    before, after = (VisualCodecModel.from_pretrained(folder) for folder in (first, run.model))
    assert same(parts(before, *held), parts(after, *held))
    assert not same(parts(before, "decoder"), parts(after, "decoder"))
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    assert before.encode(pixels).ids.equal(after.encode(pixels).ids)


def test_a_changed_socket_begins_anew_and_the_others_do_not(first):
    saved = VisualCodecModel.from_pretrained(first)
    codec = continued(first, {"quantizer": {"kind": "gaussian"}, "encoder": {"blocks": 1}})
    assert same(parts(codec, "encoder", "resampler", "decoder"), parts(saved, "encoder", "resampler", "decoder"))
    assert codec.config.quantizer == {"kind": "gaussian"}
    assert codec.config.encoder == TINY_CODEC["encoder"]
    deeper = continued(first, {"decoder": {"blocks": 2}})
    assert not same(parts(deeper, "decoder"), parts(saved, "decoder"))
    assert same(parts(deeper, "encoder"), parts(saved, "encoder"))
    with pytest.raises(ValueError, match="do not fit resampler"):
        continued(first, {"encoder": {"channels": [16]}})
    assert continued_fields("", TINY_CODEC) == TINY_CODEC


def recipe_around(tower, tmp_path, **others):
    encoder = {"kind": "tower", "tower": tower, "layers": [2], "learns": True}
    fields = {
        "task": "codec",
        "run": {"name": "run", "directory": str(tmp_path)},
        "data": {"worlds": SHAPES, "batch_size": 2},
        "optimizer": {"steps": 2},
        "model": {"encoder": encoder, **AROUND},
        "pivot": 0.75,
    }
    return from_dict(CodecRecipe, fields | others)


def test_an_encoder_that_learns_is_held_near_what_it_was(tower, tmp_path):
    task = CodecTask(recipe_around(tower, tmp_path), Pool(np.full((4, 32, 32, 3), 200, np.uint8), {}))
    assert task.losses(task.model, 0, 0)["pivot"] == 0
    assert not any(weight.requires_grad for weight in task.pivot.encoder.parameters())
    weight = task.codec.encoder.tower.embeddings.patch_embeddings.projection.weight
    with torch.no_grad():
        weight.mul_(1.5)
    pivot = task.losses(task.model, 0, 0)["pivot"]
    assert pivot > 0
    pivot.backward()
    assert weight.grad.any()
    assert all(other.grad is None for other in parts_that_learn(task.codec, "resampler", "decoder"))


def parts_that_learn(codec, *names):
    return [weight for name in names for weight in getattr(codec, name).parameters()]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"held": ["encodr"]}, "Did you mean encoder"),
        ({"held": ["encoder", "resampler", "quantizer", "decoder"]}, "something must learn"),
        ({"held": ["encoder"]}, r"pivot is 0\.75"),
        ({"model": {**TINY_CODEC}}, "the encoder of kind 'conv'"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_a_picture_is_rendered(tower, tmp_path, others, said):
    with pytest.raises(ValueError, match=said):
        train_codec(recipe_around(tower, tmp_path, **others))
    assert not [*tmp_path.iterdir()]
