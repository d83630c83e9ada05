"""Token by token on a GPU: a step is recorded once as a CUDA graph, and then replayed without the host.

The cache keeps its size and a counter lies on the device, so that every replay writes and sees the places that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from unimm.nn.few_rows import HAS_TRITON
from unimm.unified.decoder import CachedDecoder

if TYPE_CHECKING:
    from unimm.unified.modeling import UniMMForConditionalGeneration

ALIGNED = 256  # positions that the cache is a multiple of, so that few sizes are compiled
COMPILED = 2**30  # bytes of layers; a step that reads less is too short to repay the seconds that compiling takes


@dataclass(frozen=True)
class Recording:
    """A step, with the ids `[R, W]` that it reads and the hidden states `[R, W, D]` that it leaves."""

    graph: torch.cuda.CUDAGraph
    input_ids: torch.Tensor
    states: torch.Tensor


class RecordedDecoder(CachedDecoder):
    """The same products over a cache of fixed size.

    Args:
        model: of a covered family, in eval mode. On a CPU the same steps run one by one.
    """

    def __init__(self, model: UniMMForConditionalGeneration) -> None:
        super().__init__(model)
        self.recordings: dict[int, Recording] = {}
        weights = chain(self.body.layers.parameters(), self.body.layers.buffers())  # those of int8 are buffers
        large = sum(weight.nbytes for weight in weights if weight.device.type == "cuda") >= COMPILED
        self.is_compiled = large and HAS_TRITON

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, capacity: int) -> torch.Tensor:
        """See `CachedDecoder.prefill`."""
        capacity += -capacity % ALIGNED
        states = super().prefill(input_ids, attention_mask, capacity)
        self.filled = torch.tensor([self.length], device=input_ids.device)
        unseen = F.pad(attention_mask == 0, (0, self.keys[0].shape[2] - self.length))
        self.seen = ~unseen[:, None]  # [R, 1, T], but for the places that are not filled
        return states

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `CachedDecoder.step`; what it returns is overwritten by the next step of as many ids."""
        width = input_ids.shape[1]
        self._make_room(width)
        self.length += width
        if input_ids.device.type != "cuda":
            return self._advance(input_ids)
        if width not in self.recordings:
            self.recordings[width] = self._record(input_ids)
        recording = self.recordings[width]
        recording.input_ids.copy_(input_ids)
        recording.graph.replay()
        return recording.states

    def rewind(self, positions: int) -> None:
        """Forget the last ids."""
        super().rewind(positions)
        self.filled -= positions

    def keep(self, rows: int) -> None:
        """See `CachedDecoder.keep`."""
        super().keep(rows)
        self.seen = self.seen[:rows]
        self.recordings.clear()

    def _advance(self, input_ids: torch.Tensor) -> torch.Tensor:
        width = input_ids.shape[1]
        states = self._forward(input_ids, self.filled + torch.arange(width, device=input_ids.device))
        self.filled += width
        return states

    def _record(self, input_ids: torch.Tensor) -> Recording:
        held, before = input_ids.clone(), self.filled.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries prepare themselves at the first run, which cannot be recorded
            self._advance(held)
        torch.cuda.current_stream().wait_stream(stream)
        self.filled.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = self._advance(held)
        return Recording(graph, held, states)

    def _through(self, *inputs: Any) -> torch.Tensor:
        return _compiled_layer()(self, *inputs) if self.is_compiled else super()._through(*inputs)

    def _remember(self, cache: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return cache.index_copy_(2, places, new)

    def _mask(self, rows: int, places: torch.Tensor) -> torch.Tensor:
        """Which places `[R, 1, groups W, T]` a step sees."""
        reached = torch.arange(self.seen.shape[-1], device=places.device) <= places[:, None]  # [W, T]
        return (self.seen & reached)[:, None].repeat(1, 1, self.groups, 1)

    def _make_room(self, width: int) -> None:
        capacity = self.keys[0].shape[2]
        super()._make_room(width + -(self.length + width) % ALIGNED)
        added = self.keys[0].shape[2] - capacity
        if added:
            self.seen = F.pad(self.seen, (0, added), value=True)
            self.recordings.clear()


@lru_cache(maxsize=1)
def _compiled_layer() -> Callable[..., torch.Tensor]:
    """One for all layers, which are of one shape."""
    return torch.compile(CachedDecoder._through)
