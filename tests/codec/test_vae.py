"""Codecs of latents within an autoencoder of diffusers."""

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from transformers import AutoModel

from unimm import VisualCodecConfig, VisualCodecModel
from unimm.cli.inspect import inspect_codec
from unimm.codec.vae import VaeConfig

FIELDS = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
}
GRID = {"rows": 4, "columns": 4}
SIZES = {"dim": 3, "depth": 1, "num_heads": 2, "mlp_width": 24}
SOCKETS = {  # 8 x 8 latents, 16 x 16 pixels
    "encoder": {"kind": "patches", "patch": 2, "width": 16, "latent_channels": 4},
    "resampler": {"kind": "registers", "tokens": 4, **SIZES, **GRID},
    "quantizer": {"kind": "fsq", "levels": [8, 8, 5], "project": False},
    "length": {"kind": "sequence", "tokens": 4, "prefixes": True, **GRID},
    "decoder": {
        "kind": "flow",
        "tokens": 4,
        "patch": 2,
        "width": 16,
        "latent_channels": 4,
        "steps": 2,
        **SIZES,
        **GRID,
    },
}


def lively(codec):
    """Its updates begin at zero, and nothing reaches what lies behind them; not those of the VAE, which is trained."""
    for weight in codec.parameters():
        if weight.requires_grad and not weight.abs().sum():
            torch.nn.init.normal_(weight.data, std=0.02)
    return codec


def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved autoencoder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**FIELDS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def codec(folder):
    torch.manual_seed(1)
    return lively(VisualCodecModel.begin(image_size=16, vae=str(folder), **SOCKETS).eval())


@pytest.fixture(scope="module")
def inner(codec):
    """The same codec without its VAE."""
    inner = VisualCodecModel(VisualCodecConfig(image_size=8, **SOCKETS)).eval()
    own = {name: weight for name, weight in codec.state_dict().items() if not name.startswith("vae.")}
    inner.load_state_dict(own)
    return inner


@torch.no_grad()
def test_pixels_in_and_out_are_the_latents_of_a_stock_vae(folder, codec, inner):
    vae = AutoencoderKL.from_pretrained(folder).eval()
    latents = (vae.encode(pictures()).latent_dist.mode() - 0.1) * 0.5
    codes = codec.encode(pictures())
    assert codes.ids.equal(inner.encode(latents).ids)
    assert not codes.ids.equal(inner.encode(latents * 2).ids)  # the scale counts
    drawn = codec.decode(codes)
    assert drawn.shape == pictures().shape
    torch.testing.assert_close(drawn, vae.decode(inner.decode(codes) / 0.5 + 0.1).sample, atol=1e-5, rtol=0)
    assert codec.pictures(codes).equal(drawn.clamp(-1, 1))
    with pytest.raises(ValueError, match=r"with config\.vae that autoencoder"):
        inner.pictures(codes)


def test_the_vae_is_saved_with_the_codec_and_stays_as_it_is(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    codes = codec.encode(pictures())
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        assert again.fingerprint() == codec.fingerprint()
        assert again.encode(pictures()).ids.equal(codes.ids)
        torch.testing.assert_close(again.decode(codes), codec.decode(codes), atol=1e-5, rtol=0)
        assert not any(weight.requires_grad for weight in again.vae.parameters())
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    said = inspect_codec(str(tmp_path))
    assert "vae        4 channels, 2 pixels a side each" in said
    assert "pixels     16 x 16, [-1, 1]" in said


def test_the_codec_learns_and_the_vae_does_not(folder):
    torch.manual_seed(0)
    codec = lively(VisualCodecModel.begin(image_size=16, vae=str(folder), **SOCKETS).train())
    assert not codec.vae.autoencoder.training
    output = codec(pictures())
    assert output.reconstruction.shape == (2, 4, 8, 8)
    drawn = codec.pixels_of(output.reconstruction)
    assert drawn.shape == pictures().shape
    (drawn.square().mean() + output.velocity_loss + output.quantizer_loss).backward()
    for name, weight in codec.named_parameters():
        if name.startswith("vae."):
            assert weight.grad is None, name
        else:
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name


def test_a_flow_learns_the_latents_that_the_encoder_reads(codec, inner):
    latents = codec.vae.encode(pictures())
    losses = []
    for model, given in ((codec, pictures()), (inner, latents)):
        torch.manual_seed(0)
        losses.append(model(given).velocity_loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pixels_may_be_read_and_latents_drawn(folder):
    options = SOCKETS | {"encoder": {"kind": "patches", "patch": 4, "width": 16}}
    codec = VisualCodecModel.begin(image_size=16, pixel_range=(0.0, 1.0), vae=str(folder), **options).eval()
    shown = (pictures() + 1) / 2
    codes = codec.encode(shown)
    assert codec.decode(codes).shape == shown.shape
    drawn = codec.to_shown(codec.decode(codes))
    torch.testing.assert_close(drawn, codec.vae.decode(codec.decoder(codec.lookup(codes))), atol=1e-4, rtol=0)
    assert codec(shown).velocity_loss.isfinite()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_size": 8}, "image_size is 8"),
        (
            {"image_size": 24, "decoder": SOCKETS["decoder"] | {"rows": 6, "columns": 6}},
            "cannot take a 24 x 24 picture .* takes 16 x 16",
        ),
        ({"encoder": SOCKETS["encoder"] | {"latent_channels": 8}}, r"encoder\.latent_channels is 8 and .* have 4"),
        ({"decoder": SOCKETS["decoder"] | {"latent_channels": 8}}, r"decoder\.latent_channels is 8 and .* have 4"),
        ({"decoder": SOCKETS["decoder"] | {"patch": 4}}, "draws 32 x 32 pixels"),
        ({"vae": {**FIELDS, "norm_groups": 4}}, "unknown key 'norm_groups'. Did you mean norm_num_groups"),
        ({"vae": {**FIELDS, "block_out_channels": [8]}}, "1 block_out_channels, 2 down_block_types"),
        ({"vae": {**FIELDS, "in_channels": 4}}, "in_channels 4"),
        ({"vae": {**FIELDS, "latents_mean": [0.0] * 4}}, r"vae\.latents_mean"),
        (
            {"encoder": {"kind": "patches", "patch": 4}, "decoder": SOCKETS["decoder"] | {"latent_channels": 0}},
            "works in latents",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        VisualCodecConfig(**{"image_size": 16, "vae": FIELDS, **SOCKETS} | fields)


def test_latents_wrong_sizes_and_ranges_are_refused_where_pixels_are_read(codec):
    for wrong in (torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8), torch.full((1, 3, 16, 16), 255.0)):
        with pytest.raises(ValueError, match=r"pixel_values|cannot take"):
            codec.encode(wrong)


def test_other_autoencoders_and_folders_without_weights_are_refused(folder, tmp_path):
    AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class 'AutoencoderDC'"):
        VisualCodecModel.begin(vae=str(tmp_path), **SOCKETS)
    assert VaeConfig(FIELDS).factor == 2


def test_diffusers_is_imported_by_codecs_with_a_vae_alone():
    code = """
import sys
from unimm import VisualCodecConfig, VisualCodecModel
from unimm.codec import load_preset
VisualCodecModel(load_preset("smallest"))
assert "diffusers" not in sys.modules
VisualCodecConfig(image_size=16, vae={fields}, **{sockets})
assert "diffusers" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code.format(fields=FIELDS, sockets=SOCKETS)], check=True)
