"""Every converter against outputs of its reference, at tiny size; a new system is one line of the registry."""

import json
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ELSEWHERE, stored
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from unimm import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel, VisualCodes
from unimm.cli.main import main
from unimm.codec.flow import Flow, ProjectedGuidance
from unimm.codec.image_processing import any_shape_size
from unimm.codec.selection import padded
from unimm.conversion import UPSTREAMS, convert, find_upstream
from unimm.conversion.upstream import UpstreamConfig
from unimm.sequence.vocabulary import VisualVocabulary

OUTPUTS = (
    "decoder_raw",
    "reconstruction",
    "decoded",
    "features",
    "image_embedding",
    "lowres_cond_argmax",
)  # what decoding gives, by upstream's name
CLAMPED = ("mingtok",)  # the reference clamps what it draws, and a codec does so in `pictures` alone
TOLERANCE = 1e-4  # absolute, in float32; the fixtures' own
# Whole systems are put together from parts; KARL's fixture lacks the VQGAN below it, which `test_karl.py` adds, and
# COMiT's goes through its network once, not from pictures to codes (`test_comit.py`), and Slot-MLLM's has its queries
# among the inputs (`test_slot_mllm.py`).
ELSEWHERE_TESTED = ("karl", "comit", "slot_qformer")
FIXTURES = [system for system in UPSTREAMS if stored(system).is_dir() and system not in ELSEWHERE_TESTED]
CODECS = [
    system
    for system in FIXTURES
    if UPSTREAMS[system].plan(UpstreamConfig(json.loads((stored(system) / "config.json").read_text()))).model_class
    is VisualCodecModel
]


@pytest.fixture(scope="session")
def converted(golden, tmp_path_factory):
    """Converts each system once: system -> folder."""
    root, done = tmp_path_factory.mktemp("converted"), {}

    def folder(system):
        if system not in done:
            done[system] = convert(system, golden(system), root / system, accept_licence=True).target
        return done[system]

    return folder


def reference(system):
    expected = load_file(stored(system) / "io.safetensors")
    return STORED_OTHERWISE[system](expected) if system in STORED_OTHERWISE else expected


def one_of_several(expected, index):
    """One of AToken's pictures, which stand in one sequence and differ in size, as other fixtures store a batch."""
    picture = expected[f"image_{index}"].permute(2, 0, 1)[None]
    mine = expected["coords"][:, 0] == index
    rows, columns = (expected["coords"][mine][-1, 2:4] + 1).tolist()
    side = picture.shape[2] // rows
    patches = expected["decoded_patches"][mine].view(rows, columns, -1, side, side, 3)[:, :, 0]  # the first frame
    drawn = patches.permute(4, 0, 2, 1, 3).reshape(1, *picture.shape[1:])
    return {
        "pixel_values": picture,
        "codes": expected["codes"][mine][None],
        "z_q": expected["z_q"][mine][None],
        "reconstruction": drawn,
    }


# Where a fixture covers more than pictures, or several of them at once: what it says of one batch.
STORED_OTHERWISE = {
    "atoken": lambda expected: one_of_several(expected, 0),
    "omnitokenizer": lambda expected: {
        "pixel_values": expected["image"],
        "codes": expected["codes_image"],
        "reconstruction": expected["reconstruction_image"],
    },
}


def pixels(expected):
    """What the codec reads."""
    return expected["pixel_values"] if "pixel_values" in expected else expected["vae_latents"]


# Where upstream's codes have more than one slot: to `[B, N, K]`.
SLOTS = {
    "unitok": lambda expected: expected["codes"].transpose(1, 2),
    "meditok": lambda expected: expected["codes"].transpose(1, 2),
    "evotok": lambda expected: expected["codes"].flatten(1, 2),
    "dualtoken": lambda expected: torch.cat([expected["codes_pix"], expected["codes_sem"]], dim=-1).flatten(1, 2),
    "atoken": lambda expected: expected["codes"],
    "dualvitok": lambda expected: streams(expected)[..., None],
    "instella_bae": lambda expected: expected["bits"],
    "fqgan": lambda expected: branches(expected, "sem", "vis"),
    "fqgan_triple": lambda expected: branches(expected, "vis", "sem_mid", "sem_high"),
}


def branches(expected, *names):
    return torch.stack([expected[f"codes_{name}"].flatten(1) for name in names], dim=-1)


def streams(expected):
    """DualViTok's two grids in one row, the second of them behind the first and in an alphabet of its own."""
    first = json.loads((stored("dualvitok") / "config.json").read_text())["args"]["semantic_quantizer"]["codebook_size"]
    return torch.cat([expected["codes_sem"].flatten(1), expected["codes_pix"].flatten(1) + first], dim=1)


def as_ids(codes):
    """Upstream's `[B, N]`, `[B, 1, N]` or `[B, h, w]` as `[B, N]`."""
    return codes.flatten(1)


def assert_codes(system, codes, expected):
    """All codes are the expected ones, where pictures differ in length those of all pictures in a row."""
    if system in SLOTS:
        assert codes.ids.equal(SLOTS[system](expected))
    elif "token_num_argmax" in expected:
        assert codes.lengths.equal(expected["token_num_argmax"])
        assert codes.ids[codes.mask][:, 0].equal(expected["codes_argmax"])
    elif "latent" in expected:
        torch.testing.assert_close(codes.side_info["latents"], expected["latent"], atol=TOLERANCE, rtol=0)
    else:
        assert codes.ids[..., 0].equal(as_ids(expected["codes"]))


