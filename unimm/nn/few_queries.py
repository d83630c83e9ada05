"""Attention of a few queries over a cache on a GPU that is only filled so far, at the speed of reading what it holds.

The cache is read in parts by many multiprocessors and their sums are joined (as in Flash-Decoding, 2023), since one
picture has fewer heads than a GPU has multiprocessors. How far the cache is filled is read on the device, so that a
recorded step goes on to be right.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from unimm.nn.few_rows import HAS_KERNELS, shared_memory

MOST_QUERIES = 32  # of one head of keys; their sums stay in registers
WIDTHS = (16, 32, 64, 128, 256)  # of a head
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 64  # places that are read at once, fewer where these are wide
BLOCK_BYTES = 2**14  # of the keys of a block, and of its values
TWO_BLOCKS = 3 * 2**15  # bytes of a multiprocessor that has room for two
MOST_PARTS = 32


def takes_few_queries(queries: int, keys: torch.Tensor) -> bool:
    """Whether so many queries of every head of keys `[R, H, C, D]` are best answered here."""
    fits = queries <= MOST_QUERIES and keys.shape[3] in WIDTHS and keys.dtype in DTYPES
    return HAS_KERNELS and keys.device.type == "cuda" and fits


@torch.library.custom_op("unimm::few_queries_attention", mutates_args=())
def few_queries_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    filled: torch.Tensor,
    width: int,
    scale: float,
) -> torch.Tensor:
    """What queries `[R, H, Q, D]` gather, of their shape.

    Args:
        keys, values: `[R, H, C, D]`, rows and heads of a cache, the last two dimensions contiguous.
        seen: bool `[R, 1, C]`, places that may be seen at all.
        filled: int64 `[1]`, places before those of this step.
        width: positions of this step, W; query q stands at `filled + q % W` and sees no later place.
        scale: of the scores.
    """
    (rows, heads, queries, head_width), places = query.shape, keys.shape[2]
    block = min(BLOCK, BLOCK_BYTES // (head_width * keys.itemsize))
    part = BLOCK * -(-places // (BLOCK * MOST_PARTS))
    parts = -(-places // part)
    slots = max(16, 1 << (queries - 1).bit_length())
    shape = (rows * heads, parts, slots)
    gathered = query.new_empty(*shape, head_width, dtype=torch.float32)
    peaks, sums = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    result = query.new_empty(query.shape)
    gather, join = _kernels()
    with torch.cuda.device_of(query):
        gather[(rows * heads, parts)](
            query,
            keys,
            values,
            seen,
            filled,
            gathered,
            peaks,
            sums,
            heads,
            queries,
            width,
            places,
            part,
            scale,
            *query.stride(),
            *keys.stride()[:2],
            *values.stride()[:2],
            seen.stride(0),
            slots,
            head_width,
            block,
            "ieee" if query.dtype == torch.float32 else "tf32",
            num_stages=2 if shared_memory(keys.device) >= TWO_BLOCKS else 1,
        )
        join[(rows * heads, queries)](
            gathered, peaks, sums, result, queries, parts, slots, head_width, 1 << (parts - 1).bit_length()
        )
    return result


@few_queries_attention.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    filled: torch.Tensor,
    width: int,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


@cache
def _kernels() -> tuple[Any, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def gather(  # type: ignore[no-untyped-def]
        query,  # [R H, Q, D]
        keys,  # [R, H, C, D]
        values,  # [R, H, C, D]
        seen,  # [R, C]
        filled,  # [1]
        gathered,  # [R H, P, SLOTS, D], sums over the places of a part, weighed
        peaks,  # [R H, P, SLOTS], the largest score of a part
        sums,  # [R H, P, SLOTS], of the weights
        heads,
        queries,
        width,
        places,
        part,
        scale,
        query_row,
        query_head,
        query_slot,
        query_column,
        key_row,
        key_head,
        value_row,
        value_head,
        seen_row,
        SLOTS: tl.constexpr,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        head, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row = head // heads
        query += row * query_row + (head % heads) * query_head
        keys += row * key_row + (head % heads) * key_head
        values += row * value_row + (head % heads) * value_head
        slot, column = tl.arange(0, SLOTS), tl.arange(0, D)
        before = tl.load(filled)
        asked = tl.load(
            query + slot[:, None] * query_slot + column[None, :] * query_column,
            mask=(slot < queries)[:, None],
            other=0,
        )
        peak = tl.full((SLOTS,), float("-inf"), tl.float32)
        total = tl.zeros((SLOTS,), tl.float32)
        found = tl.zeros((SLOTS, D), tl.float32)
        first = number * part
        last = tl.minimum(tl.minimum(first + part, places), before + width)
        for start in range(first, last, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < last
            key = tl.load(keys + place[None, :] * D + column[:, None], mask=inside[None, :], other=0)
            visible = tl.load(seen + row * seen_row + place, mask=inside, other=0) != 0
            visible = visible[None, :] & (place[None, :] <= (before + slot % width)[:, None])
            scores = tl.where(visible, tl.dot(asked, key, input_precision=PRECISION) * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - level[:, None])
            kept = tl.exp(peak - level)
            total = total * kept + tl.sum(weights, axis=1)
            value = tl.load(values + place[:, None] * D + column[None, :], mask=inside[:, None], other=0)
            found = tl.dot(weights.to(value.dtype), value, found * kept[:, None], input_precision=PRECISION)
            peak = higher
        at = (head * tl.num_programs(1) + number) * SLOTS + slot
        tl.store(gathered + at[:, None] * D + column[None, :], found)
        tl.store(peaks + at, peak)
        tl.store(sums + at, total)

    @triton.jit
    def join(  # type: ignore[no-untyped-def]
        gathered,
        peaks,
        sums,
        result,  # [R H, Q, D]
        queries,
        parts,
        SLOTS: tl.constexpr,
        D: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        head, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
        part, column = tl.arange(0, PARTS), tl.arange(0, D)
        at = (head * parts + part) * SLOTS + slot
        peak = tl.load(peaks + at, mask=part < parts, other=float("-inf"))
        weights = tl.exp(peak - tl.max(peak, axis=0))
        total = tl.sum(weights * tl.load(sums + at, mask=part < parts, other=0), axis=0)
        found = tl.load(gathered + at[:, None] * D + column[None, :], mask=(part < parts)[:, None], other=0)
        found = tl.sum(found * weights[:, None], axis=0) / total
        tl.store(result + (head * queries + slot) * D + column, found.to(result.dtype.element_ty))

    return gather, join
