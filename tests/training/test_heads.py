"""Heads beside a codec: what they read, what they teach, and what is refused before a picture is rendered."""

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from towers import CAPTIONS, whole_model, write_text_tower, write_tower
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    SiglipTextModel,
    ViTImageProcessorPil,
)

from unimm.codec import VisualCodecConfig, VisualCodecModel
from unimm.config import from_dict, to_dict
from unimm.training.codec import CodecRecipe, CodecTask, check_objectives, train_codec
from unimm.training.contrast import CaptionEmbeddings, ContrastConfig, ContrastHead, TextTower
from unimm.training.heads import AlignmentConfig, AlignmentHead, count_vectors, disentangling_loss, noised
from unimm.training.objectives import CellFeatures, FeatureConfig, FrozenFeatures
from unimm.training.pool import Pool, PoolConfig, prepare_pool
from unimm.training.run_directory import RunConfig, RunDirectory

PYRAMID = {"channels": [32, 32, 32, 32], "blocks": 1, "code_channels": 32}
BRANCHES = {
    "image_size": 32,
    "encoder": PYRAMID | {"kind": "branches", "stem_channels": 32, "rows": 4, "columns": 4, "depth": 1, "num_heads": 2},
    "resampler": {"kind": "grid", "dim": 16, "groups": 2, "norm": False},
    "quantizer": {
        "kind": "product",
        "sizes": [32, 32],
        "dim": 8,
        "project": False,
        "estimator": "weighed",
        "metric": "dot",
    },
    "decoder": PYRAMID | {"kind": "pyramid"},
}
GRID = {
    "image_size": 32,
    "encoder": {"kind": "conv", "patch": 8, "channels": [16], "blocks": 1},
    "resampler": {"kind": "grid", "dim": 8},
    "quantizer": {"kind": "vq", "size": 32, "dim": 8, "project": False},
    "decoder": {"kind": "conv", "patch": 8, "channels": [16], "blocks": 1},
}
SEQUENCE = {
    "image_size": 32,
    "encoder": {"kind": "patches", "patch": 8, "width": 32},
    "resampler": {"kind": "latent", "tokens": 8, "rows": 4, "columns": 4, "dim": 8, "depth": 1, "num_heads": 2},
    "quantizer": {"kind": "vq", "size": 32, "dim": 8, "project": False},
    "length": {"kind": "sequence", "tokens": 8, "rows": 4, "columns": 4, "prefixes": True},
    "decoder": {
        "kind": "mask_vit",
        "dim": 8,
        "tokens": 8,
        "rows": 4,
        "columns": 4,
        "patch": 8,
        "width": 32,
        "depth": 1,
        "num_heads": 2,
    },
}


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_text_tower(whole_model("clip"), tmp_path_factory.mktemp("clip"), sees=True)


def pixels(number=2):
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def head_of(model, tower, **options):
    torch.manual_seed(0)
    codec = VisualCodecModel(VisualCodecConfig(**model))
    features = CellFeatures(FeatureConfig(tower))
    head = AlignmentHead(AlignmentConfig(tower, **options), codec, count_vectors(codec), features)
    return codec, head, features(pixels())


@pytest.mark.parametrize("slot", [0, 1])
def test_a_branch_learns_from_its_own_teacher_alone(tower, slot):
    codec, head, wanted = head_of(BRANCHES, tower, slot=slot)
    head(codec(pixels()).vectors, wanted).backward()
    for number, branch in enumerate(codec.encoder.branches):
        taught = [weight.grad is not None and bool(weight.grad.any()) for weight in branch.out.parameters()]
        assert taught == [number == slot] * len(taught)
    assert codec.encoder.trunk.stem.weight.grad.any()
    codec.zero_grad()
    disentangling_loss(codec(pixels()).vectors, 2).backward()
    assert all(branch.out.weight.grad.any() for branch in codec.encoder.branches)


def test_noise_hides_more_of_wider_vectors_and_a_reader_still_teaches(tower):
    torch.manual_seed(0)
    ones = torch.ones(2000, 4, 4)
    shares = {}
    for width in (4, 4096):  # shifts of 1/16 and of 2
        vectors = ones[..., :1].expand(-1, -1, width)
        shares[width] = 1 - noised(vectors[: 200 if width > 4 else 2000]).mean(dim=(1, 2))  # of noise, about
    times = torch.rand(100_000)
    for width, kept in shares.items():
        shift = (4 * width / 4096) ** 0.5
        wanted = (shift * times / (1 + (shift - 1) * times)).mean()
        assert kept.mean().item() == pytest.approx(wanted.item(), abs=0.05)
    codec, head, wanted = head_of(GRID, tower, noised=True)
    vectors = codec(pixels()).vectors
    assert head(vectors, wanted) != head(vectors, wanted)  # noise is drawn anew
    head(vectors, wanted).backward()
    assert codec.encoder.layers[0].conv.weight.grad.any()


