"""Linear layers whose weights are stored for drawing: int8 by rows, or bfloat16 in the order that a CPU reads fast.

In: a model. Out: the same model, whose language model holds such layers; it draws and reads, and no longer trains. A
step of few rows reads weights and does little else, so bytes are time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from unimm.nn.precision import has_fast_bf16

if TYPE_CHECKING:
    from unimm.unified.modeling import UniMMForConditionalGeneration

FORMATS = ("bfloat16", "int8")
INT8_ROWS = 24  # above, the kernel of torch is slower than a product with restored weights
PACKED_FOR = 4  # rows that the order is chosen for; any number works


class Int8Linear(nn.Module):
    """`x W^T + bias` with symmetric int8 weights, one scale per output; activations stay as they come.

    Args:
        weight: int8 `[O, I]`.
        scale: `[O]`, in the dtype of the activations.
        bias: `[O]` or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Round the weights of a layer to 255 levels of their row's largest; activations will be bfloat16."""
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        levels = (weight / scale[:, None]).round().to(torch.int8)
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        return cls(levels, scale.bfloat16(), bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        product = self.some(inputs.flatten(0, -2), slice(None))
        return (product if self.bias is None else product + self.bias).view(*inputs.shape[:-1], -1)

    def some(self, rows: torch.Tensor, outputs: slice | torch.Tensor) -> torch.Tensor:
        """Some outputs `[R, S]` of inputs `[R, I]`, without the bias."""
        weight, scale = self.weight[outputs], self.scale[outputs]
        if len(rows) <= INT8_ROWS:
            return torch._weight_int8pack_mm(rows.contiguous(), weight, scale)
        return F.linear(rows, weight.to(rows.dtype)) * scale


class PackedLinear(nn.Module):
    """`x W^T + bias` in bfloat16 on a CPU, the weights laid out for oneDNN once rather than at every call.

    Only a CPU that is fast in bfloat16 has the layout; see `unimm.nn.precision`.

    The operators are those that torch.compile emits for frozen weights.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        weight = linear.weight.detach().bfloat16().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")


def compress(model: UniMMForConditionalGeneration, weights: str) -> None:
    """Turn the language model's linear layers, in place, into layers of another format; the rest becomes bfloat16.

    Args:
        weights: `bfloat16` or `int8`. The scales of int8 are by rows, the head included; the codec stays as it is.

    Raises:
        ValueError: an unknown format.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(FORMATS)}, or None to leave them.")
    body = model.model.language_model
    packs = model.device.type == "cpu" and has_fast_bf16(model.device)
    model.requires_grad_(False)
    for name, module in list(body.named_modules()):
        if type(module) is not nn.Linear:
            continue
        if weights == "int8":
            body.set_submodule(name, Int8Linear.from_linear(module))
        elif packs:
            body.set_submodule(name, PackedLinear(module))
    if weights == "int8":
        model.set_submodule("lm_head", Int8Linear.from_linear(model.lm_head))
    for part in (body, model.model.norm, model.lm_head):
        if part is not None:
            part.to(torch.bfloat16)
