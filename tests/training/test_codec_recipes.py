"""Every small codec takes two steps; objectives pull the way they say, and a critic begins when it is told to."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from scripted_networks import TinyVgg, save_scripted
from towers import whole_model, write_text_tower, write_tower
from transformers import AutoModel

from unimm.codec import VisualCodecConfig, VisualCodecModel
from unimm.config import from_dict
from unimm.training.codec import CodecRecipe, CodecTask, LengthsConfig, last_weight, train_codec
from unimm.training.objectives import (
    CellFeatures,
    CriticConfig,
    FeatureConfig,
    FrozenFeatures,
    PerceptualConfig,
    PixelCritic,
    adaptive_weight,
    distillation_loss,
    perceptual_features,
    perceptual_loss,
)
from unimm.training.pool import Pool
from unimm.training.recipe import train

FOLDER = Path(__file__).parent.parent.parent / "recipes" / "codecs"
SMALL = [
    "data.worlds={shapes: 1.0}",
    "data.pool_size=4",
    "data.batch_size=2",
    "optimizer.steps=2",
    "logging.every=1",
    "logging.validate_every=5",
    "bf16=false",
]


@pytest.fixture(autouse=True)
def few_held_out_pictures(monkeypatch):
    monkeypatch.setattr("unimm.training.codec.HELD_OUT", 2)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_two_steps_of_every_recipe(name, tmp_path):
    deep = name in ("titok", "flextok", "flextok_flow", "qformer")
    depth = ["model.resampler.depth=1", "model.decoder.depth=1"] if deep else []
    start = ["critic.start=1"] if name == "grid_vq" else []
    directory = train(FOLDER / f"{name}.yaml", [*SMALL, *depth, *start, f"run.directory={tmp_path}"])
    metrics = [record for record in directory.metrics() if "loss" in record]
    assert len(metrics) == 2
    assert Image.open(directory.plots / "codes.png").height > 100
    codec = VisualCodecModel.from_pretrained(directory.model)
    codes = codec.encode(torch.zeros(1, 3, 128, 128))
    assert codec.pictures(codes).shape == (1, 3, 128, 128)
    assert ["velocity" in record for record in metrics] == [name == "flextok_flow"] * 2
    if name.startswith("flextok"):
        assert codec.encode(torch.zeros(1, 3, 128, 128), num_tokens=2).ids.equal(codes.ids[:, :2])
    if name == "grid_vq":
        assert ["critic" in record for record in metrics] == [False, True]
        assert metrics[0]["judged"] == 0 != metrics[1]["judged"]


def test_lengths_are_drawn_as_often_as_they_are_given_chances():
    rng = np.random.default_rng(0)
    lengths = LengthsConfig((1, 4, 8), (2.0, 0.0, 6.0), by_picture=True).drawn(rng, 4000)
    counts = torch.bincount(lengths, minlength=9) / 4000
    torch.testing.assert_close(counts[[1, 4, 8]].float(), torch.tensor([0.25, 0.0, 0.75]), atol=0.03, rtol=0)
    assert {LengthsConfig((1, 4)).drawn(rng, 2) for _ in range(30)} == {1, 4}
    assert LengthsConfig().drawn(rng, 2) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lengths.values=[1, 33]", "33 codes per picture; this codec makes and decodes 1 to 32"),
        ("lengths.chances=[1.0]", "give one of 0 or more for each"),
        ("lengths.values=[]", "chooses among lengths.values"),
        ("model.length.filled=false", "set length.filled: true"),
    ],
)
def test_lengths_that_a_codec_cannot_learn_are_refused_at_once(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        train(FOLDER / "flextok.yaml", [*SMALL, change, f"run.directory={tmp_path}"])
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_text_tower(whole_model("clip"), tmp_path_factory.mktemp("texts"))


def test_a_recipe_around_a_named_tower_runs_to_its_end(tower, tmp_path):
    encoder = f"model.encoder={{kind: tower, tower: {tower}, layers: [1]}}"
    decoder = "model.decoder={kind: conv, patch: 8, channels: [16], blocks: 1}"
    changes = [*SMALL, encoder, decoder, "model.image_size=32", f"run.directory={tmp_path}"]
    codec = VisualCodecModel.from_pretrained(train(FOLDER / "grid_vq.yaml", changes).model)
    assert codec.config.encoder["tower"]["model_type"] == "vit"
    assert codec.encode(codec.from_shown(torch.zeros(1, 3, 32, 32))).grid == [(4, 4)]


@pytest.mark.parametrize("squared", [0.0, 1.0])
def test_a_recipe_within_a_named_vae_learns_its_latents_or_pixels_through_it(squared, tmp_path):
    torch.manual_seed(0)
    stages = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **stages)
    vae.save_pretrained(tmp_path / "vae")
    changes = [*SMALL, f"model.vae={tmp_path / 'vae'}", "model.image_size=32", f"run.directory={tmp_path}"]
    changes += ["model.encoder.latent_channels=4", "model.encoder.patch=2", "model.decoder.latent_channels=4"]
    changes += ["model.decoder.rows=8", "model.decoder.columns=8", "model.decoder.patch=2", f"loss.squared={squared}"]
    run = train(FOLDER / "flextok_flow.yaml", changes)
    codec = VisualCodecModel.from_pretrained(run.model)
    assert str(tmp_path) not in codec.config.to_json_string()
    assert all(weight.equal(vae.state_dict()[name]) for name, weight in codec.vae.autoencoder.state_dict().items())
    codes = codec.encode(torch.zeros(1, 3, 32, 32))
    assert codec.pictures(codes).shape == (1, 3, 32, 32)
    assert ["squared" in record for record in run.metrics() if "loss" in record] == [squared > 0] * 2


def pixels(seed=0):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_perceptual_loss_is_nothing_for_the_picture_itself_and_reaches_pixels(tower):
    features = FrozenFeatures(FeatureConfig(tower, layers=(1, -1)))
    drawn = pixels(1).requires_grad_()
    assert perceptual_loss(features, pixels(), pixels()) == pytest.approx(0, abs=1e-9)
    loss = perceptual_loss(features, drawn, pixels())
    loss.backward()
    assert loss > 0
    assert drawn.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in features.model.parameters())


def test_a_perceptual_loss_is_lpips_where_its_file_is_given(tower, tmp_path):
    vgg = str(save_scripted(TinyVgg(), tmp_path / "vgg16.pt"))
    features = perceptual_features(PerceptualConfig(lpips=vgg))
    assert perceptual_loss(features, pixels(), pixels()) == 0
    conv = torch.jit.load(vgg).conv
    one, other = (conv((pixels(seed) + 1) / 2).flatten(1) for seed in (0, 1))
    by_hand = (one - other).square().sum(dim=1).mean()
    assert perceptual_loss(features, pixels(), pixels(1)) == pytest.approx(float(by_hand.detach()), rel=1e-4)
    with pytest.raises(ValueError, match="name one of them"):
        PerceptualConfig(model=tower, lpips=vgg)
    assert perceptual_features(PerceptualConfig()) is None


def test_the_gradient_of_lpips_reaches_the_codec_and_not_the_file(tower, texts, tmp_path):
    _, recipe = everything(tower, texts, tmp_path, "lpips", 1)
    vgg = str(save_scripted(TinyVgg(), tmp_path / "vgg16.pt"))
    recipe |= {
        "perceptual": {"lpips": vgg},
        "critic": {},
        "contrast": {},
        "loss": {"squared": 0.0, "absolute": 0.0, "edges": 0.0},
    }
    task = CodecTask(from_dict(CodecRecipe, recipe), Pool(np.full((2, 32, 32, 3), 200, np.uint8), {}))
    losses = task.losses(task.model, 0, 0)
    losses["perceptual"].backward()
    assert losses["perceptual"] > 0
    assert last_weight(task.codec.decoder).grad.abs().sum() > 0
    assert next(task.codec.encoder.parameters()).grad.abs().sum() > 0
    weights = [*task.perceptual.lpips.network.network.parameters()]
    assert len(weights) == 2
    assert all(weight.grad is None for weight in weights)


def test_a_distillation_is_done_where_features_are_the_towers_own(tower):
    features = CellFeatures(FeatureConfig(tower))
    own = AutoModel.from_pretrained(tower)(pixel_values=pixels()).last_hidden_state[:, 1:]
    last = features.features.model(pixel_values=pixels(), output_hidden_states=True).hidden_states[-1][:, 1:]
    assert distillation_loss(features, 3 * last, pixels()) == pytest.approx(0, abs=1e-5)
    assert distillation_loss(features, -last, pixels()) == pytest.approx(2, abs=1e-5)
    assert own.shape == last.shape
    with pytest.raises(ValueError, match="make the decoder's width"):
        distillation_loss(features, last[..., :8], pixels())


def test_an_adaptive_weight_makes_two_gradients_equally_long():
    last = torch.randn(4, requires_grad=True)
    others, fooled = (last * 30).sum(), last.square().sum()
    weight = adaptive_weight(others, fooled, last)
    assert not weight.requires_grad
    lengths = [torch.autograd.grad(loss, last)[0].norm() for loss in (others, weight * (last.square().sum()))]
    assert lengths[0] == pytest.approx(float(lengths[1]), rel=1e-3)


def test_a_critic_waits_and_then_learns_to_tell():
    torch.manual_seed(0)
    critic = PixelCritic(CriticConfig(weight=1.0, start=3, channels=8, layers=2, adaptive=False))
    layer = torch.nn.Conv2d(3, 3, 1)
    drawn = layer(pixels(1)) * 0.1
    assert critic.judgement(drawn, pixels(), drawn.mean(), layer.weight, 2) == 0
    assert critic.losses(critic.network, 2) is None
    optimizer = torch.optim.Adam(critic.network.parameters(), lr=1e-3)
    critic.judgement(drawn, pixels(), drawn.mean(), layer.weight, 3).backward()
    assert layer.weight.grad.abs().sum() > 0
    told = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = critic.losses(critic.network, 3)["critic"]
        loss.backward()
        optimizer.step()
        told.append(float(loss))
    assert told[-1] < told[0] - 0.1


def everything(tower, texts, tmp_path, name, steps):
    """A recipe with every objective, over a codec that draws and means."""
    grid = {"channels": [32, 32, 32, 32], "blocks": 1, "code_channels": 8}
    features = {"dim": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24, "table_side": 4}
    path = tmp_path / f"{name}.yaml"
    recipe = {
        "task": "codec",
        "run": {"name": name, "directory": str(tmp_path)},
        "data": {"worlds": {"shapes": 1.0}, "pool_size": 4, "batch_size": 2},
        "model": {
            "image_size": 32,
            "pixel_range": [0.0, 1.0],
            "encoder": {"kind": "pyramid", **grid, "stem_channels": 32},
            "resampler": {"kind": "grid", "dim": 16, "norm": False, "project_back": False},
            "quantizer": {"kind": "product", "sizes": [8, 8], "dim": 8, "project": False},
            "decoder": {"kind": "dual", "pixel_dim": 8, "pixels": grid, "features": features},
        },
        "perceptual": {"model": tower, "weight": 0.5},
        "distill": {"model": tower},
        "align": {"pixels": {"model": tower, "slot": 0}, "meaning": {"model": tower, "slot": 1, "weight": 0.3}},
        "disentangle": 0.1,
        "contrast": {"model": texts, "weight": 0.1},
        "critic": {"weight": 0.1, "channels": 8, "layers": 2},
        "optimizer": {"steps": 4, "warmup": 1},
        "logging": {"every": 1, "validate_every": 10, "save_every": 2},
        "bf16": False,
    }
    path.write_text(yaml.safe_dump(recipe))
    return path, recipe


def test_all_objectives_together_go_on_on_the_same_curve(tower, texts, tmp_path, monkeypatch):
    path, recipe = everything(tower, texts, tmp_path, "whole", 4)
    whole = {record["step"]: record for record in train(path).metrics() if "loss" in record}
    taught = {"align_pixels", "align_meaning", "disentangle", "contrast"}
    assert {"perceptual", "distill", "judged", "critic"} | taught <= whole[1].keys()
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert saved.keys() == VisualCodecModel(VisualCodecConfig(**recipe["model"])).state_dict().keys()  # no heads
    path, _ = everything(tower, texts, tmp_path, "killed", 4)
    losses, done = CodecTask.losses, []

    def killed(task, model, step, rank):
        if step == 2 and not done:
            done.append(step)
            raise KeyboardInterrupt
        return losses(task, model, step, rank)

    monkeypatch.setattr(CodecTask, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        train(path)
    again = {record["step"]: record for record in train(path).metrics() if "loss" in record}
    for step in whole:
        assert again[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5)
        for name in ("critic", *taught):
            assert again[step][name] == pytest.approx(whole[step][name], rel=1e-5), name
    task = CodecTask(from_dict(CodecRecipe, recipe), Pool(np.zeros((0, 32, 32, 3), np.uint8), {}))
    assert last_weight(task.codec.decoder) is task.codec.decoder.pixels.out.weight


def test_a_codec_without_features_cannot_be_distilled(tower, texts, tmp_path):
    _, recipe = everything(tower, texts, tmp_path, "plain", 1)
    recipe["model"] = {"image_size": 32, "encoder": {"kind": "conv"}, "decoder": {"kind": "conv"}}
    with pytest.raises(ValueError, match="decoder of kind 'dual'"):
        train_codec(from_dict(CodecRecipe, recipe))
    assert not list(tmp_path.glob("plain/*"))  # before a picture is rendered
