"""Which precision a processor is fast in."""

from __future__ import annotations

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 at least about as fast as in float32.

    A processor of the x86 family needs AVX-512 or AVX-NE-CONVERT for it: without them oneDNN is some ten times slower
    in bfloat16, and does not take weights that were laid out for it.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True
