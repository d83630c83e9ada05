"""A few rows by a large weight on a GPU."""

import pytest
import torch

from unimm.nn.few_rows import MOST_ROWS, few_rows_product
from unimm.nn.stored import Int8Linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


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


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_int8_layers_multiply_on_a_gpu(rows):
    linear = torch.nn.Linear(96, 40, device="cuda")
    states = torch.randn(rows, 96, device="cuda", dtype=torch.bfloat16)
    wanted = linear(states.float()).bfloat16()
    torch.testing.assert_close(Int8Linear.from_linear(linear)(states), wanted, rtol=5e-2, atol=5e-2)
