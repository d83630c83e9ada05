"""What vLLM takes for the same reading: two requests per picture, side by side, without the guidance that it lacks.

In: a model whose body is a plain causal language model. Out: a function that draws so many codes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from unimm.unified import UniMMForConditionalGeneration

CACHE_BYTES = 2**30
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that this process's time is all there is
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads belong to the other ways too
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def served_model(model: UniMMForConditionalGeneration) -> PreTrainedModel | None:
    """The language model as transformers has it, over the same weights.

    None where vLLM is not installed, or the model is more than that, draws by levels, or stores its weights otherwise.
    """
    config = model.config.text_config
    body, head = model.model.language_model.state_dict(), model.lm_head.state_dict()
    weights = {f"model.{name}": weight for name, weight in body.items()}
    weights |= {f"lm_head.{name}": weight for name, weight in head.items()}
    more = model.config.has_vision_path or model.config.drawing_levels is not None
    if find_spec("vllm") is None or more or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    whole = all(weight.dtype.is_floating_point for weight in weights.values())
    if not whole or weights.keys() != plain.state_dict().keys():
        return None
    plain.load_state_dict(weights, assign=True)
    return plain


def vllm_drawing(
    plain: PreTrainedModel, prompts: Sequence[Sequence[int]], legal: Sequence[int], codes: int, *, top_k: int
) -> Callable[[int], object]:
    """A function that samples so many of the legal ids, `codes` at most, after each of several prompts.

    Args:
        plain: see `served_model`.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        llm: Any = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype=str(plain.dtype).removeprefix("torch."),
            max_model_len=max(map(len, prompts)) + codes,
            max_num_seqs=len(prompts),
            kv_cache_memory_bytes=CACHE_BYTES,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    torch.set_num_threads(threads)
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]

    def draw(number: int) -> object:
        sampling = SamplingParams(
            temperature=1.0,
            top_k=top_k,
            max_tokens=number,
            ignore_eos=True,
            detokenize=False,
            allowed_token_ids=list(legal),
        )
        return llm.generate(asked, sampling, use_tqdm=False)

    return draw
