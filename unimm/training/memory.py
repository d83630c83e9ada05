"""Peak memory of the losses and the scores over X-Omni's 168k rows, beside plain logits and cross-entropy.

python -m unimm.training.memory [width=64] [pictures=1]
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from unimm.codec import VisualCodecConfig
from unimm.config import from_dict, set_by_path
from unimm.sequence import VisualVocabulary
from unimm.training.policy import SamplingPolicy
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration

VOCABULARY = VisualVocabulary(151_936, (16_384,), 1, 2, 3, 0)
SIDE = 32  # cells of a picture, one code each
GUIDANCE = 3.0


@dataclass(frozen=True)
class MemoryConfig:
    """A language model of one layer, and how many rows of 1,024 targets it learns at once."""

    width: int = 64
    pictures: int = 1


@dataclass(frozen=True)
class Peak:
    """Bytes above the model, at most, of one way to learn from `targets`, forward and backward pass together."""

    targets: str
    way: str
    size: int


def measure_memory(config: MemoryConfig) -> list[Peak]:
    """Every way in a new process, whose peak is read at its end; on a CPU it is what Linux counts of the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.utils", "unimm.training.policy"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        sizes = pool.starmap(_peak, [(config, index) for index in range(len(WAYS))], chunksize=1)
    return [Peak(targets, way, size) for (targets, way, _), size in zip(WAYS, sizes, strict=True)]


def _peak(config: MemoryConfig, index: int) -> int:
    """Bytes that `WAYS[index]` takes beside the model and its input."""
    targets, _, learn = WAYS[index]
    model, ids = _model(config.width), _ids(targets == "codes", config.pictures)
    if torch.cuda.is_available():
        model, ids = model.cuda(), ids.cuda()
        before = torch.cuda.memory_allocated()
        learn(model, ids)
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS")
    learn(model, ids)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes of this process that Linux counts under a name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def _model(width: int) -> UniMMForConditionalGeneration:
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    text = Qwen3Config(
        vocab_size=VOCABULARY.size, hidden_size=width, intermediate_size=width, num_hidden_layers=1, **heads
    )
    codec = VisualCodecConfig(
        image_size=SIDE * 16,
        encoder={"kind": "conv", "patch": 16, "channels": [8], "blocks": 1},
        resampler={"kind": "grid", "dim": 8},
        quantizer={"kind": "fsq", "levels": [4] * 7},
        decoder={"kind": "conv", "patch": 16, "channels": [8], "blocks": 1},
    )
    shape = {"grid": [SIDE, SIDE], "prefix": [], "min_positions": SIDE**2, "max_positions": SIDE**2}
    config = UniMMConfig(
        text_config=text.to_dict(),
        codec_config=codec.to_dict(),
        image_token_offset=VOCABULARY.image_token_offset,
        codebook_sizes=list(VOCABULARY.codebook_sizes),
        span_shapes=[shape],
        null_prompt_ids=[5, 6],
        eos_token_id=4,
    )
    torch.manual_seed(0)
    return UniMMForConditionalGeneration(config)


def _ids(codes: bool, rows: int) -> torch.Tensor:
    """`[B, T]`: a short prompt, and a picture or as much text."""
    prompt = torch.arange(5, 13).expand(rows, -1)
    if not codes:
        return torch.cat([prompt, torch.randint(4, VOCABULARY.image_token_offset, (rows, SIDE**2 + 2))], dim=1)
    picture = torch.randint(VOCABULARY.image_token_offset, VOCABULARY.size, (rows, SIDE**2))
    opening, end = (torch.full((rows, 1), token) for token in (VOCABULARY.boi_token_id, VOCABULARY.eoi_token_id))
    return torch.cat([prompt, opening, picture, end], dim=1)


def _plain(model: UniMMForConditionalGeneration, ids: torch.Tensor) -> None:
    logits = model(ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()


def _factored(model: UniMMForConditionalGeneration, ids: torch.Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()


def _fused(model: UniMMForConditionalGeneration, ids: torch.Tensor) -> None:
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()


def _scored(model: UniMMForConditionalGeneration, ids: torch.Tensor, guidance_scale: float = 1.0) -> None:
    policy = SamplingPolicy(
        model.config.grammar, tuple(model.config.null_prompt_ids or ()), guidance_scale=guidance_scale
    )
    policy.score(model, ids, torch.ones_like(ids), SIDE**2 + 1).log_probs.sum().backward()


def _guided(model: UniMMForConditionalGeneration, ids: torch.Tensor) -> None:
    _scored(model, ids, GUIDANCE)


WAYS: tuple[tuple[str, str, Callable[[UniMMForConditionalGeneration, torch.Tensor], None]], ...] = (
    ("text", "plain logits and cross-entropy", _plain),
    ("text", "factored loss", _factored),
    ("codes", "plain logits and cross-entropy", _plain),
    ("codes", "factored loss", _factored),
    ("codes", "scores of TRL", _fused),
    ("codes", "scores under the grammar", _scored),
    ("codes", "guided scores under the grammar", _guided),
)


def main(arguments: list[str]) -> None:
    """Print the peaks, and their shares of the plain one of the same targets."""
    data: dict = {}
    for override in arguments:
        set_by_path(data, override)
    peaks = measure_memory(from_dict(MemoryConfig, data))
    plain = {peak.targets: peak.size for peak in peaks if peak.way == WAYS[0][1]}
    for peak in peaks:
        share = peak.size / plain[peak.targets]
        print(f"{peak.targets:6} {peak.way:32} {peak.size / 2**20:9.0f} MiB {share:6.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
