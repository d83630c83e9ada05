"""COMiT: its fixture holds one pass of the network, of which messages are written and pictures drawn."""

import json
from functools import partial

import pytest
import torch
from conftest import stored
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from unimm.conversion import UPSTREAMS, convert
from unimm.conversion.restore import restore
from unimm.conversion.upstream import UpstreamConfig

TOLERANCE = 1e-4  # absolute, in float32; the fixture's own
SMALL = {
    "args": {
        "predictor": {
            "max_input_size": 24,
            "patch_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "hidden_size": 16,
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "num_msg_tokens": 5,
            "msg_tokens_dim": 3,
        },
        "quantizer": {"levels": [4, 3, 5]},
    }
}
VAE = {
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
}
needs_fixture = pytest.mark.skipif(not stored("comit").is_dir(), reason="COMiT's fixture is not in this repository")


def predictor_shapes(args):
    """Names and shapes of upstream's tensors."""
    width, patch, tokens = args["hidden_size"], args["patch_size"], args["num_msg_tokens"]
    channels, dim = args["in_channels"], args["msg_tokens_dim"]
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "pos_embed": (1, (args["max_input_size"] // patch) ** 2, width),
        "r_pos_embed": (1, tokens, width),
        "r_to_pos_embed": (1, tokens, width),
        **dict.fromkeys(("c_pos_embed", "r_to_token", "y_pos_offset"), (1, 1, width)),
    }
    layers = {
        **{f"{name}_embedder.0": (into, width) for name, into in (("r", dim), ("c", 2))},
        **{f"{name}_embedder.2": (width, width) for name in ("r", "c")},
        "t_embedder.mlp.0": (256, width),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (width, 2 * width),
        "final_layer.linear": (width, channels * patch**2),
        "r_final_layer.linear": (width, dim),
        "c_final_layer.linear": (width, 2),
    }
    inner = int(width * args["mlp_ratio"])
    for index in range(args["depth"]):
        block = f"blocks.{index}"
        layers |= {f"{block}.{kind}_adaLN_modulation.1": (width, 6 * width) for kind in "xr"}
        layers |= {f"{block}.attn.qkv": (width, 3 * width), f"{block}.attn.proj": (width, width)}
        layers |= {f"{block}.mlp.fc1": (width, inner), f"{block}.mlp.fc2": (inner, width)}
    for name, (into, out) in layers.items():
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    return {f"predictor.{name}": shape for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path):
    """Upstream's files, of another shape than the fixture."""
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = predictor_shapes(SMALL["args"]["predictor"])
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(SMALL))
    save_file(weights, folder / "weights.safetensors")
    return folder


@needs_fixture
@torch.no_grad()
def test_one_pass_equals_the_reference(tmp_path):
    codec = AutoModel.from_pretrained(convert("comit", stored("comit"), tmp_path, accept_licence=True).target).eval()
    expected, network = load_file(stored("comit") / "io.safetensors"), codec.decoder
    layer = json.loads((stored("comit") / "config.json").read_text())["args"]["predictor"]["representation_layer"]
    seen = []
    network.blocks[layer].register_forward_hook(lambda *call: seen.append(call[2]))
    noisy, message, offset = expected["noised_latents"], expected["message"], expected["offsets"]
    close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)
    close(codec.quantizer.lookup(expected["message_ids"][..., None]), message)
    passed = network.passed(noisy, 1 - expected["timesteps"], message, offset)
    close(passed.velocity, -expected["velocity"])  # upstream's leads from noise to the picture
    close(passed.written, expected["new_message_raw"])
    close(passed.offset[:, None], expected["offset_prediction"])
    rows, columns = expected["representation"].shape[2:]
    _, cells, read, _ = seen[0].split([1, rows * columns, message.shape[1], message.shape[1]], dim=1)
    close(cells.mT.unflatten(2, (rows, columns)), expected["representation"])
    close(read, expected["message_representation"])
    quantized = codec.quantizer(passed.written)
    assert quantized.ids[..., 0].equal(expected["new_message_ids"])
    close(quantized.vectors, expected["new_message"])
    clean = expected["timesteps"] == 1  # as messages are written
    assert clean.any()
    close(network.write(noisy, message, offset)[clean], expected["new_message_raw"][clean])


