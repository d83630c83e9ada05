"""Published tokenizers at their released sizes without weights, and each system at a tiny size with random ones."""

import json
from copy import deepcopy
from functools import reduce
from operator import getitem

import pytest
import torch
from conftest import GOLDEN

from unimm import VisualCodecConfig, VisualCodecModel, VisualCodes
from unimm.cli.main import main
from unimm.codec import load_preset, preset_names
from unimm.codec.configuration import SOCKETS
from unimm.codec.presets import paper_of
from unimm.conversion import UPSTREAMS
from unimm.conversion.presets import load_published, published_names
from unimm.conversion.upstream import UpstreamConfig

TOLERANCE = 0.005  # of the stated number of weights, which is rounded to 1 or 100 millions
POSITIONS = {  # of a picture at the released size, and their codebooks, as the papers state them
    "comit_b": (256, (64000,)),
    "dualvitok": (4096 + 36 * 36, (32768 + 98304,)),
    "gigatok_xl_xxl": (256, (16384,)),
    "instella_t2i": (128, (2,) * 64),
    "one_d_piece_l256": (256, (4096,)),
    "restok_l128": (128, (8192,)),
    "seed": (32, (8192,)),
    "ta_tok": (729, (65536,)),
    "titok_l32": (32, (4096,)),
    "tokenflow_384": (2227, (32768,)),
    "unitok": (256, (4096,) * 8),
}
# Systems in a second form: what of their fixtures' arguments is otherwise.
VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
VARIANTS = {
    "titok_single_stage, continuous": ("titok_single_stage", {"model.vq_model.quantize_mode": "vae"}),
    "ta_titok, continuous": ("ta_titok", {"model.vq_model.quantize_mode": "vae"}),
    "flextok with its VAE": ("flextok", {"vae": VAE}),
    "comit with its VAE": ("comit", {"vae": VAE}),
}
# Our own presets of papers at a tiny size.
SMALL_PYRAMID = {"channels": [32, 32], "blocks": 1, "code_channels": 16}
PAPERS = {
    "retok": {
        "image_size": 16,
        "encoder": {**SMALL_PYRAMID, "stem_channels": 32},
        "resampler": {"tokens": 4, "padding": 3, "rows": 8, "columns": 8, "width": 16, "depth": 1, "num_heads": 2},
        "quantizer": {"size": 32},
        "length": {"tokens": 4, "padding": 3, "rows": 8, "columns": 8},
        "decoder": {"tokens": 7, "rows": 8, "columns": 8, "width": 16, "depth": 3, "num_heads": 2, "feature_width": 12}
        | {"pixels": SMALL_PYRAMID | {"upsampling": "shuffle", "adaptive": True}},
    },
}
WHOLE_SYSTEMS = {"xomni_lm", "xomni", "seed_llama_8b", "seed_llama_14b", "lavit", "tar"}  # no codecs
# Systems without a preset: a size that no fact states, or no released weights.
WITHOUT_PRESET = {"atoken", "dualtoken"}
# Where no fixture is at hand, the configuration of one that is built alike.
STAND_IN = {"meditok": "unitok", "fqgan": "fqgan_triple"}
# And where nothing is built alike.
SMALL = {
    "comit": {
        "args": {
            "predictor": {
                "max_input_size": 16,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "hidden_size": 16,
                "depth": 1,
                "num_heads": 2,
                "num_msg_tokens": 5,
                "msg_tokens_dim": 3,
            },
            "quantizer": {"levels": [4, 3, 5]},
        },
    },
    "dualvitok": {
        "args": {
            "semantic_encoder": {"num_blocks": 1, "embed_dim": 64},
            "semantic_quantizer": {"codebook_size": 40, "dim": 8},
            "semantic_decoder": {"num_blocks": 1, "embed_dim": 64, "output_channels": 48},
            "pixel_encoder": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 8},
            "pixel_quantizer": {"codebook_size": 60, "dim": 8},
            "pixel_decoder": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 16, "embed_dim": 16},
        },
        "semantic_tower_config": {"depth": 1, "embed_dim": 32, "num_heads": 4, "hidden_size": 48, "mlp_ratio": 2},
    },
    "evotok": {
        "args": {
            "codebook_size": 48,
            "codebook_embed_dim": 12,
            "vqgan_depth": 2,
            "vqkd_depth": 5,
            "z_channels": 16,
            "decoder_ch_mult": [2, 1, 1],
            "teacher": "siglip_256",
        },
        "patched_literals": {"decoder_vqkd": {"num_heads": 4, "depth": 2}, "conv_ch": 32, "num_res_blocks": 1},
        "teacher_vision_config": {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 30,
            "patch_size": 6,
        },
    },
    "karl": {
        "args": {
            "encoder_width": 24,
            "encoder_num_layers": 1,
            "encoder_num_heads": 2,
            "decoder_width": 32,
            "decoder_num_layers": 1,
            "decoder_num_heads": 2,
            "vq_codebook_size": 48,
            "vq_token_dim": 6,
            "max_grid_tokens": 5,
        },
        "base_tokenizer": {
            "codebook_size": 20,
            "embed_dim": 8,
            "ddconfig": {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1},
        },
        "patched_literals": {"grid": "2x2", "latent_tokens": 7},
    },
    "uniflow": {
        "args": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "image_size": 32,
            "patch_size": 8,
            "latent_ch": 8,
            "global_blocks_depth": 1,
            "num_decoder_layers": 1,
            "num_sampling_steps": "2",
        }
    },
}
CODECS = [system for system in UPSTREAMS if system not in WHOLE_SYSTEMS]
TINY = [*CODECS, *VARIANTS, *PAPERS]


