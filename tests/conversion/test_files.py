"""Upstream's own files, as published: the wrapper around the weights, their names, moving averages, several of them."""

import argparse
import json
import shutil
import sys
from types import ModuleType

import pytest
import torch
from conftest import stored
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from unimm.conversion import convert, find_upstream, restore


def split(weights, *prefixes):
    """The weights of each prefix, without it."""
    return [{k.removeprefix(p): w for k, w in weights.items() if k.startswith(p)} for p in prefixes]


def trained(weights):
    """What LlamaGen's training script stores; the average that is evaluated is the fixture."""
    behind = {key: tensor + 1 for key, tensor in weights.items()}
    return {"ema": weights, "model": behind, "steps": 3, "args": argparse.Namespace(codebook_size=64)}


def tower_apart(weights):
    """LaVIT's three files."""
    tower, tokenizer, decoder = split(weights, "tokenizer_encoder.encoder.", "tokenizer_encoder.", "tokenizer_decoder.")
    tokenizer = {key: tensor for key, tensor in tokenizer.items() if not key.startswith("encoder.")}
    files = {"eva_vitg_psz14": tower, "tokenizer_encoder": tokenizer, "tokenizer_decoder": decoder}
    return {f"visual_tokenizer/{name}.bin": state for name, state in files.items()}


# What upstream publishes: file -> what it holds, by the fixture's weights.
PUBLISHED = {
    "llamagen_vq": lambda weights: {"vq_ds16_c2i.pt": {"model": weights}},
    "gigatok": lambda weights: {"VQ_BL256.pt": trained(weights)},
    "fqgan": lambda weights: {"fqgan_dual_ds16.pt": {"model": weights}},
    "fqgan_triple": lambda weights: {"fqgan_triple_ds16.pt": {"model": weights, "ema": None}},
    "tokenflow": lambda weights: {"tokenflow_siglip_32k.pt": trained(weights)},
    "evotok": lambda weights: {"evotok.pt": {"model": weights}},
    "ibq": lambda weights: {"imagenet256_16384.ckpt": {"state_dict": weights, "epoch": 1}},
    "open_magvit2": lambda weights: {"imagenet_256_L.ckpt": {"state_dict": weights, "global_step": 1}},
    "omnitokenizer": lambda weights: {
        "imagenet_k600.ckpt": {"state_dict": weights, "hyper_parameters": {"args": argparse.Namespace(patch_size=8)}}
    },
    "unitok": lambda weights: {"unitok_tokenizer.pth": {"args": {"model": "tiny"}, "trainer": {"unitok": weights}}},
    "meditok": lambda weights: {"meditok_simple_v1.pth": weights},
    "seed_tokenizer": lambda weights: {"seed_quantizer.pt": weights},
    "ta_tok": lambda weights: {"ta_tok.pth": {"model": {"args": {}, "sd": weights}}},
    "lavit_tokenizer": tower_apart,
    "xomni_tokenizer": lambda weights: dict(
        zip(("siglip.pt", "vq.pt"), split(weights, "vit.", "vqproj."), strict=True)
    ),
    "atoken": lambda weights: {"atoken-soc.pt": weights},
    "dualvitok": lambda weights: {"pytorch_model.bin": weights},
}
NAMED = {"xomni_tokenizer": {"siglip_path": "siglip.pt", "projector_path": "vq.pt"}}  # in upstream's configuration
# Codebook rows or frames that converting leaves out, so that there is no way back.
ONE_WAY = ("atoken", "evotok", "omnitokenizer")


def publish(system, files, folder):
    """Upstream's folder."""
    folder.mkdir()
    fields = json.loads((stored(system) / "config.json").read_text())
    fields["args"] |= NAMED.get(system, {})
    (folder / "config.json").write_text(json.dumps(fields))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(content, folder / name)
    return folder


def fingerprint(folder):
    return AutoModel.from_pretrained(folder).fingerprint()


def weights_of(system, golden):
    return load_file(golden(system) / "weights.safetensors")


@pytest.mark.parametrize("system", [system for system in PUBLISHED if stored(system).is_dir()])
def test_upstreams_own_files_give_the_same_codec_and_come_back(system, golden, tmp_path):
    files = PUBLISHED[system](weights_of(system, golden))
    source = publish(system, files, tmp_path / "source")
    target = convert(system, source, tmp_path / "out", accept_licence=True).target
    same = convert(system, golden(system), tmp_path / "same", accept_licence=True).target
    assert fingerprint(target) == fingerprint(same)
    if system in ONE_WAY:
        return
    back = restore(system, target, tmp_path / "back")
    assert {str(file.relative_to(back)) for file in back.rglob("*.*")} == {"config.json", *files}
    again = convert(system, back, tmp_path / "again", accept_licence=True).target
    assert fingerprint(again) == fingerprint(target)


def averaged(weights, *, buffers=()):
    """A Lightning checkpoint of SEED-Voken: live weights, and averages of all but buffers, losses and counts beside."""
    averages = {
        f"model_ema.{key.replace('.', '')}": tensor + 1 for key, tensor in weights.items() if key not in buffers
    }
    losses = {"loss.head.weight": torch.ones(2), "model_ema.lossheadweight": torch.ones(2)}
    return weights | averages | losses | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}


