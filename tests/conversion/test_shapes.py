"""Converters at other sizes than those of the fixtures, and under other spellings of the same configuration."""

import json

import pytest
import torch
from conftest import stored
from safetensors.torch import load_file, save_file
from test_conversion import FIXTURES, changed, reference
from test_presets import inputs, text
from transformers import AutoModel

from unimm import VisualCodecModel
from unimm.conversion import UPSTREAMS, convert
from unimm.conversion.upstream import UpstreamConfig

VQ = "args__model__vq_model__"
DD = "args__ddconfig__"
SIGLIP = "siglip_model_config__"
VISION = "teacher_vision_config__"
LITERALS = "patched_literals__"
MINI = {"width": 40, "layers": 3, "heads": 2}
# What of a fixture's configuration is otherwise; None for an argument that is left out.
SHAPES = {
    "llamagen_vq, wider and deeper": (
        "llamagen_vq",
        {"args__encoder_ch_mult": [1, 1, 3], "args__decoder_ch_mult": [2, 1, 1], "args__z_channels": 40},
    ),
    "llamagen_vq, one level and plain rows": (
        "llamagen_vq",
        {"args__encoder_ch_mult": [2], "args__decoder_ch_mult": [3], "args__codebook_l2_norm": False},
    ),
    "ibq, attention elsewhere": (
        "ibq",
        {f"{DD}attn_resolutions": [32, 8], f"{DD}ch_mult": [1, 2, 1], f"{DD}num_res_blocks": 2, "args__embed_dim": 10},
    ),
    "ibq, a nominal resolution that cells do not tile": (
        "ibq",
        {f"{DD}resolution": 20, f"{DD}ch_mult": [1, 1, 1, 1], f"{DD}attn_resolutions": None},
    ),
    "open_magvit2, more bits": (
        "open_magvit2",
        {f"{DD}ch_mult": [1, 1, 2], f"{DD}num_res_blocks": 2, f"{DD}z_channels": 9, "args__n_embed": 512},
    ),
    "open_magvit2, a nominal resolution that cells do not tile": (
        "open_magvit2",
        {f"{DD}resolution": 20, f"{DD}ch_mult": [1, 1, 1, 1]},
    ),
    "titok_two_stage, sides that differ": (
        "titok_two_stage",
        {f"{VQ}vit_enc_model_size": "mini", f"{LITERALS}model_size_mini": MINI, f"{VQ}vit_enc_patch_size": 8},
    ),
    "titok_single_stage, sides that differ": (
        "titok_single_stage",
        {f"{VQ}vit_dec_model_size": "mini", f"{LITERALS}model_size_mini": MINI, f"{VQ}vit_dec_patch_size": 8},
    ),
    "ta_titok, another text": ("ta_titok", {f"{VQ}text_context_length": 5, f"{VQ}text_embed_dim": 10}),
    "one_d_piece, a larger picture": (
        "one_d_piece",
        {"args__dataset__preprocessing__crop_size": 48, f"{VQ}num_latent_tokens": 7, f"{VQ}use_l2_norm": False},
    ),
    "xomni_tokenizer, heads and ratio": (
        "xomni_tokenizer",
        {f"{SIGLIP}heads": 2, f"{SIGLIP}mlp_ratio": 3.7362, f"{SIGLIP}patch_size": 8, "args__codebook_dim": 100},
    ),
    "seed_tokenizer, fewer queries": ("seed_tokenizer", {"args__num_query_token": 9, "args__decode_depth": 3}),
    "lavit_tokenizer, another tower": (
        "lavit_tokenizer",
        {
            "args__EVAVisionTransformer__num_heads": 4,
            "args__EVAVisionTransformer__depth": 3,
            "args__VQDecoder__depth": 1,
        },
    ),
    "ta_tok, other layers and grids": (
        "ta_tok",
        {
            f"{VISION}num_hidden_layers": 5,
            "args__select_layer_id": -3,
            f"{VISION}patch_size": 10,
            "pool_scales": [1, 2],
        },
    ),
    "unitok, other stages": (
        "unitok",
        {
            "registered_tower__stage_dims": [16, 24, 40],
            "registered_tower__vit_heads": 5,
            "decoder_channels": [40, 24, 8],
        }
        | {"args__vocab_width": 20, "args__num_codebooks": 5, "args__vocab_size": 100},
    ),
    "unitok, one codebook": ("unitok", {"args__num_codebooks": 1}),
    "gigatok, sides that differ": (
        "gigatok",
        {"args__encoder_size": "mini", f"{LITERALS}size_mini": MINI, "args__decoder_ch_mult": [1, 2, 1]}
        | {"args__num_latent_tokens": 8, "args__use_attn": True, "args__adaptive_gn": False, "args__d2s_up": False},
    ),
    "flextok, sides that differ": (
        "flextok",
        {
            "args__enc_dim": 96,
            "args__dec_dim": 48,
            "args__head_dim": 24,
            "args__grid": 5,
            "args__fsq_levels": [7, 4, 3],
        },
    ),
    "restok, more stages than blocks": (
        "restok",
        {f"{VQ}hierarchy_stages": 4, f"{VQ}num_latent_tokens": 8, f"{VQ}rope_base_len": None},
    ),
    "restok, sides that differ": (
        "restok",
        {
            f"{VQ}vit_dec_model_size": "mini",
            f"{LITERALS}size_mini": MINI,
            "args__dataset__preprocessing__crop_size": 24,
        },
    ),
    "fqgan_triple, wider": (
        "fqgan_triple",
        {"args__encoder_ch_mult": [1, 1, 2], "args__decoder_ch_mult": [2, 2, 1], f"{LITERALS}adapter_width": 64},
    ),
    "omnitokenizer, heads that are no width": (
        "omnitokenizer",
        {"args__dim_head": 24, "args__enc_block": "tww", "args__dec_block": "w", "args__temporal_depth": 1},
    ),
    "mingtok, sides that differ": (
        "mingtok",
        {"args__low_level_encoder__embed_dim": 128, "args__pixel_decoder__embed_dim": 192}
        | {"args__low_level_encoder__img_size": 48, "args__pixel_decoder__patch_size": 2},
    ),
    "instella_bae, two turns": (
        "instella_bae",
        {"args__encoder_layers": 4, "args__downsample_idx": [0, 2], "args__decoder_layers": 3}
        | {"args__upsample_idx": [0, 1], "args__num_latent_tkns": 5, "args__codebook_size": 7},
    ),
    "atoken, other levels": (
        "atoken",
        {"args__latent_channels": 12, "args__quantizer_num_codebooks": 4, "args__quantizer_codebook_size": 125}
        | {"args__encoder_model_channels": 96, "args__encoder_num_heads": 6, "args__patch_size": [4, 4, 4]},
    ),
    "tokenflow, other scales": (
        "tokenflow",
        {f"{VISION}image_size": 48, f"{VISION}patch_size": 8, f"{LITERALS}scale_rq_layers": {"here": [1, 3, 6]}}
        | {"args__encoder_ch_mult": [1, 2], f"{LITERALS}pixel_branch_stride": {"here": 2}},
    ),
    "dualtoken, other depths": (
        "dualtoken",
        {"args__vq_pix__code_shape": [4, 4, 2], "args__vq_sem__embed_dim": 24, "args__decoder_latent_shape": [5, 5]}
        | {"args__layer_recon": 1, "args__layer_sem": 2},
    ),
}


