"""What a processor is fast in, and which there are."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


def check_device(device: torch.device | str) -> None:
    """Raise `ValueError` where torch cannot use a device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = torch.accelerator.current_accelerator()
        here = "cpu" if found is None else f"cpu and {found.type}"
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"The device is {str(device)!r}, which torch cannot use ({reason}); here is {here}."
        ) from error


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
