"""A few rows times a large weight on a GPU, at the speed of reading the weight once.

A step of one token multiplies one or two rows by every weight. Sums along the rows of a large weight, which this kernel
takes, read it faster than the tiles of matrix units that libraries make. Weights may be int8, and become floats only in
registers.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

MOST_ROWS = 4  # beyond, the sums of a tile fill the registers
SMALLEST = 2**26  # bytes of a weight in floats; below, the libraries' products are as fast
HAS_TRITON = find_spec("triton") is not None
TILES = {1: (8, 512, 4), 2: (4, 512, 4)}  # bytes of a number: outputs and inputs of a tile, and its warps


def takes_few_rows(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether rows `[R, I]` times a weight `[O, I]` are best done here."""
    worthwhile = weight.itemsize == 1 or (weight.itemsize == 2 and weight.nbytes >= SMALLEST)
    return HAS_TRITON and weight.device.type == "cuda" and len(rows) <= MOST_ROWS and worthwhile


@torch.library.custom_op("unimm::few_rows_product", mutates_args=())
def few_rows_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`rows @ weight.T`, `[R, O]` in the dtype of the rows `[R, I]`; products and sums are float32.

    Args:
        weight: `[O, I]`, of one or two bytes a number.
    """
    rows, weight = rows.contiguous(), weight.contiguous()
    number, (outputs, inputs) = len(rows), weight.shape
    result = rows.new_empty(number, outputs)
    tall, wide, warps = TILES[weight.itemsize]
    _kernel()[(-(-outputs // tall),)](
        rows, weight, result, number, outputs, inputs, 1 << (number - 1).bit_length(), tall, wide, num_warps=warps
    )
    return result


@few_rows_product.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(len(rows), len(weight))


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(  # type: ignore[no-untyped-def]
        rows,  # [number, inputs]
        weight,  # [outputs, inputs]
        result,  # [number, outputs]
        number,
        outputs,
        inputs: tl.constexpr,
        ROWS: tl.constexpr,
        TALL: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        out = tl.program_id(0) * TALL + tl.arange(0, TALL)
        row = tl.arange(0, ROWS)
        sums = tl.zeros((ROWS, TALL, WIDE), tl.float32)
        for start in range(0, inputs, WIDE):
            place = start + tl.arange(0, WIDE)
            inside = place < inputs
            read = tl.load(
                weight + out[:, None].to(tl.int64) * inputs + place[None, :],
                mask=(out < outputs)[:, None] & inside[None, :],
                other=0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            state = tl.load(
                rows + row[:, None] * inputs + place[None, :],
                mask=(row < number)[:, None] & inside[None, :],
                other=0,
            ).to(tl.float32)
            sums += read[None, :, :] * state[:, None, :]
        tl.store(
            result + row[:, None] * outputs + out[None, :],
            tl.sum(sums, axis=2).to(result.dtype.element_ty),
            mask=(row < number)[:, None] & (out < outputs)[None, :],
        )

    return kernel
