"""What a processor is fast in."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 at least about as fast as in float32.

    A processor of the x86 family needs AVX512-BF16 or AVX-NE-CONVERT for it. With AVX-512 alone oneDNN multiplies in
    bfloat16 too, five times slower than in float32; without either it is slower still, and takes no weights that were
    laid out for it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        imitated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not imitated
    return True


@cache
def is_intel() -> bool:
    """Whether this is a processor of Intel's, to whom MKL gives kernels that it keeps from others."""
    listed = Path("/proc/cpuinfo")
    return "GenuineIntel" in (listed.read_text(encoding="utf-8") if listed.is_file() else platform.processor())