def at_hand(names):
    return [name for name in names if SHAPES[name][0] in FIXTURES]


@pytest.mark.parametrize("name", at_hand(SHAPES))
@torch.no_grad()
def test_every_system_is_built_and_runs_at_other_sizes(name):
    system, changes = SHAPES[name]
    torch.manual_seed(0)
    codec = VisualCodecModel(UPSTREAMS[system].plan(changed(system, **changes)).config).eval()
    codes = codec.encode(inputs(codec))
    assert codec.decode(codes, condition=text(codec)).isfinite().all()


def with_fractions(node):
    """The same numbers, as JSON of a writer that has floats alone."""
    if isinstance(node, dict):
        return {name: with_fractions(value) for name, value in node.items()}
    if isinstance(node, list):
        return [with_fractions(value) for value in node]
    return float(node) if isinstance(node, int) and not isinstance(node, bool) else node


@pytest.mark.parametrize("system", FIXTURES)
def test_whole_numbers_may_be_spelled_as_fractions(system):
    fields = json.loads((stored(system) / "config.json").read_text())
    config, again = (
        UPSTREAMS[system].plan(UpstreamConfig(spelled)).config for spelled in (fields, with_fractions(fields))
    )
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("system", "changes", "said"),
    [
        ("ta_tok", {"args__bottleneck__args__bottleneck_dim": None}, r"no 'bottleneck\.args\.bottleneck_dim'"),
        ("dualtoken", {"args__ddconfig__ch": None}, r"no 'ddconfig\.ch'"),
        ("xomni_tokenizer", {"defaults_used__num_groups": 16}, "num_groups is 16"),
        ("tokenflow", {"args__codebook_l2_norm": False}, "codebook_l2_norm is not True"),
    ],
)
def test_what_is_missing_or_built_otherwise_is_named(system, changes, said):
    with pytest.raises(ValueError, match=said):
        UPSTREAMS[system].plan(changed(system, **changes))


