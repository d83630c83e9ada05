"""The grammar under the continuous batching of transformers: requests of every kind and length share each pass.

In: the ids of requests. Out: masks, one grammar state per request. Never knows what else is in the pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from unimm.generation.processors import GrammarLogitsProcessor


class ContinuousGrammar(ContinuousBatchingLogitsProcessor):
    """Forbids every id that the span grammar does not allow next in a request.

    A request may carry `draws=False`, which opens no picture.
    """

    supported_kwargs: ClassVar[dict[str, Any]] = {"draws": bool}
    ignored_kwargs = ()

    def __init__(self, processor: GrammarLogitsProcessor) -> None:
        self.grammar = processor.grammar
        writing = processor.forbidden[:1].clone()  # a state more: text, and no picture
        writing[:, self.grammar.vocabulary.boi_token_id] = True
        self.forbidden = torch.cat([processor.forbidden, writing])  # [states + 1, V]

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Text, as of a request that has just begun."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[FutureRequestState]) -> torch.Tensor:
        """States of the requests, int32 `[requests]`."""
        return torch.tensor([self._state(request) for request in requests_with_new_token], dtype=torch.int32)

    def _state(self, request: FutureRequestState) -> int:
        asked = request.state
        state = next(self.grammar.coming(asked.initial_tokens + asked.generated_tokens))
        return state if state or asked.logit_processor_kwargs.get("draws", True) else len(self.forbidden) - 1

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores `[requests, V]`, `-inf` at ids that are not legal."""
        return scores.masked_fill(self.forbidden[tensor_arg[: len(scores)]], -float("inf"))


CLASSIC_TO_CB_PROCESSORS_MAP[GrammarLogitsProcessor] = ContinuousGrammar


def continuous_config(
    asked: ContinuousBatchingConfig | None, generation_config: GenerationConfig
) -> ContinuousBatchingConfig:
    """The settings under which a grammar can follow its requests: states per request, told after every id.

    Raises:
        ValueError: guidance, which needs two rows per request, or passes that start before the last ids are known.
    """
    if generation_config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale is {generation_config.guidance_scale}; guidance needs two rows per request, which "
            "continuous batching does not keep together. Give 1 here, and take `generate` to draw under guidance."
        )
    config = copy.deepcopy(asked) if asked is not None else ContinuousBatchingConfig()
    if config.use_async_batching:
        raise ValueError(
            "use_async_batching is True; the next pass would begin before the last ids are known, which say what is "
            "legal. Leave it out, or give False."
        )
    config.use_async_batching, config.per_request_processors = False, True
    return config
