"""Codes to pictures: shapes, reload, independence of the batch, guidance, errors."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from unimm.codec import VisualCodecConfig, VisualCodecModel
from unimm.codes import VisualCodes
from unimm.detokenizer import CodesToImagePipeline, CodesToImageTransformer2DModel
from unimm.training.detokenizer import DetokenizerRecipe, begin_transformer
from unimm.training.optimizer import OptimizerConfig
from unimm.training.pool import PoolConfig
from unimm.training.run_directory import RunConfig

SIZES = {"sample_size": 16, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "codebook_sizes": (32, 8)}
SIZES |= {"sketch_channels": (16, 8)}
CODEC = {
    "image_size": 16,
    "encoder": {"kind": "conv", "patch": 8, "channels": [16], "blocks": 1},
    "resampler": {"kind": "grid", "dim": 16, "groups": 2},
    "quantizer": {"kind": "product", "sizes": [32, 8], "dim": 4},
}


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    transformer = CodesToImageTransformer2DModel(**SIZES, code_dim=8, code_grid=2).eval()
    torch.nn.init.normal_(transformer.patches_out.conv.weight, std=0.1)
    pipeline = CodesToImagePipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def some_codes(batch=3, side=2):
    ids = torch.randint(8, (batch, side, side, 2), generator=torch.Generator().manual_seed(0))
    return VisualCodes.from_grid(ids)


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_pictures_are_drawn(pipeline, steps, guidance_scale):
    codes = some_codes()
    images = pipeline(codes, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="np").images
    assert images.shape == (3, 16, 16, 3)
    assert np.isfinite(images).all()
    assert pipeline(codes, num_inference_steps=steps).images[0].size == (16, 16)


def test_pipeline_reloads(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = CodesToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    first, second = (
        each(some_codes(), generator=torch.Generator().manual_seed(1), output_type="pt").images
        for each in (pipeline, again)
    )
    assert first.equal(second)


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    codes = some_codes()
    together = pipeline(codes, generator=seeds(5, 6, 7), output_type="pt").images
    alone = pipeline(codes.select(slice(1, 2)), generator=seeds(6), output_type="pt").images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_codes_matter_unless_dropped(pipeline):
    noisy, timestep = torch.randn(1, 3, 16, 16), torch.tensor([700.0])
    one, other = torch.zeros(1, 4, 2, dtype=torch.int64), torch.ones(1, 4, 2, dtype=torch.int64)
    drop = torch.tensor([True])
    with torch.no_grad():
        kept = [pipeline.transformer(noisy, timestep, codes).sample for codes in (one, other)]
        dropped = [pipeline.transformer(noisy, timestep, codes, drop).sample for codes in (one, other)]
    assert not kept[0].allclose(kept[1])
    assert dropped[0].equal(dropped[1])


def test_one_step_ends_on_the_predicted_picture(pipeline):
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ids = some_codes(1).ids
        clean = noise - pipeline.transformer(noise, torch.tensor([1000.0]), ids).sample
    image = pipeline(some_codes(1), num_inference_steps=1, generator=seeds(3), output_type="pt").images
    torch.testing.assert_close(image, (clean / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (VisualCodes.from_grid(torch.full((1, 2, 2, 2), 8)), {}, "ids 0 to 7"),
        (some_codes(side=3), {}, "2 x 2 codes"),
        (VisualCodes.from_grid(torch.zeros(1, 2, 2, 1, dtype=torch.int64)), {}, "B, N, 2"),
        (some_codes(), {"num_inference_steps": 0}, "at least 1"),
        (some_codes(), {"generator": seeds(1)}, "1 generators for 3"),
        (some_codes(), {"output_type": "jpg"}, "one of pil, np, pt"),
    ],
)
def test_wrong_inputs_are_refused(pipeline, codes, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(codes, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "patch_size"),
        ({"width": 18}, "multiple of 4"),
        ({"sketch_channels": (8,) * 5}, "name fewer"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CodesToImageTransformer2DModel(**(SIZES | change), code_grid=2)


def test_every_weight_learns():
    transformer = CodesToImageTransformer2DModel(**SIZES, code_dim=8, code_grid=2)
    torch.nn.init.normal_(transformer.patches_out.conv.weight)
    transformer(torch.randn(1, 3, 16, 16), torch.tensor([500.0]), some_codes(1).ids).sample.sum().backward()
    for name, weight in transformer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name


def untrained(decoder, **fields):
    torch.manual_seed(0)
    codec = VisualCodecModel(VisualCodecConfig(**CODEC, **fields, decoder=decoder)).eval()
    sizes = {"patch_size": 4, "width": 16, "depth": 1, "num_heads": 2}
    recipe = DetokenizerRecipe(
        "detokenizer", RunConfig("run"), PoolConfig({"shapes": 1.0}), OptimizerConfig(steps=1), codec="", model=sizes
    )
    return codec, begin_transformer(recipe, codec)


@pytest.mark.parametrize("channels", [[24], [16, 8]])
@pytest.mark.parametrize("sigma", [1.0, 0.1])
def test_untrained_it_predicts_the_codecs_own_decoding(channels, sigma):
    codec, transformer = untrained({"kind": "conv", "patch": 8 // len(channels), "channels": channels, "blocks": 1})
    codes = codec.encode(torch.rand(3, 3, 16, 16) * 2 - 1)
    noisy = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        clean = noisy - sigma * transformer(noisy, torch.full((3,), 1000 * sigma), codes.ids).sample
    torch.testing.assert_close(clean, codec.decode(codes), atol=1e-5, rtol=0)


def test_a_sketch_learns_unless_it_is_the_codecs():
    _, held = untrained({"kind": "conv", "patch": 8, "channels": [24], "blocks": 1})
    _, learning = untrained({"kind": "vit", "patch": 8, "width": 16, "depth": 1, "num_heads": 2})
    _, ranged = untrained({"kind": "conv", "patch": 8, "channels": [24], "blocks": 1}, pixel_range=(0.0, 1.0))
    names = {name for name, weight in held.named_parameters() if not weight.requires_grad}
    assert {name.split(".")[0] for name in names} == {"code_embeddings", "sketch_in", "sketch"}
    assert all(weight.requires_grad for other in (learning, ranged) for weight in other.parameters())
