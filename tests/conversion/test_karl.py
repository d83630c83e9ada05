"""KARL: its fixture holds everything but the VQGAN below it, whose latents are fed where the two meet."""

import json
from functools import partial

import pytest
import torch
from conftest import stored
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from unimm.conversion import UPSTREAMS, convert
from unimm.conversion.restore import restore
from unimm.conversion.upstream import UpstreamConfig

TOLERANCE = 1e-4  # absolute, in float32; the fixture's own
NETWORK = {"ch": 32, "ch_mult": [1, 1, 2, 1, 3], "num_res_blocks": 1}
SMALL = {
    "args": {
        "encoder_width": 24,
        "encoder_num_layers": 1,
        "encoder_num_heads": 3,
        "decoder_width": 32,
        "decoder_num_layers": 2,
        "decoder_num_heads": 4,
        "vq_codebook_size": 48,
        "vq_token_dim": 6,
        "vq_use_l2_norm": True,
        "patch_size": 16,
        "max_grid_tokens": 5,
    },
    "base_tokenizer": {"codebook_size": 20, "embed_dim": 8},
    "patched_literals": {"grid": {"upstream": "16x16", "here": "3x3"}},
}
needs_fixture = pytest.mark.skipif(not stored("karl").is_dir(), reason="KARL's fixture is not in this repository")


def vqgan_shapes(code_channels):
    """Names and shapes of the VQGAN of MAGE, without its table."""
    width, blocks = NETWORK["ch"], NETWORK["num_res_blocks"]
    levels = [width * multiplier for multiplier in NETWORK["ch_mult"]]
    shapes = {}

    def norm(name, channels):
        shapes.update({f"{name}.{leaf}": (channels,) for leaf in ("weight", "bias")})

    def conv(name, into, out, kernel, bias=True):
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", into, out, 3, bias=False)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3, bias=False)
        if into != out:
            conv(f"{name}.nin_shortcut", out, out, 1, bias=False)

    conv("encoder.conv_in", 3, width, 3, bias=False)
    conv("decoder.conv_in", code_channels, levels[-1], 3)
    into = width
    for index, out in enumerate(levels):
        for place in range(blocks):
            block(f"encoder.down.{index}.block.{place}", out if place else into, out)
        into = out
    for index in reversed(range(len(levels))):
        for place in range(blocks):
            block(f"decoder.up.{index}.block.{place}", levels[index] if place else into, levels[index])
        into = levels[index]
        if index:
            conv(f"decoder.up.{index}.upsample.conv", into, into, 3)
    for side, last, out, kernel in (("encoder", levels[-1], code_channels, 1), ("decoder", levels[0], 3, 3)):
        for place in (1, 2):
            block(f"{side}.mid.block_{place}", levels[-1], levels[-1])
        norm(f"{side}.norm_out", last)
        conv(f"{side}.conv_out", last, out, kernel)
    return shapes