def test_null_is_no_value():
    fields = json.loads((stored("ibq") / "config.json").read_text())
    fields["args"]["n_embed"] = None
    with pytest.raises(ValueError, match="'n_embed' is null"):
        UPSTREAMS["ibq"].plan(UpstreamConfig(fields))


def test_ibq_attends_by_nominal_sizes_that_are_halved_and_then_doubled():
    sizes = {f"{DD}resolution": 20, f"{DD}ch_mult": [1, 1, 1, 1], f"{DD}attn_resolutions": [5, 8]}
    config = UPSTREAMS["ibq"].plan(changed("ibq", **sizes)).config  # 20, 10, 5 and 2, then 4, 8 and 16
    assert (config.encoder["attention_levels"], config.decoder["attention_levels"]) == ([2], [1])


def test_rows_of_fqgan_are_plain_where_it_says_so():
    config = UPSTREAMS["fqgan_triple"].plan(changed("fqgan_triple", args__codebook_l2_norm=False)).config
    assert config.quantizer["normalize"] is False


def test_xomni_has_the_arguments_of_its_projector_and_their_defaults():
    absent = dict.fromkeys(("args__codebook_size", "args__codebook_dim"))
    config = UPSTREAMS["xomni_tokenizer"].plan(changed("xomni_tokenizer", **absent)).config
    assert (config.quantizer["size"], config.quantizer["dim"]) == (16384, 2048)
    config = UPSTREAMS["xomni_tokenizer"].plan(changed("xomni_tokenizer", args__conv_layers=3)).config
    assert config.decoder["blocks"] == 3


def rewritten(folder, system, weights, **changes):
    """Upstream's folder of a fixture with other weights and arguments."""
    folder.mkdir()
    fields = changed(system, **changes).fields
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(weights, folder / "weights.safetensors")
    return folder


def test_levels_of_restok_that_no_merge_reaches_stay_behind(tmp_path, golden):
    weights = load_file(golden("restok") / "weights.safetensors")
    level = weights["encoder.level_embedding.1"]
    weights |= {f"encoder.level_embedding.{index}": torch.randn_like(level) for index in (2, 3)}
    source = rewritten(tmp_path / "source", "restok", weights, **{f"{VQ}hierarchy_stages": 4})  # of three blocks
    report = convert("restok", source, tmp_path / "out")
    assert "encoder.level_embedding.3" in report.dropped
    codec = AutoModel.from_pretrained(report.target)
    assert codec.config.resampler["merge_in"] == [0, 1]
    assert codec.resampler.cell_levels[2].equal(weights["encoder.level_embedding.2"][0])
    assert codec.encode(reference("restok")["pixel_values"]).ids.shape[1] == 16


@torch.no_grad()
def test_unitok_with_one_codebook_has_one_code_per_cell(tmp_path, golden):
    weights = load_file(golden("unitok") / "weights.safetensors")
    rows = torch.randn(48, 32)
    weights = {key: weight for key, weight in weights.items() if "codebooks" not in key}
    weights["quantizer.codebooks.0.codebook.weight"] = rows
    source = rewritten(tmp_path / "source", "unitok", weights, args__num_codebooks=1, args__vocab_size=48)
    codec = AutoModel.from_pretrained(convert("unitok", source, tmp_path / "out").target).eval()
    pixels = reference("unitok")["pixel_values"]
    codes, positions = codec.encode(pixels), codec.resampler.sample(codec.encoder(pixels))
    nearest = torch.nn.functional.cosine_similarity(positions[:, :, None], rows, dim=-1).argmax(dim=-1)
    assert codes.ids[..., 0].equal(nearest)


def test_half_precision_becomes_the_codecs_own(tmp_path, golden):
    weights = load_file(golden("titok_single_stage") / "weights.safetensors")
    halved = {key: weight.half() for key, weight in weights.items()}
    source = rewritten(tmp_path / "source", "titok_single_stage", halved)
    codec = AutoModel.from_pretrained(convert("titok_single_stage", source, tmp_path / "out").target)
    assert {weight.dtype for weight in codec.parameters()} == {torch.float32}
    assert codec.quantizer.codebook.equal(halved["quantize.embedding.weight"].float())
