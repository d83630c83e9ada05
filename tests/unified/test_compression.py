"""Stored weights: near the layers they replace, in every number of rows, and drawing by the engine."""

import pytest
import torch
from torch import nn

import unimm
from unimm.nn.processor import has_fast_bf16
from unimm.nn.stored import FORMATS, Int8Linear, PackedLinear, four_bit_linear, store_linears

PACKED = pytest.param(
    PackedLinear,
    marks=pytest.mark.skipif(not has_fast_bf16(torch.device("cpu")), reason="this CPU has no layout for bfloat16"),
)


@pytest.mark.parametrize("rows", [(1,), (2,), (3, 7), (40,)])
@pytest.mark.parametrize("kind", [Int8Linear.from_linear, PACKED])
@pytest.mark.parametrize(("width", "bias"), [(64, False), (64, True), (24, False), (50, True)])
@torch.no_grad()
def test_a_stored_layer_is_near_its_layer(kind, rows, width, bias):
    torch.manual_seed(0)
    linear = nn.Linear(width, 48, bias=bias)
    inputs = torch.randn(*rows, width).bfloat16()
    exact, near = linear(inputs.float()), kind(linear)(inputs)
    assert near.shape == exact.shape
    assert near.dtype == torch.bfloat16
    assert float((near.float() - exact).norm() / exact.norm()) < 0.015
    assert not near.float().equal(exact)


@torch.no_grad()
def test_some_outputs_are_those_of_the_whole_layer():
    torch.manual_seed(0)
    layer = Int8Linear.from_linear(nn.Linear(64, 48, bias=False))
    inputs = torch.randn(2, 64).bfloat16()
    for outputs in (slice(5, 21), torch.tensor([40, 3])):
        assert layer.some(inputs, outputs).equal(layer(inputs)[:, outputs])


@pytest.mark.parametrize("weights", FORMATS)
def test_a_loaded_model_draws_and_reads_with_stored_weights(weights, tiny_folder):
    exact, stored = unimm.load(tiny_folder), unimm.load(tiny_folder, weights=weights)
    drawn = stored.generate(["a star", "three green circles"], seed=0, guidance=2.0)
    assert [len(reply.images) for reply in drawn] == [1, 1]
    assert stored.understand(drawn[0].images[0])
    assert next(stored.model.codec.parameters()).dtype == torch.float32
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        ours, theirs = stored.model(ids).logits.float(), exact.model(ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < (0.5 if weights == "nf4" else 0.1)


@torch.no_grad()
def test_four_bits_are_near_their_layer():
    torch.manual_seed(0)
    linear = nn.Linear(128, 48)
    inputs = torch.randn(3, 7, 128).bfloat16()
    exact, near = linear(inputs.float()), four_bit_linear(linear)(inputs)
    assert near.shape == exact.shape
    assert 0.02 < float((near.float() - exact).norm() / exact.norm()) < 0.15


def test_four_bits_are_for_inputs_of_whole_blocks():
    body = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    store_linears(body, "nf4")
    assert [type(layer).__name__ for layer in body] == ["Linear4bit", "Linear"]


def test_an_unknown_format_is_refused(tiny_folder):
    with pytest.raises(ValueError, match="int8"):
        unimm.load(tiny_folder, weights="int2")