@pytest.mark.parametrize("system", ["ibq", "open_magvit2"])
def test_moving_averages_are_what_is_converted(system, golden, tmp_path):
    weights = weights_of(system, golden)
    buffer = min(weights)  # has no average
    checkpoint = {"state_dict": averaged(weights, buffers=(buffer,))}
    source = publish(system, {"released.ckpt": checkpoint}, tmp_path / "source")
    report = convert(system, source, tmp_path / "out")
    assert f"{len(weights) - 1} of them are moving averages" in str(report)
    assert report.converted == len(weights)
    (tmp_path / "plain").mkdir()
    shutil.copy(source / "config.json", tmp_path / "plain")
    moved = {key: tensor if key == buffer else tensor + 1 for key, tensor in weights.items()}
    save_file(moved, tmp_path / "plain" / "weights.safetensors")
    assert fingerprint(report.target) == fingerprint(convert(system, tmp_path / "plain", tmp_path / "moved").target)
    back = restore(system, report.target, tmp_path / "back")
    state = torch.load(back / "released.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {key for key in checkpoint["state_dict"] if "loss" not in key} - {
        "model_ema.decay",
        "model_ema.num_updates",
    }
    for key, tensor in moved.items():
        assert state[key].equal(tensor)
        assert key == buffer or state[f"model_ema.{key.replace('.', '')}"].equal(tensor)


def test_a_model_that_is_evaluated_without_averages_is_converted_without(golden, tmp_path):
    source = publish("ibq", {"last.ckpt": {"state_dict": averaged(weights_of("ibq", golden))}}, tmp_path / "source")
    fields = json.loads((source / "config.json").read_text())
    fields["args"]["use_ema"] = False
    (source / "config.json").write_text(json.dumps(fields))
    report = convert("ibq", source, tmp_path / "out")
    assert "moving averages" not in str(report)
    assert fingerprint(report.target) == fingerprint(convert("ibq", golden("ibq"), tmp_path / "live").target)


def test_an_average_of_nothing_or_of_two_is_refused(golden, tmp_path):
    state = averaged(weights_of("ibq", golden))
    extra = {"state_dict": state | {"model_ema.encoderextraweight": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"No rule takes 'model_ema\.encoderextraweight'"):
        convert("ibq", publish("ibq", {"one.ckpt": extra}, tmp_path / "nothing"), tmp_path / "out")
    twins = {"state_dict": state | {"encoder.conv_inweight": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"the average of 'encoder\.conv_in\.weight' and of 'encoder\.conv_inweight'"):
        convert("ibq", publish("ibq", {"one.ckpt": twins}, tmp_path / "two"), tmp_path / "out")


def test_several_files_that_could_be_meant_are_named(golden, tmp_path):
    weights = weights_of("llamagen_vq", golden)
    files = {"vq_ds16_c2i.pt": {"model": weights}, "vq_ds8_c2i.pt": {"model": weights}}
    source = publish("llamagen_vq", files, tmp_path / "source")
    with pytest.raises(ValueError, match=r"vq_ds16_c2i\.pt, vq_ds8_c2i\.pt, and each .* name it weights\.pt"):
        convert("llamagen_vq", source, tmp_path / "out")
    (source / "vq_ds16_c2i.pt").rename(source / "weights.pt")
    assert convert("llamagen_vq", source, tmp_path / "out").converted


def test_weights_in_a_wrapper_that_the_system_does_not_have_are_refused(golden, tmp_path):
    files = {"vq.pt": {"state_dict": weights_of("llamagen_vq", golden), "epoch": 1}}
    with pytest.raises(ValueError, match=r"at its top or under 'ema' or under 'model': 'state_dict', 'epoch'\. Save"):
        convert("llamagen_vq", publish("llamagen_vq", files, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_models_are_those_of_the_model(wrapper, golden, tmp_path):
    weights = weights_of("llamagen_vq", golden)
    wrapped = {"vq.pt": {"model": {wrapper + key: tensor for key, tensor in weights.items()}}}
    source = publish("llamagen_vq", wrapped, tmp_path / "source")
    target = convert("llamagen_vq", source, tmp_path / "out").target
    assert fingerprint(target) == fingerprint(convert("llamagen_vq", golden("llamagen_vq"), tmp_path / "same").target)
    back = torch.load(restore("llamagen_vq", target, tmp_path / "back") / "vq.pt", weights_only=True)
    assert back["model"].keys() == wrapped["vq.pt"]["model"].keys()


def test_a_wrapper_around_some_of_the_weights_is_part_of_their_names(golden, tmp_path):
    weights = weights_of("llamagen_vq", golden)
    state = {key if key.startswith("quant") else f"module.{key}": tensor for key, tensor in weights.items()}
    source = publish("llamagen_vq", {"vq.pt": {"model": state}}, tmp_path / "source")
    with pytest.raises(ValueError, match=r"No rule takes 'module\.decoder"):
        convert("llamagen_vq", source, tmp_path / "out")


def test_what_only_foreign_code_can_read_is_named_with_the_way_out(golden, tmp_path, monkeypatch):
    module = ModuleType("foreign_dictionaries")
    module.Settings = type("Settings", (dict,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    files = {"vq.pt": {"model": weights_of("llamagen_vq", golden), "args": module.Settings(a=1)}}
    source = publish("llamagen_vq", files, tmp_path / "source")
    with pytest.raises(ValueError, match=r"it holds foreign_dictionaries\.Settings.*save the state dict with safetens"):
        convert("llamagen_vq", source, tmp_path / "out")


def test_ta_tok_keeps_its_sizes_in_its_own_file(golden, tmp_path):
    sizes = json.loads((stored("ta_tok") / "config.json").read_text())["args"]
    files = {"ta_tok.pth": {"model": {"args": sizes, "sd": weights_of("ta_tok", golden)}}}
    source = publish("ta_tok", files, tmp_path / "source")
    target = convert("ta_tok", source, tmp_path / "out", accept_licence=True).target
    restored = torch.load(restore("ta_tok", target, tmp_path / "back") / "ta_tok.pth", weights_only=True)
    assert restored["model"]["args"] == sizes
    (source / "config.json").unlink()
    assert find_upstream("ta_tok").read(source) == {"args": sizes}