def of_two_signs(number, seed):
    """Vectors `[number, 16, 8]` with the same two signs in all cells of a picture, under noise, and features that only
    the product of both tells.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (number, 1, 2), generator=generator) * 2.0 - 1
    vectors = torch.randn(number, 16, 8, generator=generator)
    vectors[..., :2] += signs
    wanted = torch.zeros(number, 16, 16)
    wanted[..., 0] = signs.prod(dim=-1)
    return vectors, wanted


def test_a_mapper_reads_what_no_linear_map_and_no_cell_alone_tells(tower):
    vectors, wanted = of_two_signs(512, 1)
    others, told = of_two_signs(512, 2)
    linear = torch.linalg.lstsq(vectors.flatten(1), wanted[:, 0, 0]).solution
    assert 1 - ((others.flatten(1) @ linear).sign() * told[:, 0, 0]).mean() > 0.8
    losses = {}
    for mapper in (0, 1):
        _, head, _ = head_of(GRID, tower, mapper=mapper)
        optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
        for step in range(120):
            loss = head(*of_two_signs(64, 100 + step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses[mapper] = head(others, told).item()
    assert losses[1] < 0.25 < 0.4 < losses[0]


@pytest.mark.parametrize(
    ("model", "mapper"), [(GRID | {"quantizer": {"kind": "gaussian"}}, 2), (GRID, 1), (SEQUENCE, 0), (SEQUENCE, 1)]
)
def test_features_teach_the_encoder_through_every_head(tower, model, mapper):
    codec, head, wanted = head_of(model, tower, mapper=mapper)
    head(codec(pixels()).vectors, wanted).backward()
    assert all(weight.grad.any() for weight in codec.encoder.parameters())
    assert not mapper or all(weight.grad.any() for weight in head.mapper.blocks.parameters())


def test_branches_are_apart_where_they_are_orthogonal():
    one, other = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert disentangling_loss(torch.cat([one, other], dim=-1)[None], 2) == 0
    assert disentangling_loss(torch.cat([one, -2 * one], dim=-1)[None], 2) == 1
    assert disentangling_loss(torch.cat([one, one, other], dim=-1)[None], 3) == pytest.approx(1 / 3)


@pytest.mark.parametrize("model", [BRANCHES, GRID, SEQUENCE])
def test_a_head_reads_the_features_of_every_cell(tower, model):
    codec, head, wanted = head_of(model, tower)
    read = head.layers(head.cells(codec(pixels()).vectors))
    assert read.shape == wanted.shape == (2, 16, 16)
    assert head(codec(pixels()).vectors, wanted).requires_grad


def test_a_grid_of_another_size_is_resized(tower):
    _, head, _ = head_of(GRID, tower)
    places = torch.arange(8.0).expand(8, 8).flatten()[None, :, None]
    assert head.cells(places).reshape(4, 4)[0].tolist() == pytest.approx([0.63, 2.5, 4.5, 6.37], abs=0.1)


def test_prefixes_are_read_alone_and_by_their_shares(tower):
    codec, head, wanted = head_of(SEQUENCE, tower, prefixes={1: 3.0, 4: 1.0})
    vectors = codec(pixels(), num_tokens=2).vectors.detach().requires_grad_()
    assert vectors.shape == (2, 8, 8)
    loss = head(vectors, wanted)
    loss.backward()
    assert vectors.grad[:, :4].abs().sum(dim=(0, 2)).gt(0).all()
    assert not vectors.grad[:, 4:].any()
    alone = []
    for prefix in (1, 4):
        head.prefixes = {prefix: 1.0}
        alone.append(head(vectors, wanted).item())
    assert loss.item() == pytest.approx((3 * alone[0] + alone[1]) / 4)


def test_pictures_of_one_caption_belong_to_each_other():
    head = ContrastHead(2, 2, batch_size=3)
    assert head.bias.item() == pytest.approx(-np.log(3))
    head.project.weight.data, head.project.bias.data = torch.eye(2), torch.zeros(2)
    head.scale.data, head.bias.data = torch.tensor(3.0), torch.tensor(-10.0)
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    right = head(texts[:, None].repeat(1, 4, 1), texts)
    wrong = head(texts[[0, 2, 1], None], texts)
    assert right < 1e-3 < 10 < wrong


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_lie_where_the_whole_model_puts_them(kind, tmp_path):
    model = whole_model(kind)
    folder = write_text_tower(model, tmp_path / "whole")
    tower = TextTower(folder)
    padding = "max_length" if kind == "siglip" else "longest"
    inputs = tower.tokenizer(CAPTIONS, padding=padding, max_length=12, return_tensors="pt")
    with torch.no_grad():
        own = model.get_text_features(input_ids=inputs["input_ids"]).pooler_output
    wanted = torch.nn.functional.normalize(own, dim=-1)
    torch.testing.assert_close(tower(CAPTIONS), wanted)
    halves = [SiglipTextModel] if kind == "siglip" else [CLIPTextModelWithProjection, CLIPTextModel]
    for half in halves:
        part = half.from_pretrained(
            folder, config=half.config_class(**model.config.text_config.to_dict() | {"projection_dim": 12})
        )
        alone = write_text_tower(part, tmp_path / half.__name__)
        found = TextTower(alone)(CAPTIONS)
        assert found.shape == (3, 16 if half is not CLIPTextModelWithProjection else 12)
        if half is not CLIPTextModel:
            torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(tower(CAPTIONS[:1]), wanted[:1])  # whatever they are padded to


def test_captions_are_embedded_once(clip, tmp_path):
    words = [CAPTIONS[0], CAPTIONS[2], CAPTIONS[0]]
    first = CaptionEmbeddings(ContrastConfig(clip), words, tmp_path / "captions.npy")
    again = CaptionEmbeddings(ContrastConfig("nowhere"), words, tmp_path / "captions.npy")
    picked = np.array([0, 1, 2])
    assert first.rows.shape == (2, 12) == (2, again.width)
    assert first[picked].equal(again[picked])
    assert first[picked][0].equal(first[picked][2])
    torch.testing.assert_close(first[picked], TextTower(clip)(words))


def test_frozen_features_are_those_of_the_models_own_pixels(clip, tmp_path):
    """The part of CLIP that sees, of pixels normalised by its image processor."""
    features = FrozenFeatures(FeatureConfig(clip))
    picture = PILImage.fromarray(((pixels(1)[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    shown = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    own = CLIPImageProcessorPil.from_pretrained(clip)(picture, return_tensors="pt")["pixel_values"]
    states = whole_model("clip").vision_model(own, output_hidden_states=True).hidden_states[-1]
    wanted = torch.nn.functional.normalize(states, dim=-1)
    torch.testing.assert_close(features(shown)[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(CellFeatures(FeatureConfig(clip))(shown), wanted[:, 1:], atol=1e-4, rtol=1e-4)


def test_a_model_of_another_form_or_without_its_processor_teaches_nothing(tmp_path):
    ConvNextModel(ConvNextConfig(image_size=32, hidden_sizes=[8] * 4, depths=[1] * 4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image processor"):
        FrozenFeatures(FeatureConfig(str(tmp_path)))
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="over square patches"):
        CellFeatures(FeatureConfig(str(tmp_path)))
    objectives = {
        "of model_type 'convnext'; take one of clip": {"contrast": {"model": str(tmp_path)}},
        "over square patches": {"align": {"x": {"model": str(tmp_path)}}},
    }
    for said, objective in objectives.items():
        with pytest.raises(ValueError, match=said):
            train_codec(from_dict(CodecRecipe, recipe_of(tmp_path, "run", GRID, **objective)))
    assert not (tmp_path / "run").exists()


def recipe_of(folder, name, model, **objectives):
    return {
        "task": "codec",
        "run": {"name": name, "directory": str(folder)},
        "data": {"worlds": {"shapes": 1.0}, "pool_size": 4, "batch_size": 4},
        "model": model,
        "optimizer": {"steps": 40, "warmup": 4, "lr": 3e-3},
        "logging": {"every": 1, "validate_every": 100, "save_every": 100},
        "bf16": False,
        **objectives,
    }


@pytest.mark.parametrize(
    ("model", "align", "others"),
    [
        (BRANCHES, {"one": {"slot": 0}, "other": {"slot": 1, "layers": [1]}}, {"disentangle": 0.5}),
        (GRID, {"all": {}}, {"contrast": {"model": "clip"}}),
        (SEQUENCE, {"first": {"prefixes": {1: 1.0, 4: 0.5}}}, {"lengths": {"values": [2, 8]}}),
        (GRID | {"quantizer": {"kind": "gaussian"}}, {"noisy": {"noised": True}}, {}),
        (GRID | {"quantizer": {"kind": "gaussian"}}, {"mapped": {"mapper": 1}}, {}),
    ],
    ids=["branches", "grid", "sequence", "noised", "mapped"],
)
def test_what_is_taught_is_learned(tower, clip, tmp_path, model, align, others):
    """Each objective falls on four pictures."""
    if "contrast" in others:
        others = {"contrast": {"model": clip, "weight": 0.3}}
    align = {name: {"model": tower, "weight": 1.0, **options} for name, options in align.items()}
    recipe = from_dict(CodecRecipe, recipe_of(tmp_path, "run", model, align=align, **others))
    shown = ((pixels(4).permute(0, 2, 3, 1) + 1) * 127.5).byte().numpy()
    torch.manual_seed(0)
    task = CodecTask(recipe, Pool(shown, {}, [*CAPTIONS, CAPTIONS[0]]))
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    curves = []
    for step in range(20):
        losses = task.losses(task.model, step, 0)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        curves.append({name: loss.item() for name, loss in losses.items()})
    for name in [f"align_{name}" for name in align] + [name for name in others if name != "lengths"]:
        first, last = (np.mean([losses[name] for losses in part]) for part in (curves[:4], curves[-4:]))
        assert last < 0.95 * first, name


@pytest.mark.parametrize(
    ("model", "objective", "said"),
    [
        (GRID, {"align": {"x": {"model": "m", "slot": 0}}}, "kind 'vq' has no branches"),
        (BRANCHES, {"align": {"x": {"model": "m", "slot": 2}}}, "branches 0 to 1"),
        (GRID, {"disentangle": 0.1}, "disentangle is 0.1, and a quantizer of kind 'vq'"),
        (GRID, {"align": {"x": {"model": "m", "prefixes": {4: 1.0}}}}, "one length only"),
        (SEQUENCE, {"align": {"x": {"model": "m", "prefixes": {9: 1.0}}}}, "name 9 codes; this codec has 1 to 8"),
        (SEQUENCE, {"align": {"x": {"model": "m", "prefixes": {2: 0.0}}}}, "share above 0"),
        (SEQUENCE, {"align": {"x": {"model": "m", "prefixes": {"2": 1.0}}}}, "a key must be int, it is '2'"),
        (GRID, {"align": {"x": {"model": "m", "mapper": -1}}}, "mapper is -1"),
        (GRID, {"align": {"x": {}}}, "align.NAME.model=PATH"),
        (GRID, {"align": {"x": {"model": "m", "slots": 1}}}, "Did you mean 'slot'|unknown key 'slots'"),
        (GRID, {"contrast": {"model": "m"}, "data": {"source": "photographs"}}, "data.text"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_a_picture_is_made(tmp_path, model, objective, said):
    with pytest.raises(ValueError, match=said):
        train_codec(from_dict(CodecRecipe, recipe_of(tmp_path, "run", model) | objective))
    assert not (tmp_path / "run").exists()


def test_codes_of_no_fixed_number_have_no_heads(tmp_path):
    kept = {
        "image_size": 32,
        "encoder": {"kind": "vit", "patch": 8, "width": 16, "depth": 1, "num_heads": 2},
        "resampler": {"kind": "select"},
        "length": {"kind": "kept", "rows": 4, "columns": 4},
    }
    for objective in ({"contrast": {"model": "m"}}, {"align": {"x": {"model": "m"}}}):
        recipe = from_dict(CodecRecipe, recipe_of(tmp_path, "run", {}, **objective))
        with pytest.raises(ValueError, match="equally many codes"):
            check_objectives(recipe, VisualCodecConfig(**kept))


def test_a_recipe_of_named_alignments_reads_back():
    align = {"a": {"model": "m", "slot": 1}, "b": {"model": "n", "prefixes": {1: 2.0}}}
    recipe = from_dict(CodecRecipe, recipe_of("runs", "run", BRANCHES, align=align))
    assert recipe.align["b"].prefixes == {1: 2.0}
    assert from_dict(CodecRecipe, yaml.safe_load(yaml.safe_dump(to_dict(recipe)))) == recipe


def test_captions_lie_beside_the_pictures_of_worlds_and_sources(tmp_path):
    config = VisualCodecConfig(**GRID)
    directory = RunDirectory(RunConfig("worlds", str(tmp_path)))
    pool = prepare_pool(PoolConfig(worlds={"shapes": 1.0}, pool_size=3), config, directory, seed=0, held_out=1)
    assert len(pool.captions) == 3
    assert json.loads((directory.root / "captions.json").read_text()) == pool.captions
    rows = [
        {"image": PILImage.new("RGB", (40, 40), (number,) * 3), "words": {"short": caption}}
        for number, caption in enumerate(["none", "", "two", None, "four", "five"])
    ]
    features = Features({"image": Image(), "words": {"short": Value("string")}})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    data = PoolConfig(source=str(tmp_path / "rows.parquet"), text="words.short", pool_size=3)
    pool = prepare_pool(data, config, RunDirectory(RunConfig("source", str(tmp_path))), seed=0, held_out=1)
    assert pool.captions == ["none", "two", "four"]
    assert [int(picture[0, 0, 0]) for picture in pool.pictures] == [0, 2, 4]
    data = PoolConfig(source=str(tmp_path / "rows.parquet"), text="text", pool_size=3)
    with pytest.raises(ValueError, match="no column 'text' for --text"):
        prepare_pool(data, config, RunDirectory(RunConfig("other", str(tmp_path))), seed=0, held_out=1)