@pytest.mark.parametrize("system", CODECS)
def test_codes_and_output_equal_the_reference(system, converted):
    codec, expected = AutoModel.from_pretrained(converted(system)).eval(), reference(system)
    codes = codec.encode(pixels(expected))
    assert codes.ids.dtype == torch.int64
    assert codes.ids.shape[2] == codec.spec.num_codebooks
    assert_codes(system, codes, expected)
    if "z_q" in expected:
        rows = expected["z_q"]
        rows = rows.flatten(2).transpose(1, 2) if rows.ndim == 4 else rows
        torch.testing.assert_close(codec.lookup(codes), rows, atol=TOLERANCE, rtol=0)
    if isinstance(codec.decoder, Flow):  # drawn from noise, in a test of its own
        return
    output = next(name for name in OUTPUTS if name in expected)
    drawn = codec.decode(codes, condition=expected.get("text_guidance"))
    drawn = drawn.clamp(-1, 1) if system in CLAMPED else drawn
    torch.testing.assert_close(drawn, expected[output], atol=TOLERANCE, rtol=0)


def these(*systems):
    """Those of them whose fixtures are at hand."""
    return [system for system in systems if system in FIXTURES]


def by_cell(grid):
    """`[B, D, rows, columns]` as `[B, N, D]`."""
    return grid.flatten(2).mT


def queries_of_seed(codec, features):
    """What the queries became, before they are mapped to the vectors that are quantised."""
    seen = []
    hook = codec.resampler.to_positions.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    positions = codec.resampler.sample(features)
    hook.remove()
    return {"query_output": seen[0], "z": positions}


# What lies between pixels and output, by the reference's name: of a codec, its encoder's features and its codes.
BETWEEN = {
    "unitok": lambda codec, features, codes: {
        "encoder_tokens": by_cell(features),
        "z": codec.resampler.sample(features),
        "post_quant": by_cell(codec.resampler.restore(codec.lookup(codes), codes.grid[0])),
    },
    "xomni_tokenizer": lambda codec, features, codes: {
        "features": by_cell(features),
        "z": codec.resampler.sample(features).mT.unflatten(2, codes.grid[0]),
        "lookup_raw": codec.lookup(codes).mT.unflatten(2, codes.grid[0]),
    },
    "seed_tokenizer": lambda codec, features, codes: {
        "image_embeds": by_cell(features),
        **queries_of_seed(codec, features),
        "query_output_up": codec.decoder.embed(codec.lookup(codes)),
    },
    "lavit_tokenizer": lambda codec, features, codes: {
        "vit_features": by_cell(features),
        "keep_argmax": (keep := codec.resampler.select(features, None)).long(),
        "z_argmax": codec.resampler.merge(features, keep)[keep.bool()],
    },
    "ta_tok": lambda codec, features, codes: {
        "vq_feats": codec.resampler.before(by_cell(features)),
        "z": codec.resampler.sample(features),
        "z_scale_index1": codec.resampler.sample(features, 2),
        "z_scale_index2": codec.resampler.sample(features, 3),
        "effective_table": codec.code_vectors()[0],
        "encoded": by_cell(codec.resampler.restore(codec.lookup(codes), codes.grid[0])),
    },
}