def karl_shapes(args, base):
    """Names and shapes of the rest."""
    shapes = {
        "base_tokenizer.vqgan.quantize.embedding.weight": (base["codebook_size"], base["embed_dim"]),
        "rec_loss_embeddings": (19, args["encoder_width"]),
        "latent_tokens": (512, args["encoder_width"]),
        "decoder_latent_tokens_timestep_embed": (512, args["decoder_width"]),
        "decoder_mask_token": (1, 1, args["decoder_width"]),
        "quantize.embedding.weight": (args["vq_codebook_size"], args["vq_token_dim"]),
        "patch_embed.weight": (args["encoder_width"] - base["embed_dim"], 3, args["patch_size"], args["patch_size"]),
        "patch_embed.bias": (args["encoder_width"] - base["embed_dim"],),
    }

    def linear(name, into, out):
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.{leaf}": (width,) for leaf in ("weight", "bias")})

    for side in ("encoder", "decoder"):
        width, table = args[f"{side}_width"], args["max_grid_tokens"]
        shapes[f"{side}_positional_embedding"] = (width, table, table)
        for layer in range(args[f"{side}_num_layers"]):
            block = f"{side}.transformer.{layer}"
            shapes.update(
                {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            )
            linear(f"{block}.attn.out_proj", width, width)
            linear(f"{block}.mlp.c_fc", width, 4 * width)
            linear(f"{block}.mlp.c_proj", 4 * width, width)
            norm(f"{block}.ln_1", width)
            norm(f"{block}.ln_2", width)
    for name in ("encoder_ln_pre", "encoder_ln_post", "encoder_ln_post_halt"):
        norm(name, args["encoder_width"])
    norm("decoder.ln_pre", args["decoder_width"])
    norm("decoder.ln_post", args["decoder_width"])
    linear("pre_quantizer_mlp", args["encoder_width"], args["vq_token_dim"])
    linear("halting_mlp.0", args["encoder_width"], 512)
    linear("halting_mlp.2", 512, 1)
    linear("decoder_embed", args["vq_token_dim"], args["decoder_width"])
    linear("decoder.ffn.0", args["decoder_width"], 2 * args["decoder_width"])
    linear("decoder.ffn.2", 2 * args["decoder_width"], base["codebook_size"])
    return shapes


def random_weights(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def completed(fields, weights, folder):
    """Upstream's files in `folder`, with a random VQGAN."""
    folder.mkdir()
    base = fields["base_tokenizer"] | {"ddconfig": NETWORK}
    (folder / "config.json").write_text(json.dumps(fields | {"base_tokenizer": base}))
    vqgan = random_weights(vqgan_shapes(base["embed_dim"]))
    vqgan = {f"base_tokenizer.vqgan.{name}": weight for name, weight in vqgan.items()}
    save_file(weights | vqgan, folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A KARL of another shape than its fixture, with a VQGAN."""
    weights = random_weights(karl_shapes(SMALL["args"], SMALL["base_tokenizer"]))
    return completed(SMALL, weights, tmp_path_factory.mktemp("karl") / "source")


@pytest.fixture(scope="session")
def converted(source, tmp_path_factory):
    return convert("karl", source, tmp_path_factory.mktemp("karl") / "out", accept_licence=True).target


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The codec of the fixture."""
    folder = tmp_path_factory.mktemp("karl")
    fields = json.loads((stored("karl") / "config.json").read_text())
    weights = load_file(stored("karl") / "weights.safetensors")
    source = completed(fields, weights, folder / "source")
    target = convert("karl", source, folder / "out", accept_licence=True).target
    return AutoModel.from_pretrained(target).eval()


@needs_fixture
@torch.no_grad()
@pytest.mark.parametrize("run", [0, 1])
def test_both_runs_equal_the_reference(run, reference):
    codec, expected = reference, load_file(stored("karl") / "io.safetensors")
    asked = json.loads((stored("karl") / "config.json").read_text())["runs"][run]
    tokens, error = asked["input_token_budget"], torch.tensor([asked["desired_reconstruction_quality"]])
    close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)
    features = codec.encoder.beside(expected["pixel_values"], expected["base_features"])
    close(codec.resampler.read(features, tokens, error), expected[f"encoder_output_{run}"])
    latents = codec.resampler.latents(features, tokens, error)
    close(latents.positions, expected[f"z_{run}"])
    close(latents.halting.sigmoid(), expected[f"halt_prob_{run}"])
    keep = codec.resampler.keep(latents.halting)
    assert keep.equal(expected[f"kept_{run}"])
    ids = codec.quantizer(latents.positions).ids
    assert ids[..., 0].equal(expected[f"codes_{run}"])
    kept = ids[:, keep[0]]
    for cells in (
        codec.decoder.cells(codec.quantizer.lookup(ids), keep),  # all, of which some are left out
        codec.decoder.cells(codec.quantizer.lookup(kept), places=keep.nonzero()[None, :, 1]),  # as codes are decoded
    ):
        scores = codec.decoder.head.to_scores(cells)
        close(scores.flatten(2).mT, expected[f"decoder_logits_{run}"])
        close(codec.decoder.head.expected_rows(scores).flatten(2).mT, expected[f"decoded_latent_{run}"])


@torch.no_grad()
def test_a_converted_karl_encodes_draws_and_goes_back(source, converted, tmp_path):
    codec, weights = AutoModel.from_pretrained(converted).eval(), load_file(source / "weights.safetensors")
    pixels = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    rows = weights["base_tokenizer.vqgan.quantize.embedding.weight"]
    features = codec.encoder.base_features(pixels).flatten(2).mT
    assert (features[:, :, None] == rows).all(dim=3).any(dim=2).all()
    codes = codec.encode(pixels)
    assert codec.decode(codes).shape == pixels.shape
    half = AutoModel.from_pretrained(converted, dtype=torch.bfloat16)
    assert half.encode(pixels).ids.equal(codes.ids)
    white = torch.full((3, 40, 60), 255, dtype=torch.uint8)
    shown = AutoImageProcessor.from_pretrained(converted)(white, return_tensors="pt")["pixel_values"]
    assert shown.shape[1:] == pixels.shape[1:]
    assert shown.eq(1).all()
    back = load_file(restore("karl", converted, tmp_path / "back") / "weights.safetensors")
    assert back.keys() == weights.keys()
    assert all(back[key].equal(weight) for key, weight in weights.items())


def test_a_karl_without_its_vqgan_is_refused(source, tmp_path):
    weights = load_file(source / "weights.safetensors")
    for side in ("decoder", "encoder"):
        folder = tmp_path / side
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        weights = {key: weight for key, weight in weights.items() if f"vqgan.{side}" not in key}
        save_file(weights, folder / "weights.safetensors")
        with pytest.raises(ValueError, match=rf"no .*'base_tokenizer\.vqgan\.{side}\.\*'"):
            convert("karl", folder, tmp_path / "out", accept_licence=True)
    assert not (tmp_path / "out").exists()


def test_the_licence_must_be_accepted(source, tmp_path):
    with pytest.raises(ValueError, match="--accept-licence"):
        convert("karl", source, tmp_path / "out")


def test_pictures_that_are_no_squares_are_refused():
    with pytest.raises(ValueError, match="grid is 4x6"):
        UPSTREAMS["karl"].plan(UpstreamConfig(SMALL | {"patched_literals": {"grid": "4x6"}}))
