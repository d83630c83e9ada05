"""A few rows by a large weight on a GPU."""

import pytest
import torch

from unimm.nn import few_rows
from unimm.nn.few_rows import MOST_ROWS, few_rows_product, tile_of
from unimm.nn.stored import Int8Linear


@pytest.mark.gpu
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(7, 33), (4608, 3584), (130, 18944)])
def test_the_kernel_gives_the_product(rows, dtype, shape):
    states = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    weight = (20 * torch.randn(shape, device="cuda")).to(dtype)
    wanted = (states.double() @ weight.double().T).bfloat16()
    torch.testing.assert_close(
        few_rows_product(states, weight), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_int8_layers_multiply_on_a_gpu(rows):
    linear = torch.nn.Linear(96, 40, device="cuda")
    states = torch.randn(rows, 96, device="cuda", dtype=torch.bfloat16)
    wanted = linear(states.float()).bfloat16()
    torch.testing.assert_close(Int8Linear.from_linear(linear)(states), wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("room", [2**15, 2**16, 99 * 2**10, 227 * 2**10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3584, 3584), (37888, 3584), (3584, 18944)])
def test_tiles_have_room_where_a_single_one_has(shape, dtype, room, monkeypatch):
    monkeypatch.setattr(few_rows, "shared_memory", lambda device: room)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    tile = tile_of(weight)
    held = tile.stages * tile.wide * (tile.tall * weight.itemsize + 2 * MOST_ROWS)
    assert held <= room or tile.stages == 1
    assert tile.stages == 4 or room < 227 * 2**10
