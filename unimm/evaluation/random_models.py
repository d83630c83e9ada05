"""Models of random weights at the sizes that speed is measured at; their pictures have one code per position."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from transformers import Qwen3Config

from unimm.codec import VisualCodecConfig
from unimm.sequence import VisualVocabulary
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration


@dataclass(frozen=True)
class Size:
    """A language model of the Qwen3 kind, with heads of `head_dim`, and its code rows."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    text_rows: int
    codes: int


SIZES = {
    "tiny": Size(4, 256, 768, 4, 4, 64, 2_048, 4_096),
    "20m": Size(8, 384, 1_792, 6, 2, 64, 2_048, 4_096),
    "150m": Size(16, 768, 2_560, 12, 4, 64, 16_384, 16_384),
    "0.6b": Size(28, 1_024, 3_072, 16, 8, 128, 151_936, 16_384),
    "7b": Size(28, 3_584, 18_944, 28, 4, 128, 151_936, 16_384),
}
PATCH = 16


def random_model(name: str, *, codes: int, dtype: torch.dtype, device: str = "cpu") -> UniMMForConditionalGeneration:
    """A model of a size, made where it will be, whose pictures are squares of `codes` positions.

    Raises:
        ValueError: an unknown size, or a number of codes that is no square.
    """
    if name not in SIZES:
        raise ValueError(f"config is {name!r}; it must be one of {', '.join(SIZES)}.")
    side = isqrt(codes)
    if codes < 1 or side * side != codes:
        raise ValueError(f"codes is {codes}; a picture is a square of them, for example 64, 256, 1024 or 4096.")
    size = SIZES[name]
    bits = size.codes.bit_length() - 1
    codec = VisualCodecConfig(
        image_size=PATCH * side,
        encoder={"kind": "conv", "patch": PATCH, "channels": [32, 64, 128], "blocks": 1},
        resampler={"kind": "grid", "dim": 64},
        quantizer={"kind": "fsq", "levels": [4] * (bits // 2) + [2] * (bits % 2)},
        decoder={"kind": "conv", "patch": PATCH, "channels": [128, 64, 32], "blocks": 1},
    )
    rows = VisualVocabulary(size.text_rows, (size.codes,), 1, 2, 3, 0).size
    text = Qwen3Config(
        vocab_size=rows,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        head_dim=size.head_dim,
        max_position_embeddings=2 * codes + 512,
    )
    config = UniMMConfig(
        text_config=text.to_dict(),
        codec_config=codec.to_dict(),
        image_token_offset=size.text_rows,
        codebook_sizes=[size.codes],
        span_shapes=[{"grid": [side, side], "prefix": [], "min_positions": codes, "max_positions": codes}],
        null_prompt_ids=[5, 6],
        eos_token_id=4,
        dtype=dtype,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return UniMMForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(previous)
