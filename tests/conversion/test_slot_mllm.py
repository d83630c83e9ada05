"""Slot-MLLM's queries as a codec of features; its fixture has the queries among the inputs."""

import json
import shutil

import pytest
import torch
from conftest import stored
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from unimm.conversion import UPSTREAMS, convert
from unimm.conversion.restore import restore
from unimm.conversion.upstream import UpstreamConfig

TOLERANCE = 1e-4  # absolute, in float32; the fixture's own


def source(folder, queries):
    """Upstream's files with one of the fixture's sets of queries, `[1, N, D]`."""
    shutil.copytree(stored("slot_qformer"), folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["args"]["bert_config"]["query_length"] = queries.shape[1]
    (folder / "config.json").write_text(json.dumps(fields))
    weights = load_file(folder / "weights.safetensors")
    save_file(weights | {"query_tokens": queries}, folder / "weights.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize(
    ("queries", "slots"), [("query_tokens", "slots"), ("query_tokens_short", "slots_short_causal")]
)
def test_slots_are_continuous_latents_that_equal_the_reference(queries, slots, tmp_path):
    expected = load_file(stored("slot_qformer") / "io.safetensors")
    folder = source(tmp_path / "source", expected[queries])
    report = convert("slot_qformer", folder, tmp_path / "out")
    codec = AutoModel.from_pretrained(report.target).eval()
    features = expected["encoder_hidden_states"].mT.unflatten(2, (3, 3))
    codes = codec.encode(features)
    assert codes.ids.shape == (2, expected[queries].shape[1], 0)
    torch.testing.assert_close(codes.side_info["latents"], expected[slots], atol=TOLERANCE, rtol=0)
    assert codec.decode(codes).equal(codes.side_info["latents"])
    half = AutoModel.from_pretrained(report.target, dtype=torch.bfloat16)
    torch.testing.assert_close(half.decode(half.encode(features)), expected[slots], atol=TOLERANCE, rtol=0)
    back = load_file(restore("slot_qformer", report.target, tmp_path / "back") / "weights.safetensors")
    weights = load_file(folder / "weights.safetensors")
    assert {*report.dropped} == weights.keys() - back.keys()
    assert all(weights[key].equal(weight) for key, weight in back.items())


def test_a_network_without_its_queries_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no 'query_tokens\*'"):
        convert("slot_mllm", stored("slot_qformer"), tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"args": {"slot_config": {"use_half_slot": True}}}, "use_half_slot is not False"),
        ({"args": {"slot_config": {"T": 2}}}, "T is not 1"),
        ({"args": {"bert_config": {"cross_attention_freq": 3}}}, "only equal ones are converted"),
    ],
)
def test_competitions_of_another_kind_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        UPSTREAMS["slot_qformer"].plan(UpstreamConfig(fields))
