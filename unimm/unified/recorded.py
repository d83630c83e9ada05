"""Token by token on a GPU: a step is recorded once as a CUDA graph, and then replayed without the host.

The cache keeps its size and a counter lies on the device, so that every replay writes and sees the places that follow.
A decoder waits for the next batch of its model, which is drawn by the same recordings where it has as many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from unimm.nn.few_queries import few_queries_attention, takes_few_queries
from unimm.nn.few_rows import HAS_TRITON
from unimm.nn.stored import Int8Linear
from unimm.unified.decoder import CachedDecoder, Layer

if TYPE_CHECKING:
    from unimm.unified.modeling import UniMMForConditionalGeneration

ALIGNED = 256  # positions that the cache is a multiple of, so that few sizes are compiled
COMPILED = 2**30  # bytes of layers; a step that reads less is too short to repay the seconds that compiling takes
KEPT = 2**29  # bytes of the largest cache that waits for another batch
KEPT_WIDTHS = 2  # recordings that wait with it, as each has memory of its own

_waiting: WeakKeyDictionary[UniMMForConditionalGeneration, RecordedDecoder] = WeakKeyDictionary()


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

    filled: torch.Tensor  # [1], places of the cache that are filled
    seen: torch.Tensor  # [R, 1, T], places that may be seen once they are filled

    def __init__(self, model: UniMMForConditionalGeneration) -> None:
        super().__init__(model)
        self.recordings: dict[int, Recording] = {}
        self.head_norms: list[torch.Tensor | None] = []
        weights = chain(self.body.layers.parameters(), self.body.layers.buffers())  # those of int8 are buffers
        large = sum(weight.nbytes for weight in weights if weight.device.type == "cuda") >= COMPILED
        self.is_compiled = large and HAS_TRITON
        self.fits = self._circumstances()

    @classmethod
    def of(cls, model: UniMMForConditionalGeneration) -> RecordedDecoder:
        """The decoder that waits for a batch of this model, if it still fits, or a fresh one."""
        waiting, fresh = _waiting.pop(model, None), cls(model)
        if waiting is None or waiting.fits != fresh.fits:
            return fresh
        fresh.take_over(waiting)
        return fresh

    def take_over(self, waiting: RecordedDecoder) -> None:
        """Go on with the recordings and the cache of another decoder, over the same weights."""
        self.recordings, self.keys, self.values = waiting.recordings, waiting.keys, waiting.values
        self.filled, self.seen, self.starts = waiting.filled, waiting.seen, waiting.starts
        for layer, norm in zip(self.layers, waiting.head_norms, strict=True):
            if layer.head_norm is not None and norm is not None:  # recordings read the copy of these weights there
                norm.copy_(layer.head_norm[0])
                layer.head_norm = (norm, layer.head_norm[1])

    def wait(self, model: UniMMForConditionalGeneration) -> None:
        """Await the next batch, holding no weights; not where nothing is recorded, the cache is large or no longer
        whole, or more than weights may change.
        """
        places = [*self.keys, *self.values]
        size, held = sum(part.nbytes for part in places), sum(part.untyped_storage().nbytes() for part in places)
        if not self.recordings or self.fits is None or size < held or held > KEPT:
            return
        self.recordings = dict(list(self.recordings.items())[:KEPT_WIDTHS])
        self.head_norms = [layer.head_norm and layer.head_norm[0] for layer in self.layers]
        self.layers, self.parts = [], {}
        _waiting[model] = self

    @staticmethod
    def forget(model: UniMMForConditionalGeneration) -> None:
        """Let go of what waits for a batch of this model."""
        _waiting.pop(model, None)

    def _circumstances(self) -> list[object] | None:
        """What recordings rest on: where weights lie, and how products are computed.

        None where layers do more than their weights say, as adapters do, which are turned off and on, where weights lie
        nowhere, as those of quantised tensors, and under autocast, whose copies of them do not stay.
        """
        parts = [self.body] if self.model.norm is None else [self.body, self.model.norm]
        weights = [tensor for part in parts for tensor in chain(part.parameters(), part.buffers())]
        products = (module for name, module in self.body.layers.named_modules() if name.endswith("_proj"))
        if (
            any(type(weight.data) is not torch.Tensor for weight in weights)
            or any(type(module) not in (nn.Linear, Int8Linear) for module in products)
            or torch.is_autocast_enabled("cuda")
        ):
            return None
        return [
            torch.is_inference_mode_enabled(),
            torch.get_float32_matmul_precision(),
            *((weight.data_ptr(), weight.dtype) for weight in weights),
        ]

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, capacity: int) -> torch.Tensor:
        """See `CachedDecoder.prefill`."""
        capacity += -capacity % ALIGNED
        recorded = self._state() if self.recordings else []
        states = super().prefill(input_ids, attention_mask, capacity)
        self.filled = torch.tensor([self.length], device=input_ids.device)
        unseen = F.pad(attention_mask == 0, (0, self.keys[0].shape[2] - self.length))
        self.seen = ~unseen[:, None]
        if [old.shape for old in recorded] == [new.shape for new in self._state()]:
            for old, new in zip(recorded, self._state(), strict=True):
                old.copy_(new)
            count = len(self.keys)
            self.keys, self.values = recorded[:count], recorded[count : 2 * count]
            self.filled, self.seen, self.starts = recorded[2 * count :]
        else:
            self.recordings.clear()
        return states

    def _state(self) -> list[torch.Tensor]:
        """The tensors that recordings read and write."""
        return [*self.keys, *self.values, self.filled, self.seen, self.starts]

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
        with torch.cuda.device_of(held):
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
        return cache.index_copy_(2, places, new.to(cache.dtype))

    def _gather(
        self,
        layer: Layer,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        width: int,
    ) -> torch.Tensor:
        if mask is None:
            query = query.to(keys.dtype)  # another under autocast
            return few_queries_attention(query, keys, values, self.seen, self.filled, width, layer.scaling)
        return super()._gather(layer, query, keys, values, mask, width)

    def _mask(self, rows: int, places: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores `[R, 1, groups W, T]` of a step: nothing at the places that it sees.

        None where the kernel for few queries asks by itself what is seen.
        """
        if takes_few_queries(self.groups * len(places), self.keys[0]):
            return None
        reached = torch.arange(self.seen.shape[-1], device=places.device) <= places[:, None]  # [W, T]
        hidden = self.keys[0].new_zeros(()).masked_fill(~(self.seen & reached), -float("inf"))  # [R, W, T]
        return hidden[:, None].repeat(1, 1, self.groups, 1)

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