@torch.no_grad()
def test_a_converted_comit_encodes_draws_and_goes_back(source, tmp_path):
    report = convert("comit", source, tmp_path / "out", accept_licence=True)
    assert report.dropped == ("predictor.y_pos_offset",)
    assert not report.unread
    codec = AutoModel.from_pretrained(report.target).eval()
    assert codec.encoder.config.crop == 3  # patches of 4 latents of 8 pixels
    latents = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    codes = codec.encode(latents)
    assert codes.ids.shape == (2, 5, 1)
    assert codec.decode(codes).shape == latents.shape
    half = AutoModel.from_pretrained(report.target, dtype=torch.bfloat16)
    assert half.encode(latents).ids.equal(codes.ids)
    back = load_file(restore("comit", report.target, tmp_path / "back") / "weights.safetensors")
    weights = load_file(source / "weights.safetensors")
    assert weights.keys() - back.keys() == {"predictor.y_pos_offset"}
    assert all(weights[key].equal(weight) for key, weight in back.items())


@torch.no_grad()
def test_a_vae_beside_upstreams_files_goes_within_the_codec(source, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE).eval()
    vae.save_pretrained(source / "vae")
    report = convert("comit", source, tmp_path / "out", accept_licence=True)
    assert not [name for name in report.unread if name.startswith("vae")]
    codec = AutoModel.from_pretrained(report.target).eval()
    assert codec.vae.autoencoder.decoder.conv_in.weight.equal(vae.decoder.conv_in.weight)
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert codec.decode(codec.encode(pixels)).shape == pixels.shape
    shown = AutoImageProcessor.from_pretrained(report.target)(torch.zeros(3, 9, 9), return_tensors="pt")
    assert shown["pixel_values"].shape[2:] == pixels.shape[2:]
    back = restore("comit", report.target, tmp_path / "back")
    for part in ("weights", "vae/diffusion_pytorch_model"):
        theirs, ours = (load_file(folder / f"{part}.safetensors") for folder in (source, back))
        assert all(theirs[key].equal(weight) for key, weight in ours.items())
    assert json.loads((back / "config.json").read_text())["args"]["vae"]["block_out_channels"] == [8, 8, 8]
    again = AutoModel.from_pretrained(add_and_convert(back, theirs=source, target=tmp_path / "again"))
    assert again.fingerprint() == codec.fingerprint()


def add_and_convert(folder, *, theirs, target):
    """Convert what went back, with the tensor that stayed behind."""
    weights = load_file(theirs / "weights.safetensors")
    save_file(weights | load_file(folder / "weights.safetensors"), folder / "weights.safetensors")
    return convert("comit", folder, target, accept_licence=True).target


def test_keys_that_are_missing_or_more_are_named(source, tmp_path):
    weights = load_file(source / "weights.safetensors")
    for change, said in (
        ({key: weight for key, weight in weights.items() if "blocks.1.r_adaLN" not in key}, r"decoder\.blocks\.1"),
        (weights | {"predictor.null_message": torch.ones(1)}, r"No rule takes 'predictor\.null_message'"),
    ):
        save_file(change, source / "weights.safetensors")
        with pytest.raises(ValueError, match=said):
            convert("comit", source, tmp_path / "out", accept_licence=True)
    assert not (tmp_path / "out").exists()


def test_the_licence_must_be_accepted(source, tmp_path):
    with pytest.raises(ValueError, match="--accept-licence"):
        convert("comit", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("out_channels", 8, "out_channels is not 4"),
        ("msg_tokens_dim", 4, "msg_tokens_dim is not 3"),
        ("max_input_size", 22, "no multiple of predictor.patch_size 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, value, said):
    predictor = SMALL["args"]["predictor"] | {name: value}
    with pytest.raises(ValueError, match=said):
        UPSTREAMS["comit"].plan(UpstreamConfig({"args": SMALL["args"] | {"predictor": predictor}}))
