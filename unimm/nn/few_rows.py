"""A few rows times a large weight on a GPU, at the speed of reading the weight once.

A step of one token multiplies one row, or two under guidance, by every weight. Libraries choose tiles for many rows;
those here are narrow in outputs and long in inputs, and are fetched several ahead. Weights may be int8, and become
floats only in registers.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

MOST_ROWS = 16  # which the matrix units take at once
SMALLEST = 2**24  # bytes of a weight in floats; below, a product is too short for any of this
LARGE = 2**26  # bytes
COMPILERS = ("gcc", "clang")  # one of which Triton needs beside it, or what CC names
HAS_TRITON = find_spec("triton") is not None and ("CC" in os.environ or any(map(shutil.which, COMPILERS)))
HAS_KERNELS = HAS_TRITON and torch.version.hip is None  # of this room and its neighbours


class Tile(NamedTuple):
    """Outputs and inputs of a tile, the warps that work on it, and the tiles that are fetched at once."""

    tall: int
    wide: int
    warps: int
    stages: int


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the tiles of one program may take on a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def takes_few_rows(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether rows `[R, I]` times a weight `[O, I]` are best done here."""
    large = weight.dtype == rows.dtype and weight.nbytes >= SMALLEST
    worthwhile = rows.itemsize == 2 and (weight.dtype == torch.int8 or large)
    return HAS_KERNELS and weight.device.type == "cuda" and len(rows) <= MOST_ROWS and worthwhile


def tile_of(weight: torch.Tensor) -> Tile:
    """The tile that reads a weight `[O, I]` fastest on an H200, of eight that were tried with two rows.

    Small weights have tall tiles: the multiprocessors that get none cost less than the beginnings of more of them. On a
    GPU with less room fewer tiles are fetched at once.
    """
    outputs, inputs = weight.shape
    best = Tile(16, 512, 2, 4) if weight.nbytes >= LARGE else Tile(64, 256, 4, 4)
    if weight.itemsize == 1 or (weight.nbytes >= LARGE and outputs > inputs):
        best = Tile(32, 256, 4, 4)
    held = best.wide * (best.tall * weight.itemsize + MOST_ROWS * 2)  # bytes of a tile and of its rows
    return best._replace(stages=max(1, min(best.stages, shared_memory(weight.device) // held)))


@torch.library.custom_op("unimm::few_rows_product", mutates_args=())
def few_rows_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`rows @ weight.T`, `[R, O]` in the dtype of the rows `[R, I]`, of two bytes; sums are float32.

    Args:
        weight: `[O, I]`, int8 or in the dtype of the rows.
    """
    rows, weight = rows.contiguous(), weight.contiguous()
    number, (outputs, inputs) = len(rows), weight.shape
    result = rows.new_empty(number, outputs)
    tile = tile_of(weight)
    with torch.cuda.device_of(rows):
        _kernel()[(-(-outputs // tile.tall),)](
            rows,
            weight,
            result,
            number,
            outputs,
            inputs,
            MOST_ROWS,
            tile.tall,
            tile.wide,
            tile.stages,
            num_warps=tile.warps,
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
        STAGES: tl.constexpr,
    ):
        out = tl.program_id(0) * TALL + tl.arange(0, TALL)
        row = tl.arange(0, ROWS)
        sums = tl.zeros((TALL, ROWS), tl.float32)
        for start in tl.range(0, inputs, WIDE, num_stages=STAGES):
            place = start + tl.arange(0, WIDE)
            inside = place < inputs
            read = tl.load(
                weight + out[:, None].to(tl.int64) * inputs + place[None, :],
                mask=(out < outputs)[:, None] & inside[None, :],
                other=0,
            )
            states = tl.load(
                rows + row[None, :] * inputs + place[:, None],
                mask=(row < number)[None, :] & inside[:, None],
                other=0,
            )
            sums = tl.dot(read.to(states.dtype), states, sums)
        tl.store(
            result + row[None, :] * outputs + out[:, None],
            sums.to(result.dtype.element_ty),
            mask=(row < number)[None, :] & (out < outputs)[:, None],
        )

    return kernel
