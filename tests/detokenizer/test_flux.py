"""X-Omni's FLUX detokenizer against outputs of its reference, through the stock transformer."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file

from unimm.detokenizer import FeatureCondition, FeaturesToFluxPipeline

GOLDEN = Path(__file__).parent.parent / "golden" / "xomni_flux"
EXACT = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def pipeline():
    fields, weights = json.loads((GOLDEN / "config.json").read_text()), load_file(GOLDEN / "weights.safetensors")
    projection = weights.pop("siglip_embed.weight")
    transformer = FluxTransformer2DModel(
        **{name: value for name, value in fields["args"].items() if name != "siglip_channels"}
    )
    transformer.load_state_dict(weights)
    condition = FeatureCondition(*reversed(projection.shape))
    condition.project.weight.data = projection
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**fields["scheduler"])
    pipeline = FeaturesToFluxPipeline(
        scheduler, vae.eval(), None, None, None, None, transformer.eval(), condition.eval()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompts(expected):
    return [(expected[f"{kind}prompt_embeds"], expected[f"{kind}pooled_prompt_embeds"]) for kind in ("", "negative_")]


@torch.no_grad()
def test_velocities_equal_the_reference(pipeline, expected):
    names = ("prompt_embeds", "pooled_prompt_embeds", "txt_ids", "img_ids", "guidance")
    rest = [expected[name] for name in names]
    condition = pipeline.condition(expected["siglip_tensor"])
    latents, timestep = expected["packed_latents"], expected["timestep"]
    velocity = pipeline.predict_velocity(latents, timestep, condition, *rest)
    torch.testing.assert_close(velocity, expected["velocity"], **EXACT)
    bare = pipeline.predict_velocity(latents, timestep, torch.zeros_like(condition), *rest)
    torch.testing.assert_close(bare, expected["velocity_without_siglip"], **EXACT)
    assert not torch.allclose(bare, velocity, atol=1e-2)


@torch.no_grad()
def test_guided_sampling_equals_the_reference(pipeline, expected):
    call = json.loads((GOLDEN / "config.json").read_text())["pipeline_call"]
    grid = tuple(call["latent_grid"])
    options = {"prompts": prompts(expected), "num_inference_steps": call["num_inference_steps"]}
    start, features = expected["packed_latents"], expected["siglip_tensor"]
    latents = pipeline.denoise(start, features, grid, guidance_scale=call["true_cfg_scale"], **options)
    torch.testing.assert_close(latents, expected["sampled_packed_latents"], **EXACT)
    torch.testing.assert_close(pipeline.scheduler.sigmas, expected["scheduler_sigmas"], atol=1e-6, rtol=0)
    one, other = (
        pipeline.denoise(start, features, grid, guidance_scale=scale, **options) for scale in (1.0, 1.0 + 1e-6)
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)  # guidance of 1 is no guidance, at half the cost


def test_features_of_another_grid_are_refused(pipeline, expected):
    for features, steps in ((expected["siglip_tensor"][:, 1:], 3), (expected["siglip_tensor"][..., 1:], 3)):
        with pytest.raises(ValueError, match="a grid of 4 x 6 needs"):
            pipeline.check_features(features, (4, 6), steps)
    with pytest.raises(ValueError, match="at least 1"):
        pipeline.check_features(expected["siglip_tensor"], (4, 6), 0)