@pytest.mark.parametrize("system", these(*BETWEEN))
@torch.no_grad()
def test_what_lies_between_equals_the_reference(system, converted):
    codec, folder = AutoModel.from_pretrained(converted(system)).eval(), ELSEWHERE / system
    expected = load_file((folder if folder.is_dir() else stored(system)) / "io.safetensors")
    pixel_values = expected["pixel_values"]
    found = BETWEEN[system](codec, codec.encoder(pixel_values), codec.encode(pixel_values))
    compared = found.keys() & expected.keys()
    if not compared:
        pytest.skip("the fixture in this repository has codes and output alone; name whole ones by UNIMM_GOLDEN")
    for name in compared:
        torch.testing.assert_close(
            found[name], expected[name], atol=TOLERANCE, rtol=0, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("system", these("evotok", "tokenflow", "dualtoken"))
def test_features_beside_pixels_equal_the_reference(system, converted):
    codec, expected = AutoModel.from_pretrained(converted(system)).eval(), reference(system)
    features = codec.features(codec.encode(expected["pixel_values"]))
    torch.testing.assert_close(features, expected["semantic_features"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("system", these("dualvitok"))
@torch.no_grad()
def test_both_streams_of_dualvitok_equal_the_reference(system, converted):
    codec, expected = AutoModel.from_pretrained(converted(system)).eval(), reference(system)
    codes = codec.encode(expected["pixel_values"])
    by_cell = {
        name: expected[name].flatten(2).mT for name in ("z_q_sem", "z_q_pix", "semantic_target", "semantic_decoded")
    }
    close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)
    close(codec.lookup(codes)[..., 1:], torch.cat([by_cell["z_q_sem"], by_cell["z_q_pix"]], dim=1))
    close(codec.encoder.tower(expected["pixel_values"], expected["codes_sem"].shape[1:]), by_cell["semantic_target"])
    close(codec.features(codes), by_cell["semantic_decoded"])


@pytest.mark.parametrize("system", these("evotok"))
def test_the_first_codes_of_evotok_draw_and_all_of_them_mean(system, converted):
    codec, expected = AutoModel.from_pretrained(converted(system)).eval(), reference(system)
    codes = codec.encode(expected["pixel_values"])
    rows = torch.cat([expected["z_q_pixel"], expected["z_q_semantic"]], dim=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(codec.lookup(codes), rows, atol=TOLERANCE, rtol=0)
    late = VisualCodes(codes.ids.clone(), codes.mask, codes.grid)
    late.ids[..., 2:] = 0  # behind the depth that pixels are drawn from
    assert codec.decode(late).equal(codec.decode(codes))
    assert not codec.features(late).equal(codec.features(codes))


@pytest.mark.parametrize("system", CODECS)
def test_codes_survive_saving_and_a_bfloat16_load(system, converted, tmp_path):
    expected = reference(system)
    codec = AutoModel.from_pretrained(converted(system), dtype=torch.bfloat16)
    codec.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.fingerprint() == codec.fingerprint()
    assert_codes(system, again.encode(pixels(expected)), expected)


@pytest.mark.parametrize("system", CODECS)
def test_the_image_processor_has_the_codecs_range_and_size(system, converted):
    codec = AutoModel.from_pretrained(converted(system))
    if not codec.config.reads_pixels:
        assert not (converted(system) / "preprocessor_config.json").exists()
        return
    processor = AutoImageProcessor.from_pretrained(converted(system))
    white = torch.full((3, 40, 60), 255, dtype=torch.uint8)
    pixels = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in (white * 0, white)])
    for picture, value in zip(pixels, codec.config.pixel_bounds, strict=True):  # black, then white, of each channel
        torch.testing.assert_close(picture, torch.tensor(value)[:, None, None].expand_as(picture))
    upstream = json.loads((stored(system) / "config.json").read_text())
    if codec.config.pixel_mean is None:
        assert list(codec.config.pixel_range) == upstream["pixel_range"]
    codec.config.grid(*pixels.shape[2:])


@pytest.fixture
def source(tmp_path):
    """A copy of one fixture to spoil."""
    folder = tmp_path / "source"
    shutil.copytree(stored("llamagen_vq"), folder)
    return folder


def spoil(folder, change):
    weights = load_file(folder / "weights.safetensors")
    change(weights)
    save_file(weights, folder / "weights.safetensors")


def test_a_key_that_no_rule_takes_is_named(source, tmp_path):
    spoil(source, lambda weights: weights.update({"encoder.extra.weight": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"No rule takes 'encoder\.extra\.weight'"):
        convert("llamagen_vq", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_key_is_named(source, tmp_path):
    spoil(source, lambda weights: weights.pop("decoder.norm_out.weight"))
    with pytest.raises(ValueError, match=r"lack what becomes 'decoder\.norm\.weight'"):
        convert("llamagen_vq", source, tmp_path / "out")


def test_a_shape_that_the_configuration_does_not_give_is_named(source, tmp_path):
    spoil(source, lambda weights: weights.update({"quantize.embedding.weight": torch.ones(32, 8)}))
    with pytest.raises(ValueError, match=r"quantizer\.codebook is \(32, 8\) in the weights and \(64, 8\)"):
        convert("llamagen_vq", source, tmp_path / "out")


def test_the_weights_of_another_system_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is of 'llamagen_vq', not of 'ibq'"):
        convert("ibq", source, tmp_path / "out")
    shutil.copy(stored("ibq") / "weights.safetensors", source)
    with pytest.raises(ValueError, match="No rule takes"):
        convert("llamagen_vq", source, tmp_path / "out")


def test_damaged_or_absent_files_are_refused(source, tmp_path):
    (source / "weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        convert("llamagen_vq", source, tmp_path / "out")
    for file in source.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        convert("llamagen_vq", source, tmp_path / "out")
    (source / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="can run code when it is read"):
        convert("llamagen_vq", source, tmp_path / "out")
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert("llamagen_vq", source, tmp_path / "out")


def test_an_incomplete_configuration_names_what_it_lacks(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stored("ibq"), source)
    fields = json.loads((source / "config.json").read_text())
    del fields["args"]["ddconfig"]["ch_mult"]
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"no 'ddconfig\.ch_mult'"):
        convert("ibq", source, tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(source):
    with pytest.raises(ValueError, match="exists already"):
        convert("llamagen_vq", source, source)


def test_unknown_systems_get_near_names():
    with pytest.raises(ValueError, match="Did you mean llamagen"):
        find_upstream("llama-gen")
    assert find_upstream("LlamaGen").system == "llamagen_vq"


def test_the_command_line_says_what_it_did(source, tmp_path, capsys):
    assert main(["convert", "llamagen_vq", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "MIT" in said
    assert "157 tensors converted" in said
    assert main(["convert", "lamagen", str(source), str(tmp_path / "other")]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_arguments_that_nothing_reads_are_named(source, tmp_path):
    fields = json.loads((source / "config.json").read_text())
    fields["args"] |= {"l2_norm": True, "training": {"lr": 1e-4}}  # the first is misspelt
    (source / "config.json").write_text(json.dumps(fields))
    report = convert("llamagen_vq", source, tmp_path / "out")
    assert {"l2_norm", "training.lr"} <= {*report.unread}
    assert "codebook_size" not in report.unread
    assert "that nothing reads: " in str(report)


def test_inspection_shows_presets_and_converted_codecs(converted, capsys):
    assert main(["inspect", "codec", "smallest"]) == 0
    assert main(["inspect", "codec", str(converted("titok_single_stage"))]) == 0
    said = capsys.readouterr().out
    assert "quantizer  fsq (levels [4, 4, 4])" in said
    assert "codes      12 positions, 64, 72 bits" in said
    assert main(["inspect", "codec", "smalest"]) == 2
    assert "Did you mean smallest" in capsys.readouterr().err


@pytest.mark.parametrize("system", CODECS)
def test_wrong_pixels_and_codes_are_refused(system, converted):
    codec, expected = AutoModel.from_pretrained(converted(system)), reference(system)
    good = pixels(expected)[:1]
    wrong = [torch.cat([good, good[:, :1]], dim=1), good.to(torch.uint8), good[0]]
    if codec.config.reads_pixels:
        wrong += [good * 1000 + 100]
    if not codec.config.resize:
        wrong += [good[..., :-1] if codec.config.downsample > 1 else good[..., :0]]
    for values in wrong:
        with pytest.raises(ValueError, match=r"pixel_values|cannot take"):
            codec.encode(values)
    codes = codec.encode(good)
    if not codec.spec_without_fingerprint.sizes:
        with pytest.raises(ValueError, match="continuous latents and no ids"):
            codec.decode(VisualCodes(codes.ids, codes.mask, codes.grid))
        return
    for value in (-1, codec.spec_without_fingerprint.sizes[-1]):
        outside = VisualCodes(codes.ids.clone(), codes.mask, codes.grid)
        outside.ids[0, 0, -1] = value
        with pytest.raises(ValueError, match="range over"):
            codec.lookup(outside)
    with pytest.raises(ValueError, match="slots"):
        codec.lookup(VisualCodes(codes.ids.repeat(1, 1, 2), codes.mask, codes.grid))


def test_a_shorter_one_d_piece_is_the_first_codes(converted):
    codec, expected = AutoModel.from_pretrained(converted("one_d_piece")), reference("one_d_piece")
    whole = codec.encode(expected["pixel_values"])
    for length in (1, 5):
        short = codec.encode(expected["pixel_values"], num_tokens=length)
        assert short.ids.equal(whole.ids[:, :length])
        drawn = codec.decode(short)
        torch.testing.assert_close(drawn, expected[f"reconstruction_length_{length}"], atol=TOLERANCE, rtol=0)
    for length in (0, whole.ids.shape[1] + 1):
        with pytest.raises(ValueError, match="makes and decodes 1 to"):
            codec.encode(expected["pixel_values"], num_tokens=length)


def test_titok_has_one_length(converted):
    codec, expected = AutoModel.from_pretrained(converted("titok_single_stage")), reference("titok_single_stage")
    codes = codec.encode(expected["pixel_values"])
    cut = VisualCodes(codes.ids[:, :5], codes.mask[:, :5])
    with pytest.raises(ValueError, match="makes and decodes exactly"):
        codec.decode(cut)
    padded = VisualCodes(codes.ids, torch.arange(codes.ids.shape[1]) < torch.tensor([[5], [9]]))
    with pytest.raises(ValueError, match="one length at a time"):
        codec.decode(padded)


def test_ta_titok_draws_under_a_text_and_not_without(converted):
    codec, expected = AutoModel.from_pretrained(converted("ta_titok")), reference("ta_titok")
    codes, text = codec.encode(expected["pixel_values"]), expected["text_guidance"]
    assert not codec.decode(codes, condition=text).equal(codec.decode(codes, condition=text.flip(0)))
    for condition in (None, text[:, 1:]):
        with pytest.raises(ValueError, match="decodes under a text"):
            codec.decode(codes, condition=condition)
    plain = AutoModel.from_pretrained(converted("titok_single_stage"))
    with pytest.raises(ValueError, match="takes no condition"):
        plain.decode(codes, condition=text)


def test_xomni_reads_its_own_grid_and_others(converted):
    codec, expected = AutoModel.from_pretrained(converted("xomni_tokenizer")), reference("xomni_tokenizer")
    codes = codec.encode(expected["pixel_values_native"])
    assert codes.ids[..., 0].equal(as_ids(expected["codes_native"]))
    torch.testing.assert_close(codec.decode(codes), expected["decoded_native"], atol=TOLERANCE, rtol=0)
    raw = codec.lookup(codes).transpose(1, 2).unflatten(2, codes.grid[0])
    torch.testing.assert_close(raw, expected["lookup_raw_native"], atol=TOLERANCE, rtol=0)


def test_ta_tok_pools_its_grid_and_fits_pictures_to_it(converted):
    codec, expected = AutoModel.from_pretrained(converted("ta_tok")), reference("ta_tok")
    for scale in (1, 2):
        wanted = expected[f"codes_scale_index{scale}"]
        codes = codec.encode(expected["pixel_values"], num_tokens=wanted.shape[1])
        assert codes.ids[..., 0].equal(wanted)
        features = expected[f"features_scale_index{scale}"]
        torch.testing.assert_close(codec.decode(codes), features, atol=TOLERANCE, rtol=0)
    other = codec.encode(expected["pixel_values_other_size"])
    assert other.ids[..., 0].equal(expected["codes_other_size"])
    with pytest.raises(ValueError, match="this codec makes"):
        codec.encode(expected["pixel_values"], num_tokens=7)


def test_instella_draws_at_the_size_it_read_and_stretches_positions_on_request(converted):
    codec, expected = AutoModel.from_pretrained(converted("instella_bae")).eval(), reference("instella_bae")
    codes = codec.encode(expected["pixel_values"])
    assert codes.side_info["size"].tolist() == [[32, 48]] * 2
    generated = VisualCodes(codes.ids, codes.mask, side_info={"size": torch.tensor([[16, 16], [32, 48]])})
    with pytest.raises(ValueError, match="pictures of one"):
        codec.decode(generated)
    side = codec.config.image_size = 64
    assert codec.decode(VisualCodes(codes.ids, codes.mask)).shape == (2, 3, side, side)
    config = codec.config.to_dict()
    for socket in ("resampler", "decoder"):
        config[socket]["nominal_side"] = 40 // codec.config.downsample
    stretched = AutoModel.from_pretrained(converted("instella_bae"), config=type(codec.config)(**config)).eval()
    codes = stretched.encode(expected["pixel_values"])
    assert codes.ids.equal(expected["bits_scaled"])
    torch.testing.assert_close(stretched.decode(codes), expected["reconstruction_scaled"], atol=TOLERANCE, rtol=0)


def test_atoken_takes_pictures_of_another_shape_and_refuses_continuous_models(converted):
    codec = AutoModel.from_pretrained(converted("atoken")).eval()
    expected = one_of_several(load_file(stored("atoken") / "io.safetensors"), 1)
    codes = codec.encode(expected["pixel_values"])
    assert codes.grid == [(4, 2)]
    assert codes.ids.equal(expected["codes"])
    torch.testing.assert_close(codec.decode(codes), expected["reconstruction"], atol=TOLERANCE, rtol=0)
    fields = json.loads((stored("atoken") / "config.json").read_text())
    for name, value in (("use_quantizer", False), ("decoder_pe_mode", "ape"), ("quantizer_codebook_size", 4095)):
        with pytest.raises(ValueError, match=r"continuous latents|knows 'joint' only|no equal levels"):
            find_upstream("atoken").plan(UpstreamConfig({"args": fields["args"] | {name: value}}))


def test_omnitokenizer_searches_raw_rows_and_refuses_what_no_picture_needs(converted):
    codec, expected = AutoModel.from_pretrained(converted("omnitokenizer")).eval(), reference("omnitokenizer")
    rows = codec.lookup(codec.encode(expected["pixel_values"])).norm(dim=-1)
    assert rows.amax() - rows.amin() > 0.1
    args = json.loads((stored("omnitokenizer") / "config.json").read_text())["args"]
    for name, value in (("use_vae", True), ("spatial_pos", "rel"), ("enc_block", "ta")):
        with pytest.raises(ValueError, match=rf"^{name} is"):
            find_upstream("omnitokenizer").plan(UpstreamConfig({"args": args | {name: value}}))
    del args["causal_in_peg"]
    plans = [find_upstream("omnitokenizer").plan(UpstreamConfig({"args": args | more})) for more in ({}, MISSPELLED)]
    kernel = torch.arange(27.0).view(1, 1, 3, 3, 3)
    moments = [
        next(rule.change(kernel) for rule in plan.renames if rule.target.endswith("beside.weight")) for plan in plans
    ]
    assert [moment.flatten().tolist() for moment in moments] == [list(range(18, 27)), list(range(9, 18))]


MISSPELLED = {"casual_in_peg": False}  # as released configurations have it


@torch.no_grad()
def test_mingtok_unfolds_latents_one_after_the_other(converted):
    codec, expected = AutoModel.from_pretrained(converted("mingtok")).eval(), reference("mingtok")
    codes = codec.encode(expected["pixel_values"])
    torch.testing.assert_close(codec.features(codes), expected["features"], atol=TOLERANCE, rtol=0)
    unfolded = codec.decoder.unfolded(codes.side_info["latents"])
    torch.testing.assert_close(unfolded, expected["features_incremental"], atol=TOLERANCE, rtol=0)
    begun = codec.decoder.unfolded(codes.side_info["latents"][:, :5])
    torch.testing.assert_close(begun, unfolded[:, :5], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="continuous latents has none"):
        VisualVocabulary(8, codec.spec.sizes, 0, 1, 2, 3)


def test_mingtok_reads_a_larger_picture(converted):
    expected, size = reference("mingtok"), {"rows": 5, "columns": 5, "tokens": 26}
    config = AutoConfig.from_pretrained(converted("mingtok")).to_dict()
    config = VisualCodecConfig(**config | {"image_size": 40, "length": config["length"] | size})
    codec = AutoModel.from_pretrained(converted("mingtok"), config=config).eval()
    codes = codec.encode(expected["pixel_values_larger"])
    torch.testing.assert_close(codes.side_info["latents"], expected["latent_larger"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(codec.features(codes), expected["features_larger"], atol=TOLERANCE, rtol=0)
    drawn = codec.decode(codes).clamp(-1, 1)
    torch.testing.assert_close(drawn, expected["reconstruction_larger"], atol=TOLERANCE, rtol=0)


def test_seed_looks_up_raw_rows_and_its_queries_are_causal(converted):
    codec, expected = AutoModel.from_pretrained(converted("seed_tokenizer")), reference("seed_tokenizer")
    codes = codec.encode(expected["pixel_values"])
    torch.testing.assert_close(codec.lookup(codes), expected["lookup"], atol=TOLERANCE, rtol=0)
    changed = 5  # the first query that becomes another
    with torch.no_grad():
        codec.resampler.queries[changed:] = torch.randn_like(codec.resampler.queries[changed:])
    again = codec.encode(expected["pixel_values"])
    assert again.ids[:, :changed].equal(codes.ids[:, :changed])
    assert not again.ids[:, changed:].equal(codes.ids[:, changed:])


def test_flextok_codes_latents_and_its_registers_are_causal(converted):
    codec, expected = AutoModel.from_pretrained(converted("flextok")), reference("flextok")
    latents = expected["vae_latents"]
    with torch.no_grad():
        positions = codec.resampler.sample(codec.encoder(latents))
    torch.testing.assert_close(positions, expected["registers"], atol=TOLERANCE, rtol=0)
    codes = codec.encode(latents)
    torch.testing.assert_close(codec.lookup(codes), expected["lookup"], atol=TOLERANCE, rtol=0)
    assert codec.encode(latents, num_tokens=3).ids.equal(codes.ids[:, :3])
    changed = 5  # the first register that becomes another
    with torch.no_grad():
        codec.resampler.registers[changed:] = torch.randn_like(codec.resampler.registers[changed:])
    again = codec.encode(latents)
    assert again.ids[:, :changed].equal(codes.ids[:, :changed])
    assert not again.ids[:, changed:].equal(codes.ids[:, changed:])
    with pytest.raises(ValueError, match=r"floats \[B, 4, H, W\]"):
        codec.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"give decode\(codes\) to its decoder"):
        codec.pictures(codes)


@torch.no_grad()
def test_restok_merges_cells_into_levels_and_draws_from_the_first_codes(converted):
    codec, expected = AutoModel.from_pretrained(converted("restok")).eval(), reference("restok")
    close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)
    features = codec.encoder(expected["pixel_values"])
    levels = codec.resampler.read(features)
    close(levels.cells[0].transpose(1, 2)[:, :, None], expected["last_image_tokens"])
    close(levels.cells[-1].transpose(1, 2).unflatten(2, features.shape[2:]), expected["first_image_tokens"])
    close(codec.resampler.sample(features).transpose(1, 2)[:, :, None], expected["z"])
    for place, length in enumerate(json.loads((stored("restok") / "config.json").read_text())["prefix_lengths"]):
        codes = codec.encode(expected["pixel_values"], num_tokens=length)
        close(codec.decode(codes), expected[f"reconstruction_prefix_{place}"])
    codec.resampler.latent_levels[3:] = torch.randn_like(codec.resampler.latent_levels[3:])  # from the fifth latent on
    again = codec.resampler.read(features)
    assert again.latents[:, :4].equal(levels.latents[:, :4])
    assert not again.latents[:, 4:].isclose(levels.latents[:, 4:]).all()
    assert all(one.equal(other) for one, other in zip(again.cells, levels.cells, strict=True))


@torch.no_grad()
def test_gigatok_reads_and_draws_by_queries(converted):
    codec, expected = AutoModel.from_pretrained(converted("gigatok")).eval(), reference("gigatok")
    close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)
    features = codec.encoder(expected["pixel_values"])
    close(features, expected["cnn_features"])
    close(codec.resampler.sample(features).transpose(1, 2)[:, :, None], expected["z"])
    codes = codec.encode(expected["pixel_values"])
    close(codec.features(codes), expected["distill_features"])
    hidden = codec.decoder.reader(*codec.decoder.begun(codec.lookup(codes))).transpose(1, 2)
    close(codec.decoder.to_grid(hidden.unflatten(2, features.shape[2:])), expected["spatial"])


@pytest.mark.parametrize(("name", "value"), [("rope_1d", True), ("multi_level_query_init", False)])
def test_a_gigatok_that_is_built_otherwise_is_refused(name, value):
    fields = json.loads((stored("gigatok") / "config.json").read_text())
    fields["args"][name] = value
    with pytest.raises(ValueError, match=f"{name} is not {not value}"):
        UPSTREAMS["gigatok"].plan(UpstreamConfig(fields))


def test_a_gigatok_that_does_not_say_how_its_queries_begin_is_refused():
    fields = json.loads((stored("gigatok") / "config.json").read_text())
    del fields["args"]["multi_level_query_init"]  # upstream's default is another one
    with pytest.raises(ValueError, match="multi_level_query_init is not True"):
        UPSTREAMS["gigatok"].plan(UpstreamConfig(fields))


@pytest.mark.parametrize(("name", "value"), [("is_legacy", False), ("multi_quant", False), ("vit_enc_patch_size", 8)])
def test_a_restok_that_is_built_otherwise_is_refused(name, value):
    fields = json.loads((stored("restok") / "config.json").read_text())
    fields["args"]["model"]["vq_model"][name] = value
    with pytest.raises(ValueError, match=f"{name} is not"):
        UPSTREAMS["restok"].plan(UpstreamConfig(fields))


@torch.no_grad()
def test_fqgan_with_two_factors_is_the_one_with_three_without_the_last(tmp_path, golden, converted):
    source = tmp_path / "source"
    shutil.copytree(golden("fqgan_triple"), source)
    fields = json.loads((source / "config.json").read_text()) | {"system": "fqgan"}
    (source / "config.json").write_text(json.dumps(fields))
    weights = {
        key.replace("semantic_head_mid", "semantic_head").replace("sem_mid", "sem"): weight
        for key, weight in load_file(source / "weights.safetensors").items()
        if "sem_high" not in key and "semantic_head_high" not in key
    }
    drawn = weights["post_quant_conv.weight"]
    weights["post_quant_conv.weight"] = drawn[:, : 2 * drawn.shape[1] // 3].contiguous()  # visual, then semantic
    save_file(weights, source / "weights.safetensors")
    two = AutoModel.from_pretrained(convert("fqgan", source, tmp_path / "out", accept_licence=True).target).eval()
    three = AutoModel.from_pretrained(converted("fqgan_triple")).eval()
    expected = reference("fqgan_triple")
    codes = two.encode(expected["pixel_values"])
    assert codes.ids.equal(branches(expected, "sem_mid", "vis"))  # semantic first, as upstream encodes two
    vectors = three.lookup(VisualCodes(branches(expected, "vis", "sem_mid", "sem_high"), codes.mask, codes.grid))
    vectors[..., 2 * vectors.shape[-1] // 3 :] = 0
    cells = [codec.resampler.restore(v, codes.grid[0]) for codec, v in ((two, two.lookup(codes)), (three, vectors))]
    torch.testing.assert_close(*cells)


@torch.no_grad()
def test_meditok_is_unitok_with_causal_attention(tmp_path, converted):
    shutil.copytree(stored("unitok"), tmp_path / "source")
    fields = json.loads((tmp_path / "source" / "config.json").read_text()) | {"system": "meditok"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(fields))
    causal = AutoModel.from_pretrained(convert("meditok", tmp_path / "source", tmp_path / "out").target).eval()
    plain = AutoModel.from_pretrained(converted("unitok")).eval()
    assert causal.fingerprint() == plain.fingerprint()
    assert causal.config.resampler == plain.config.resampler | {"causal": True}
    features = causal.encoder(reference("unitok")["pixel_values"])
    later = features.clone()
    later[..., -1, -1] = torch.randn(later.shape[:2])  # the last cell
    for codec, unchanged in ((causal, True), (plain, False)):
        one, other = (codec.resampler.sample(cells)[:, :-1] for cells in (features, later))
        assert torch.allclose(one, other, atol=1e-6) == unchanged
        one, other = (codec.resampler.restore(vectors, (1, 2))[..., 0] for vectors in randomly_ended(codec.dim))
        assert torch.allclose(one, other, atol=1e-6) == unchanged


def randomly_ended(dim):
    """Two positions `[1, 2, dim]`, the second of them drawn twice."""
    first, ends = torch.randn(1, 1, dim), torch.randn(2, 1, 1, dim)
    return [torch.cat([first, end], dim=1) for end in ends]


@torch.no_grad()
def test_the_flow_of_flextok_equals_the_reference(converted):
    codec, expected = AutoModel.from_pretrained(converted("flextok")).eval(), reference("flextok")
    decoder, vectors = codec.decoder, codec.lookup(codec.encode(expected["vae_latents"]))
    noise, time, everything = expected["noise"], expected["timesteps"], torch.ones(2, dtype=torch.bool)
    close = partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)
    close(decoder.velocity(noise, time, vectors), expected["velocity"])
    close(decoder.velocity(noise, time, vectors, everything), expected["velocity_null"])
    plain = ProjectedGuidance(scale=2.0, momentum=0.0, norm_threshold=0.0, parallel=1.0)
    close(decoder.sample(vectors, noise, steps=3, guidance=ProjectedGuidance(scale=1.0)), expected["sample_3_steps"])
    close(decoder.sample(vectors, noise, steps=3, guidance=plain), expected["sample_cfg_3_steps"])
    projected = ProjectedGuidance(scale=4.0, momentum=-0.5, norm_threshold=2.5, parallel=0.0)
    for picture, length in enumerate(expected["keep_k"].tolist()):
        one = slice(picture, picture + 1)
        kept = vectors[one, :length]
        close(decoder.velocity(noise[one], time[one], kept), expected["velocity_keep_k"][one])
        drawn = decoder.sample(kept, noise[one], steps=3, guidance=projected)
        close(drawn, expected["sample_apg_3_steps_keep_k"][one])


@pytest.mark.parametrize("system", these("uniflow"))
@torch.no_grad()
def test_the_flow_of_uniflow_equals_the_reference(system, converted):
    codec, expected = AutoModel.from_pretrained(converted(system)).eval(), reference(system)
    decoder, close = codec.decoder, partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)
    pixel_values = expected["pixel_values"]
    close(codec.encoder(pixel_values).flatten(2).mT, expected["vit_tokens"])
    codes = codec.encode(pixel_values)
    vectors = codec.resampler.restore(codec.lookup(codes), codes.grid[0])
    conditions = decoder.conditions(vectors)
    close(conditions, expected["condition"])
    patches = {"output_size": pixel_values.shape[2:], "kernel_size": decoder.patch, "stride": decoder.patch}
    noise, velocity = (  # a row for each patch, as a picture
        F.fold(expected[name].unflatten(0, (len(pixel_values), -1)).mT, **patches) for name in ("noise", "velocity_t04")
    )
    close(decoder.velocity(noise, torch.full((len(noise),), 0.6), conditions), -velocity)  # counted from the picture
    torch.testing.assert_close(decoder.sample(vectors, noise), expected["reconstruction"], atol=5e-4, rtol=0)


@pytest.mark.parametrize(("name", "value"), [("use_cfg", True), ("norm_type", "rms_norm"), ("vit_hidden_size", 64)])
def test_a_uniflow_that_is_built_otherwise_is_refused(name, value):
    published = UPSTREAMS["uniflow"].plan(UpstreamConfig({}))
    assert published.config.length_policy.max_length == 1024
    with pytest.raises(ValueError, match=f"{name}"):
        UPSTREAMS["uniflow"].plan(UpstreamConfig({name: value}))


def test_seed_takes_normalised_pixels_of_its_tower_and_no_bytes(converted):
    codec = AutoModel.from_pretrained(converted("seed_tokenizer"))
    assert codec.config.pixel_bounds[1] == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-4)
    with pytest.raises(ValueError, match="pixel_values range over"):
        codec.encode(torch.full((1, 3, 56, 56), 255.0))
    with pytest.raises(ValueError, match="with a detokenizer"):
        codec.pictures(codec.encode(torch.zeros(1, 3, 56, 56)))


def test_lavit_selects_by_content_and_by_chance_on_request(converted):
    codec, expected = AutoModel.from_pretrained(converted("lavit_tokenizer")), reference("lavit_tokenizer")
    pixels = expected["pixel_values"]
    codes = codec.encode(pixels)
    assert len(set(codes.lengths.tolist())) > 1
    torch.testing.assert_close(codec.lookup(codes)[codes.mask], expected["z_q_argmax"], atol=TOLERANCE, rtol=0)
    for picture, length in enumerate(codes.lengths.tolist()):  # what stands beside a picture changes nothing
        alone = codec.encode(pixels[picture : picture + 1])
        assert alone.ids[0].equal(codes.ids[picture, :length])
        torch.testing.assert_close(codec.decode(alone)[0], codec.decode(codes)[picture], atol=TOLERANCE, rtol=0)
    drawn = [codec.encode(pixels, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert drawn[0].ids.equal(drawn[1].ids)
    assert not drawn[0].ids.equal(drawn[2].ids)
    with pytest.raises(ValueError, match="up to the picture"):
        codec.encode(pixels, num_tokens=4)


@torch.no_grad()
def test_lavit_merges_what_its_own_noise_kept(converted):
    codec, expected = AutoModel.from_pretrained(converted("lavit_tokenizer")), reference("lavit_tokenizer")
    features, select = codec.encoder(expected["pixel_values"]), codec.resampler
    scores = select.selector(features.flatten(2).transpose(1, 2))
    torch.testing.assert_close(scores, expected["pred_score"], atol=TOLERANCE, rtol=0)
    keep = select.choose(scores, expected["gumbel_noise"])
    assert keep.long().equal(expected["keep_sampled"])
    positions = select.merge(features, keep)[keep.bool()]
    torch.testing.assert_close(positions, expected["z_sampled"], atol=TOLERANCE, rtol=0)
    ids, mask = padded(codec.quantizer(positions[None]).ids[0], keep.bool())
    assert ids[mask][:, 0].equal(expected["codes_sampled"])
    drawn = codec.decode(VisualCodes(ids, mask))
    torch.testing.assert_close(drawn, expected["lowres_cond_sampled"], atol=TOLERANCE, rtol=0)
    assert select.choose(torch.tensor([[[-9.0, 0.0], [-8.0, 0.0]]])).tolist() == [[0.0, 1.0]]  # never nothing


@pytest.mark.parametrize("system", [system for system in FIXTURES if UPSTREAMS[system].restricted])
def test_a_restricted_licence_must_be_accepted(system, golden, tmp_path):
    with pytest.raises(ValueError, match="--accept-licence"):
        convert(system, golden(system), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(system, golden(system), tmp_path / "out", accept_licence=True)


def test_a_detokenizer_beside_a_tokenizer_alone_is_refused(golden, tmp_path):
    with pytest.raises(ValueError, match="a tokenizer alone"):
        convert("titok_single_stage", golden("titok_single_stage"), tmp_path / "out", detokenizer=tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_input_statistic_that_the_codec_does_not_hold_is_refused(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stored("ta_tok"), source)
    spoil(source, lambda weights: weights["scale_layer.shift"].fill_(0.4))
    with pytest.raises(ValueError, match=r"this converter knows 0\.5 only"):
        convert("ta_tok", source, tmp_path / "out", accept_licence=True)


def test_xomni_keeps_the_shape_of_pictures(tmp_path):
    expected = reference("xomni_tokenizer")
    for (width, height), wanted in zip(
        expected["preprocess_sizes_in"].tolist(), expected["preprocess_sizes_out"].tolist(), strict=True
    ):
        if wanted == [0, 0]:
            with pytest.raises(ValueError, match="Crop it"):
                any_shape_size(width, height)
        else:
            assert list(any_shape_size(width, height)) == wanted
    arguments = json.loads((stored("xomni_tokenizer") / "config.json").read_text())
    VisualCodecImageProcessor(any_shape=arguments["preprocess_args_for_preprocess_image"]).save_pretrained(tmp_path)
    processor = VisualCodecImageProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(expected["preprocess_image"].numpy())
    values = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(values, expected["preprocess_pixel_values"], atol=1e-6, rtol=0)


def changed(folder, **values):
    """The configuration of a fixture with other arguments, `__` for the dots of a path; None takes one out."""
    fields = json.loads((stored(folder) / "config.json").read_text())
    for path, value in values.items():
        *way, last = path.split("__")
        node = fields
        for name in way:
            node = node[name]
        node.pop(last) if value is None else node.update({last: value})
    return UpstreamConfig(fields)


def test_ta_tok_has_a_code_for_each_cell_whatever_its_configuration_counts():
    whole = UPSTREAMS["ta_tok"].plan(changed("ta_tok")).config
    for number in (None, 256):
        assert UPSTREAMS["ta_tok"].plan(changed("ta_tok", args__bottleneck_token_num=number)).config == whole


def test_ta_titok_has_the_defaults_of_titok():
    path = "args__model__vq_model__"
    values = {f"{path}is_legacy": None, f"{path}finetune_decoder": None}
    config = UPSTREAMS["ta_titok"].plan(changed("ta_titok", **values)).config
    assert config.resampler["scramble"]
    assert "soft_codebook" in config.decoder


@pytest.mark.parametrize("pixels", [128, 64, 2048])
def test_xomni_takes_long_pictures_whatever_the_side_of_its_table(pixels):
    values = {"patched_literals__img_size_of_position_table": pixels}
    config = UPSTREAMS["xomni_tokenizer"].plan(changed("xomni_tokenizer", **values)).config
    patch = config.encoder["patch"]
    assert config.image_size % patch == 0
    config.grid(4 * patch, 18 * patch)


@pytest.mark.parametrize("name", ["l2_normalize", "ddconfig__tanh_out"])
def test_an_ibq_that_is_built_otherwise_is_refused(name):
    with pytest.raises(ValueError, match="only models with False"):
        UPSTREAMS["ibq"].plan(changed("ibq", **{f"args__{name}": True}))


@torch.no_grad()
def test_continuous_latents_of_titok_are_the_first_half_of_its_channels(converted, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stored("titok_single_stage"), source)
    fields = json.loads((source / "config.json").read_text())
    fields["args"]["model"]["vq_model"]["quantize_mode"] = "vae"
    (source / "config.json").write_text(json.dumps(fields))

    def change(weights):
        del weights["quantize.embedding.weight"]
        for leaf in ("weight", "bias"):
            mean = weights[f"encoder.conv_out.{leaf}"]
            weights[f"encoder.conv_out.{leaf}"] = torch.cat([mean, torch.randn_like(mean)])

    spoil(source, change)
    report = convert("titok_single_stage", source, tmp_path / "continuous")
    assert "12 continuous channels" in report.codes
    codec, discrete = (
        AutoModel.from_pretrained(path).eval() for path in (report.target, converted("titok_single_stage"))
    )
    pixels = reference("titok_single_stage")["pixel_values"]
    codes = codec.encode(pixels)
    means = discrete.resampler.sample(discrete.encoder(pixels))
    torch.testing.assert_close(codes.side_info["latents"], means, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(codes), discrete.decoder(means), atol=1e-4, rtol=0)
    for change, said in (({"finetune_decoder": True}, "no second stage"), ({"quantize_mode": "fsq"}, "'vq' or 'vae'")):
        fields["args"]["model"]["vq_model"] |= change
        (source / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=said):
            convert("titok_single_stage", source, tmp_path / "other")
