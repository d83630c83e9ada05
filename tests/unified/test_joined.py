"""Layers over the same rows, joined into one product."""

import pytest
import torch
from torch import nn

from unimm.nn.stored import Int8Linear
from unimm.unified.decoder import joined


def layers(bias):
    torch.manual_seed(0)
    return [nn.Linear(16, width, bias=bias) for width in (8, 4, 4)]


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_one_product_gives_what_each_layer_gives_and_stores_nothing_twice(stored, bias):
    linears = [Int8Linear.from_linear(linear) if stored else linear for linear in layers(bias)]
    rows = torch.randn(3, 16, dtype=torch.bfloat16 if stored else torch.float32)
    wanted = torch.cat([linear(rows) for linear in linears], dim=-1)
    project = joined(linears)
    torch.testing.assert_close(project(rows), wanted, atol=1e-6, rtol=1e-5)
    first, *others = [linear.weight.data.untyped_storage().data_ptr() for linear in linears]
    assert set(others) == {first}
    torch.testing.assert_close(torch.cat([linear(rows) for linear in linears], dim=-1), wanted, atol=1e-6, rtol=1e-5)
    joined(linears)  # once more moves nothing
    assert linears[0].weight.data.untyped_storage().data_ptr() == first


@torch.no_grad()
def test_layers_that_differ_in_kind_are_asked_in_turn():
    plain, stored = layers(True)[0], Int8Linear.from_linear(layers(True)[1])
    rows = torch.randn(3, 16)
    adapted = nn.Sequential(plain)
    torch.testing.assert_close(joined([plain, adapted])(rows), torch.cat([plain(rows), plain(rows)], dim=-1))
    mixed = joined([stored, nn.Sequential(stored)])(rows.bfloat16())
    assert mixed.equal(torch.cat([stored(rows.bfloat16())] * 2, dim=-1))
