"""Token by token through a body of the llama kind, over a cache of fixed size.

In: ids, one or a few per row. Out: hidden states and logits of a part of the head. The layers, weights and adapters are
those of the stock model; what is left out is what a step of one token does not need: masks over empty places, a second
pass for guidance, growing the cache by copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from unimm.unified.modeling import UniMMForConditionalGeneration

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# The other kinds change the frequencies with the length of the sequence.
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
FEW_ROWS = 6


def is_covered(text_config: PreTrainedConfig) -> bool:
    """Whether `CachedDecoder` computes what the stock body of this configuration computes."""
    settings = text_config.to_dict()
    return (
        settings["model_type"] in FAMILIES
        and set(settings.get("layer_types") or ["full_attention"]) == {"full_attention"}
        and settings.get("sliding_window") is None
        and (settings.get("rope_parameters") or {}).get("rope_type", "default") in ROPE_KINDS
    )


def project(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """`linear(rows)` of rows `[R, I]`.

    A plain float32 layer on a CPU takes few rows as `W x^T`: the same product by a kernel that reads weights two to
    three times as fast there, which is all that a step of one token does.
    """
    if type(linear) is not nn.Linear:
        return linear(rows)
    return multiply(linear.weight, rows, linear.bias)


def multiply(weight: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ weight.T + bias` of rows `[R, I]` and a weight `[O, I]`, see `project`."""
    if len(rows) > FEW_ROWS or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return F.linear(rows, weight, bias)
    paired = rows.expand(2, -1) if len(rows) == 1 else rows  # two rows are read faster than one
    product = torch.mm(weight, paired.contiguous().t()).t()[: len(rows)]
    return product if bias is None else product + bias


class CachedDecoder:
    """The body and the head of one model, for one batch.

    Args:
        model: of a covered family (`is_covered`), in eval mode.
    """

    def __init__(self, model: UniMMForConditionalGeneration) -> None:
        config = model.config
        body: Any = model.model.language_model
        text = body.config
        self.model, self.body, self.head = model.model, body, model.lm_head
        self.vocabulary, self.has_vision_path = config.vocabulary, config.has_vision_path
        last = len(body.layers) - config.vision_layers_after
        self.layers = [(layer, not config.vision_layers_before <= i < last) for i, layer in enumerate(body.layers)]
        self.heads, self.groups = text.num_key_value_heads, text.num_attention_heads // text.num_key_value_heads
        self.head_norms = [_head_norm(layer.self_attn) if text.model_type == "qwen3" else None for layer in body.layers]
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
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
        rows, width = input_ids.shape
        if self.length + width > self.keys[0].shape[2]:
            self._grow(self.length + width)
        positions = self.starts + self.length + torch.arange(width, device=input_ids.device)
        hidden = self.body.embed_tokens(input_ids).flatten(0, 1)  # [R W, D]
        image = self.vocabulary.is_visual(input_ids).view(-1, 1) if self.has_vision_path else None
        cos, sin = self.body.rotary_emb(hidden, positions)  # [R, W, head width]
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        rotation = (cos[:, :, None], sin[:, :, None])
        mask = self._mask(rows, width)
        for index, (layer, is_vision) in enumerate(self.layers):
            attended = hidden + self._attend(index, layer, hidden, rotation, mask)
            gated = F.rms_norm(attended, attended.shape[-1:], *_norm(layer.post_attention_layernorm))
            mlp = layer.mlp
            inner = mlp.act_fn(project(mlp.gate_proj, gated)) * project(mlp.up_proj, gated)
            changed = attended + project(mlp.down_proj, inner)
            hidden = torch.where(image, changed, hidden) if is_vision and image is not None else changed
        self.length += width
        return self._final_norm(hidden, image).view(rows, width, -1)

    def rewind(self, positions: int) -> None:
        """Forget the last ids."""
        self.length -= positions

    def logits(self, hidden: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """Logits `[R, S]` of some rows of the head, for hidden states `[R, D]`."""
        return multiply(self.head.weight[rows], hidden)

    def _attend(
        self,
        index: int,
        layer: Any,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        attention = layer.self_attn
        rows, width = rotation[0].shape[:2]
        normed = F.rms_norm(hidden, hidden.shape[-1:], *_norm(layer.input_layernorm))
        shape = (rows, width, -1, attention.head_dim)
        query, key = project(attention.q_proj, normed).reshape(shape), project(attention.k_proj, normed).reshape(shape)
        both = torch.cat([query, key], dim=2)  # [R, W, heads, head width]
        if (norm := self.head_norms[index]) is not None:
            weight, epsilon = norm
            both = F.rms_norm(both, both.shape[-1:], None, epsilon) * weight
        cos, signed_sin = rotation
        swapped = both.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        both = torch.addcmul(both * cos, swapped, signed_sin)
        query, key = both.split([self.heads * self.groups, self.heads], dim=2)
        end = self.length + width
        keys, values = self.keys[index], self.values[index]
        keys[:, :, self.length : end] = key.transpose(1, 2)
        values[:, :, self.length : end] = project(attention.v_proj, normed).reshape(shape).transpose(1, 2)
        # The query heads that share a key head become query positions, so that keys and values are read once.
        grouped = query.unflatten(2, (self.heads, self.groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(
            grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask, scale=attention.scaling
        )
        mixed = mixed.unflatten(2, (self.groups, width)).permute(0, 3, 1, 2, 4).reshape(rows * width, -1)
        return project(attention.o_proj, mixed)

    def _mask(self, rows: int, width: int) -> torch.Tensor | None:
        """What is added to the scores `[R, 1, groups W, T]` of this step; None where every place may be seen."""
        if self.padding is None and width == 1:
            return None
        end = self.length + width
        mask = self.keys[0].new_zeros(rows, 1, width, end)
        if self.padding is not None:
            mask[..., : self.padding.shape[-1]] = self.padding
        if width > 1:
            mask[..., self.length :] = torch.full_like(mask[0, 0, :, self.length :], -float("inf")).triu(1)
        return mask.repeat(1, 1, self.groups, 1)

    def _final_norm(self, hidden: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        norm = self.model.norm
        if norm is None:
            return F.rms_norm(hidden, hidden.shape[-1:], *_norm(self.body.norm))
        assert image is not None
        return norm(hidden, image[:, 0])

    def _room(self, filled: torch.Tensor, capacity: int) -> torch.Tensor:
        """`[R, heads, T, width]` with room for `capacity` positions."""
        return F.pad(filled, (0, 0, 0, max(capacity - filled.shape[2], 0)))

    def _grow(self, needed: int) -> None:
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