@pytest.mark.parametrize("name", published_names())
def test_every_published_size_is_built_and_weighs_what_upstream_says(name):
    published = load_published(name)
    arguments = UpstreamConfig(published.args)
    published.upstream.plan(arguments)
    assert not arguments.unread  # a key that no plan reads is misspelt or says nothing
    with torch.device("meta"):
        codec = VisualCodecModel(published.config)
    if published.parameters is not None:
        millions = sum(weight.numel() for weight in codec.parameters()) / 1e6
        assert millions == pytest.approx(published.parameters, rel=TOLERANCE)
    if name in POSITIONS:
        assert (codec.spec_without_fingerprint.max_length, codec.quantizer.sizes) == POSITIONS[name]


def test_every_preset_of_a_paper_is_built_and_inspected_and_has_a_tiny_form(capsys):
    assert {name for name in preset_names() if paper_of(name)} == {*PAPERS}
    for name in PAPERS:
        assert main(["inspect", "codec", name]) == 0
        assert f"paper      {paper_of(name)}" in capsys.readouterr().out


def test_every_codec_of_the_registry_has_a_preset_unless_said_why_not():
    assert {load_published(name).upstream.system for name in published_names()} == {*CODECS} - WITHOUT_PRESET
    assert not {*published_names()} & {*preset_names()}


def test_inspection_names_licences_and_near_presets(capsys):
    assert main(["inspect", "codec", "titok_l32"]) == 0
    said = capsys.readouterr().out
    for line in ("paper      arXiv 2406.07550", "upstream   bytedance/1d-tokenizer", "licence    Apache-2.0"):
        assert line in said
    assert "pixels     256 x 256, [0, 1]" in said
    assert "codes      32 positions, 4096, 384 bits" in said
    assert main(["inspect", "codec"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*preset_names(), *published_names()])
    assert main(["inspect", "codec", "gigatok_x"]) == 2
    assert "Did you mean gigatok_" in capsys.readouterr().err


