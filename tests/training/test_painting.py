"""Codes that a frozen text-to-image model reads as words, and that learn from its loss alone (Visual Lexicon)."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from test_heads import SEQUENCE, pixels, recipe_of

from unimm.codec import VisualCodecModel
from unimm.config import from_dict
from unimm.training.codec import CodecRecipe, CodecTask, train_codec
from unimm.training.painting import FrozenPainter, PaintingConfig
from unimm.training.pool import Pool

NO_PIXELS = {"squared": 0, "absolute": 0, "edges": 0}
WORDS = SEQUENCE | {
    "quantizer": {"kind": "continuous"},
    "length": SEQUENCE["length"] | {"filled": False},
    "decoder": {"kind": "prompt", "dim": 8},
}


def write_painter(folder, kind="StableDiffusionPipeline", prediction="epsilon", words=8):
    torch.manual_seed(0)
    UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        attention_head_dim=2,
        cross_attention_dim=words,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.5).save_pretrained(folder / "vae")
    DDPMScheduler(prediction_type=prediction).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return str(folder)


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return write_painter(tmp_path_factory.mktemp("painter"))


def shown():
    return ((pixels(4).permute(0, 2, 3, 1) + 1) * 127.5).byte().numpy()


def task_of(painter, tmp_path, **others):
    fields = recipe_of(tmp_path, "run", WORDS, painting={"model": painter}, loss=NO_PIXELS, **others)
    torch.manual_seed(0)
    return CodecTask(from_dict(CodecRecipe, fields), Pool(shown(), {"held": pixels(2)}))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_the_denoiser_under_these_words(prediction, tmp_path):
    painter = FrozenPainter(PaintingConfig(write_painter(tmp_path, prediction=prediction)))
    words = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small = F.interpolate(pixels(), (8, 8), mode="bicubic", align_corners=False, antialias=True)
        latents = 0.5 * painter.vae.autoencoder.encode(small).latent_dist.mode()
        torch.manual_seed(1)
        loss = painter.loss(words, pixels())
        torch.manual_seed(1)
        noise, times = torch.randn_like(latents), torch.randint(1000, (2,))
        kept = painter.scheduler.alphas_cumprod[times].view(2, 1, 1, 1)
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        wanted = {
            "epsilon": noise,
            "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * latents,
            "sample": latents,
        }[prediction]
        found = painter.denoiser(noisy, times, encoder_hidden_states=words).sample
    torch.testing.assert_close(loss, F.mse_loss(found, wanted))


def test_the_codec_learns_and_the_model_stays_as_it_is(painter, tmp_path):
    task = task_of(painter, tmp_path)
    losses = task.losses(task.model, 0, 0)
    assert losses["loss"] == losses["painting"] + losses["quantizer"]  # by no other loss
    losses["loss"].backward()
    assert all(weight.grad is not None for weight in task.codec.encoder.parameters())
    assert task.codec.resampler.to_positions.weight.grad.any()
    frozen = [*task.painter.denoiser.parameters(), *task.painter.vae.parameters()]
    assert all(weight.grad is None and not weight.requires_grad for weight in frozen)
    assert not {id(weight) for weight in frozen} & {id(weight) for weight in task.model.parameters()}


def test_words_come_to_say_what_is_in_a_picture(painter, tmp_path):
    """A denoiser that copies its first word: what the picture is must be in the words, and comes to be there."""
    task = task_of(painter, tmp_path)

    class Copies(torch.nn.Module):
        def forward(self, noisy, times, encoder_hidden_states):
            means = encoder_hidden_states[:, 0, :4, None, None]
            self.sample = means.expand_as(noisy)
            return self

    task.painter.denoiser = Copies()
    task.painter.scheduler.register_to_config(prediction_type="sample")
    optimizer, curve = torch.optim.AdamW(task.model.parameters(), lr=1e-2), []
    for step in range(30):
        loss = task.losses(task.model, step, 0)["painting"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])


def test_the_tail_that_training_drops_is_not_read(painter, tmp_path):
    task = task_of(painter, tmp_path, lengths={"values": [3]})
    read = []
    task.painter.denoiser.register_forward_pre_hook(
        lambda _, inputs, named: read.append(named["encoder_hidden_states"].shape), with_kwargs=True
    )
    task.losses(task.model, 0, 0)
    assert read == [(4, 3, 8)]


def test_a_recipe_trains_words_that_a_pipeline_takes(painter, tmp_path):
    fields = recipe_of(
        tmp_path,
        "run",
        WORDS,
        painting={"model": painter},
        loss=NO_PIXELS,
        lengths={"values": [1, 8]},
        optimizer={"steps": 2, "warmup": 0},
    )
    run = train_codec(from_dict(CodecRecipe, fields | {"logging": {"every": 1, "validate_every": 1, "save_every": 2}}))
    assert any("painting_shapes" in record for record in run.metrics())
    codec = VisualCodecModel.from_pretrained(run.model)
    model = FrozenPainter(PaintingConfig(painter))
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        vae=model.vae.autoencoder,
        unet=model.denoiser,
        scheduler=model.scheduler,
        requires_safety_checker=False,
        **absent,
    )
    for length in (1, 8):
        codes = codec.encode(pixels(), num_tokens=length)
        assert codec.decode(codes).equal(codes.side_info["latents"])
        assert codec.decode(codes).shape == (2, length, 8)
        drawn = pipeline(prompt_embeds=codec.decode(codes), num_inference_steps=2, guidance_scale=1.0, output_type="np")
        assert drawn.images.shape == (2, 8, 8, 3)


def test_words_that_no_model_reads_are_refused(painter, tmp_path):
    wide = write_painter(tmp_path / "wide", words=12)
    large = write_painter(tmp_path / "large", kind="StableDiffusionXLPipeline")
    cases = {
        "are 12 wide and those of the codec 8": (WORDS, wide, NO_PIXELS),
        "a StableDiffusionXLPipeline; take a StableDiffusionPipeline": (WORDS, large, NO_PIXELS),
        "makes no prompts": (SEQUENCE, painter, NO_PIXELS),
        "this codec draws none": (WORDS, painter, {}),
    }
    for said, (model, folder, loss) in cases.items():
        fields = recipe_of(tmp_path, "run", model, painting={"model": folder}, loss=loss)
        with pytest.raises(ValueError, match=said):
            train_codec(from_dict(CodecRecipe, fields))
