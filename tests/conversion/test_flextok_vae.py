"""FlexTok with its VAE: pixels in and out, and back to upstream's files."""

import json
import shutil

import pytest
import torch
from conftest import stored
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from unimm.conversion import convert, restore

PREFIX = "vae.vae."


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    stages = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, **stages).eval()


@pytest.fixture
def source(vae, tmp_path):
    """Upstream's files, with the configuration of a VAE and its weights beside the others."""
    folder = tmp_path / "source"
    shutil.copytree(stored("flextok"), folder)
    weights = load_file(folder / "weights.safetensors")
    weights |= {f"{PREFIX}{name}": weight.clone() for name, weight in vae.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    vae.save_pretrained(tmp_path / "vae")
    fields = json.loads((folder / "config.json").read_text())
    fields["args"]["vae"] = json.loads((tmp_path / "vae" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def change(folder, edit):
    fields = json.loads((folder / "config.json").read_text())
    edit(fields["args"])
    (folder / "config.json").write_text(json.dumps(fields))


@torch.no_grad()
def test_a_converted_vae_takes_and_gives_pixels(source, vae, tmp_path):
    report = convert("flextok", source, tmp_path / "pixels", accept_licence=True)
    assert not report.dropped
    assert not [name for name in report.unread if name.startswith("vae")]
    codec = AutoModel.from_pretrained(tmp_path / "pixels").eval()
    inner = AutoModel.from_pretrained(
        convert("flextok", stored("flextok"), tmp_path / "latents", accept_licence=True).target
    )
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = vae.config.scaling_factor
    codes = codec.encode(pixels)
    assert codes.ids.equal(inner.encode(vae.encode(pixels).latent_dist.mode() * scale).ids)
    wanted = vae.decode(inner.decode(codes) / scale).sample
    torch.testing.assert_close(codec.decode(codes), wanted, atol=1e-4, rtol=1e-4)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "pixels")
    assert processor(torch.zeros(3, 9, 9), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)


def test_a_vae_goes_back_bit_by_bit(source, tmp_path):
    convert("flextok", source, tmp_path / "model", accept_licence=True)
    restored = load_file(restore("flextok", tmp_path / "model", tmp_path / "back") / "weights.safetensors")
    wanted = load_file(source / "weights.safetensors")
    assert restored.keys() == wanted.keys()
    assert all(restored[name].equal(weight) for name, weight in wanted.items())


def test_a_vae_without_configuration_stays_behind_and_is_named(source, tmp_path):
    change(source, lambda args: args.pop("vae"))
    report = convert("flextok", source, tmp_path / "model", accept_licence=True)
    assert len(report.dropped) == sum(name.startswith(PREFIX) for name in load_file(source / "weights.safetensors"))
    assert not AutoModel.from_pretrained(tmp_path / "model").config.reads_pixels


def test_a_vae_and_its_weights_go_together(source, tmp_path):
    weights = load_file(source / "weights.safetensors")
    key = f"{PREFIX}decoder.conv_in.bias"
    save_file({name: weight for name, weight in weights.items() if name != key}, source / "weights.safetensors")
    with pytest.raises(ValueError, match=r"lack what becomes 'vae\.autoencoder\.decoder\.conv_in\.bias'"):
        convert("flextok", source, tmp_path / "model", accept_licence=True)
    save_file(weights | {f"{PREFIX}more.bias": torch.ones(1)}, source / "weights.safetensors")
    with pytest.raises(ValueError, match=r"no place for 'vae\.autoencoder\.more\.bias'"):
        convert("flextok", source, tmp_path / "model", accept_licence=True)
    change(source, lambda args: args["vae"].update(_class_name="AutoencoderDC"))
    with pytest.raises(ValueError, match="class 'AutoencoderDC'"):
        convert("flextok", source, tmp_path / "model", accept_licence=True)