def tiny_config(name):
    if name in PAPERS:
        own = load_preset(name)
        changes = {key: getattr(own, key) | new if isinstance(new, dict) else new for key, new in PAPERS[name].items()}
        return VisualCodecConfig(**{socket: getattr(own, socket) for socket in SOCKETS} | changes)
    system, changes = VARIANTS.get(name, (name, {}))
    folder = GOLDEN / STAND_IN.get(system, system)
    fields = deepcopy(SMALL[system]) if system in SMALL else json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        reduce(getitem, parents, fields["args"])[leaf] = value
    return UPSTREAMS[system].plan(UpstreamConfig(fields)).config


@pytest.fixture
def tiny():
    """A random model by its name. No weight is zero, so that every path carries a gradient."""

    def build(name):
        torch.manual_seed(0)
        codec = VisualCodecModel(tiny_config(name)).eval()
        for weight in codec.parameters():
            if not weight.abs().sum():
                torch.nn.init.normal_(weight.data, std=0.02)
        return codec

    return build


def inputs(codec, batch=2):
    """What the codec reads; four cells a side where it takes any size."""
    side, generator = codec.config.image_size, torch.Generator().manual_seed(1)
    if codec.config.length["kind"] in ("resolution", "any_sequence", "streams"):
        side = 4 * codec.config.downsample
    if not codec.config.reads_pixels:
        return torch.randn(batch, codec.config.encoder["latent_channels"], side, side, generator=generator)
    return codec.from_shown(torch.rand(batch, 3, side, side, generator=generator) * 2 - 1)


def text(codec, batch=2):
    """The condition, of a codec that draws under one."""
    options = codec.config.decoder
    if not options.get("condition_tokens"):
        return None
    return torch.randn(batch, options["condition_tokens"], options["condition_width"])


def lengths(codec):
    """All that the codec allows."""
    policy = codec.length
    if codec.config.length["kind"] == "pooled":
        own = policy.max_length
        return [length for length in range(1, own + 1) if allowed(policy, length)]
    if policy.ragged:
        return list(range(1, policy.max_length + 1)) if codec.config.length["kind"] == "halted" else []
    return list(range(policy.min_length, policy.max_length + 1)) if codec.config.length.get("prefixes") else []


def allowed(policy, length):
    try:
        policy.check_length(length)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("system", TINY)
def test_every_system_encodes_decodes_and_reloads_at_every_length(system, tiny, tmp_path):
    codec = tiny(system)
    given, condition = inputs(codec), text(codec)
    codes = codec.encode(given)
    drawn = codec.decode(codes, condition=condition)
    assert drawn.isfinite().all()
    codec.save_pretrained(tmp_path)
    again = VisualCodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.encode(given).ids.equal(codes.ids)
    # Products may round otherwise where weights lie elsewhere in memory; weights in bfloat16 would be off by 1e-3.
    torch.testing.assert_close(again.decode(codes, condition=condition), drawn, atol=1e-5, rtol=0)
    for length in lengths(codec):
        short = codec.encode(given, num_tokens=length)
        assert short.ids.shape[1] == length or (codec.length.ragged and 1 <= short.ids.shape[1] <= length)
        assert again.encode(given, num_tokens=length).ids.equal(short.ids)
        if codec.config.length.get("prefixes"):
            assert short.ids.equal(codes.ids[:, :length])
        if length in (1, codec.length.max_length // 2) or codec.config.length["kind"] == "pooled":
            bare = VisualCodes(short.ids, short.mask, short.grid)
            assert codec.decode(bare, condition=condition).isfinite().all()


@pytest.mark.parametrize("system", TINY)
def test_every_trainable_weight_of_every_system_learns(system, tiny):
    codec = tiny(system).train()
    output = codec(inputs(codec), condition=text(codec))
    loss = output.reconstruction.square().mean() + output.quantizer_loss
    for more in (output.features, output.velocity_loss, output.halting_loss):
        loss = loss if more is None else loss + more.square().mean()
    loss.backward()
    for name, weight in codec.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
