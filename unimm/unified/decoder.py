"""Token by token through a body of the llama kind, over a cache of fixed size.

In: ids, one or a few per row. Out: hidden states and logits of a part of the head. The layers, weights and adapters are
those of the stock model; what is left out is what a step of one token does not need: masks over empty places, a second
pass for guidance, growing the cache by copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from unimm.nn.few_rows import few_rows_product, takes_few_rows
from unimm.nn.processor import is_intel
from unimm.nn.stored import Int8Linear

if TYPE_CHECKING:
    from unimm.unified.modeling import UniMMForConditionalGeneration

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# The other kinds change the frequencies with the length of the sequence.
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
FEW_ROWS, MANY_ROWS = 6, 16
Projection = Callable[[torch.Tensor], torch.Tensor]


def is_covered(text_config: PreTrainedConfig) -> bool:
    """Whether `CachedDecoder` computes what the stock body of this configuration computes."""
    settings = text_config.to_dict()
    return (
        settings["model_type"] in FAMILIES
        and set(settings.get("layer_types") or ["full_attention"]) == {"full_attention"}
        and settings.get("sliding_window") is None
        and (settings.get("rope_parameters") or {}).get("rope_type", "default") in ROPE_KINDS
    )


def product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Projection:
    """`rows @ weight.T + bias` for rows `[R, I]` and a weight `[O, I]`.

    In float32 on a CPU few rows are taken as `W x^T`: the same product by a kernel that reads weights two to three
    times as fast there, which is all that a step of one token does. For one row weights are read slower than for two.
    Many rows gain a tenth by it where they do not lose; those between lose. On Intel's it is the other way round: few
    rows are read at half the speed so, and all others faster. On a GPU few rows have their own kernel.
    """
    plain = range(1, FEW_ROWS + 1) if is_intel() else range(FEW_ROWS + 1, MANY_ROWS)

    def linear(rows: torch.Tensor) -> torch.Tensor:
        if takes_few_rows(rows, weight):
            result = few_rows_product(rows, weight)
            return result if bias is None else result + bias
        return F.linear(rows, weight, bias)

    def turned(rows: torch.Tensor) -> torch.Tensor:
        number = len(rows)
        if number in plain:
            return linear(rows)
        if number == 1:
            rows = rows.expand(2, -1)
        result = torch.mm(weight, rows.contiguous().t()).t()
        result = result if bias is None else result + bias
        return result[:1] if number == 1 else result

    return turned if weight.dtype == torch.float32 and weight.device.type == "cpu" else linear


def projection(linear: nn.Module) -> Projection:
    """What a layer does to rows; layers of another class, adapters among them, are called as they are."""
    return product(linear.weight, linear.bias) if type(linear) is nn.Linear else linear


def joined(linears: Sequence[nn.Module]) -> Projection:
    """What layers over the same rows do, side by side.

    Plain layers, or layers in int8, become neighbours in memory, the weight of each a part of the whole, so that one
    product reads all of them and nothing is stored twice; so do their biases and scales.
    """
    plain = [linear for linear in linears if type(linear) is nn.Linear and type(linear.weight.data) is torch.Tensor]
    stored = [linear for linear in linears if type(linear) is Int8Linear]
    alike = plain if len(plain) == len(linears) else stored
    biases = [linear.bias for linear in alike if linear.bias is not None]
    if len(alike) < len(linears) or len(biases) not in (0, len(linears)):
        each = [projection(linear) for linear in linears]
        return lambda rows: torch.cat([project(rows) for project in each], dim=-1)
    weight, bias = _neighbours([linear.weight for linear in alike]), _neighbours(biases) if biases else None
    if stored:
        return Int8Linear(weight, _neighbours([linear.scale for linear in stored]), bias)
    return product(weight, bias)


def _neighbours(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole `[O, I]` of weights `[O_i, I]`, or `[O]` of `[O_i]`, which are moved into it unless they lie so."""
    first, start, row = weights[0], weights[0].storage_offset(), weights[0].shape[1:]
    starts = [start + sum(weight.numel() for weight in weights[:place]) for place in range(len(weights))]
    whole = first.detach()
    if not all(
        weight.is_contiguous()
        and weight.storage_offset() == offset
        and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for weight, offset in zip(weights, starts, strict=True)
    ):
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
        start = 0
    return whole.as_strided((sum(len(weight) for weight in weights), *row), whole.stride(), start)


def rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The norm of this family over the last dimension."""
    return F.rms_norm(states, states.shape[-1:], None, epsilon) * weight


class Layer:
    """What a step needs of one stock decoder layer, taken out of its modules once."""

    def __init__(self, layer: Any, *, is_vision: bool, has_head_norms: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.is_vision = is_vision
        self.input_norm, self.inner_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.head_norm = _head_norm(attention) if has_head_norms else None
        self.queries_keys_values = joined((attention.q_proj, attention.k_proj, attention.v_proj))
        self.gate_up = joined((mlp.gate_proj, mlp.up_proj))
        self.out, self.down = projection(attention.o_proj), projection(mlp.down_proj)
        self.activation = mlp.act_fn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling


class CachedDecoder:
    """The body and the head of one model, for one batch.

    Args:
        model: of a covered family (`is_covered`), in eval mode.
    """

    def __init__(self, model: UniMMForConditionalGeneration) -> None:
        config = model.config
        body: Any = model.model.language_model
        text = body.config
        self.model, self.body = model.model, body
        self.head: nn.Module = model.lm_head
        self.vocabulary, self.has_vision_path = config.vocabulary, config.has_vision_path
        last = len(body.layers) - config.vision_layers_after
        self.layers = [
            Layer(
                layer,
                is_vision=not config.vision_layers_before <= index < last,
                has_head_norms=text.model_type == "qwen3",
            )
            for index, layer in enumerate(body.layers)
        ]
        self.heads, self.groups = text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.parts: dict[tuple[int, int] | int, Projection] = {}
        self.length = 0

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, capacity: int) -> torch.Tensor:
        """Hidden states `[R, 1, D]` after prompts `[R, T]`, padded on the left; equal prompts are read once.

        Args:
            capacity: positions that the cache has room for at first.
        """
        rows, self.length = len(input_ids), input_ids.shape[1]
        prompts, places = torch.cat([input_ids, attention_mask], dim=1).unique(dim=0, return_inverse=True)
        ids, mask = prompts.chunk(2, dim=1)
        self.starts = attention_mask.sum(dim=1, keepdim=True) - self.length  # positions begin after the padding
        padded = bool((attention_mask == 0).any())
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask if padded else None,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            use_cache=True,
        )
        layers = outputs.past_key_values.layers
        self.keys = [self._room(layer.keys[places], capacity) for layer in layers]
        self.values = [self._room(layer.values[places], capacity) for layer in layers]
        self.padding: torch.Tensor | None = None
        if padded:  # [R, 1, 1, T], added to attention scores
            hidden_places = attention_mask[:, None, None] == 0
            self.padding = self.keys[0].new_zeros(rows, 1, 1, self.length).masked_fill(hidden_places, -float("inf"))
        return outputs.last_hidden_state[places, -1:]

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[R, W, D]` of the next ids `[R, W]`, which the cache then holds."""
        width = input_ids.shape[1]
        self._make_room(width)
        states = self._forward(input_ids, self.length + torch.arange(width, device=input_ids.device))
        self.length += width
        return states

    def _forward(self, input_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Hidden states `[R, W, D]` of ids `[R, W]` that take the places `[W]` of the cache."""
        rows, width = input_ids.shape
        hidden = self.body.embed_tokens(input_ids).flatten(0, 1)  # [R W, D]
        image = self.vocabulary.is_visual(input_ids).view(-1, 1) if self.has_vision_path else None
        cos, sin = self.body.rotary_emb(hidden, self.starts + places)  # [R, W, head width]
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        rotation = (cos[:, :, None], sin[:, :, None])
        mask = self._mask(rows, places)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            changed = self._through(layer, hidden, rotation, mask, keys, values, places)
            hidden = torch.where(image, changed, hidden) if layer.is_vision and image is not None else changed
        return self._final_norm(hidden, image).view(rows, width, -1)

    def rewind(self, positions: int) -> None:
        """Forget the last ids."""
        self.length -= positions

    def keep(self, rows: int) -> None:
        """Go on with the first rows only; their keys and values stay where they are."""
        self.keys = [keys[:rows] for keys in self.keys]
        self.values = [values[:rows] for values in self.values]
        self.starts = self.starts[:rows]
        if self.padding is not None:
            kept = self.padding[:rows]
            self.padding = kept if bool(kept.any()) else None

    def logits(self, hidden: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """Logits `[R, S]` of some rows of the head, for hidden states `[R, D]`."""
        key = (rows.start, rows.stop) if isinstance(rows, slice) else id(rows)
        if key not in self.parts:
            self.parts[key] = self._part(rows)
        return self.parts[key](hidden)

    def _part(self, rows: slice | torch.Tensor) -> Projection:
        if isinstance(self.head, Int8Linear):
            return partial(self.head.some, outputs=rows)
        assert isinstance(self.head.weight, torch.Tensor)
        return product(self.head.weight[rows])

    def _through(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states `[R W, D]` after a layer whose cache is `keys` and `values`."""
        attended = hidden + self._attend(layer, hidden, rotation, mask, keys, values, places)
        gate, up = layer.gate_up(rms_norm(attended, *layer.inner_norm)).chunk(2, dim=-1)
        return attended + layer.down(layer.activation(gate) * up)

    def _attend(
        self,
        layer: Layer,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        places: torch.Tensor,
    ) -> torch.Tensor:
        rows, width = rotation[0].shape[:2]
        shape = (rows, width, -1, layer.head_dim)
        every = layer.queries_keys_values(rms_norm(hidden, *layer.input_norm)).reshape(shape)
        both, value = every.split([self.heads * (self.groups + 1), self.heads], dim=2)
        if layer.head_norm is not None:
            both = rms_norm(both, *layer.head_norm)
        cos, signed_sin = rotation
        both = torch.addcmul(both * cos, both.roll(layer.head_dim // 2, dims=-1), signed_sin)
        query, key = both.split([self.heads * self.groups, self.heads], dim=2)  # [R, W, heads, head width]
        keys = self._remember(keys, key.transpose(1, 2), places)
        values = self._remember(values, value.transpose(1, 2), places)
        # The query heads that share a key head become query positions, so that keys and values are read once.
        if width == 1:
            grouped = query.reshape(rows, self.heads, self.groups, layer.head_dim)
        else:
            grouped = query.unflatten(2, (self.heads, self.groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = self._gather(layer, grouped, keys, values, mask, width)
        if width > 1:
            mixed = mixed.unflatten(2, (self.groups, width)).permute(0, 3, 1, 2, 4)
        return layer.out(mixed.reshape(rows * width, -1))

    def _gather(
        self,
        layer: Layer,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        width: int,
    ) -> torch.Tensor:
        """What queries `[R, heads, groups W, head width]` find in keys and values."""
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=layer.scaling)

    def _remember(self, cache: torch.Tensor, new: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Write `[R, heads, W, width]` behind what the cache holds, and give what it holds then."""
        filled = cache.narrow(2, 0, self.length + len(places))
        filled.narrow(2, self.length, len(places)).copy_(new)
        return filled

    def _mask(self, rows: int, places: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores `[R, 1, groups W, T]` of this step; None where every place may be seen."""
        width = len(places)
        if self.padding is None and width == 1:
            return None
        end = self.length + width
        mask = self.keys[0].new_zeros(rows, 1, width, end)
        if self.padding is not None:
            mask[..., : self.padding.shape[-1]] = self.padding
        if width > 1:
            mask[..., self.length :] = torch.full_like(mask[0, 0, :, self.length :], -float("inf")).triu(1)
        return mask if width == 1 else mask.repeat(1, 1, self.groups, 1)

    def _final_norm(self, hidden: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        norm = self.model.norm
        if norm is None:
            return rms_norm(hidden, *_norm(self.body.norm))
        assert image is not None
        return norm(hidden, image[:, 0])

    def _room(self, filled: torch.Tensor, capacity: int) -> torch.Tensor:
        """`[R, heads, T, width]` with room for `capacity` positions."""
        return F.pad(filled, (0, 0, 0, max(capacity - filled.shape[2], 0)))

    def _make_room(self, width: int) -> None:
        """Let the cache hold `width` more positions."""
        needed = self.length + width
        if needed > self.keys[0].shape[2]:
            capacity = max(needed, 2 * self.keys[0].shape[2])
            self.keys = [self._room(keys, capacity) for keys in self.keys]
            self.values = [self._room(values, capacity) for values in self.values]


def _norm(norm: Any) -> tuple[torch.Tensor, float]:
    return norm.weight, norm.variance_epsilon


def _head_norm(attention: Any) -> tuple[torch.Tensor, float]:
    """Weights `[heads, head width]` of the norms of queries and keys, one after the other."""
    query, key = attention.q_norm, attention.k_norm
    heads = [attention.config.num_attention_heads, attention.config.num_key_value_heads]
    weights = [norm.weight.expand(count, -1) for norm, count in zip((query, key), heads, strict=True)]
    return torch.cat(weights), query.variance_epsilon
