"""Linear layers whose weights are stored for drawing: int8 by rows, four bits by bitsandbytes, or bfloat16 in the order
that a CPU reads fast.

A step of few rows reads weights and does little else, so bytes are time. Such layers draw and read; they do not train.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import is_bitsandbytes_available

from unimm.nn.few_rows import few_rows_product, takes_few_rows
from unimm.nn.processor import has_fast_bf16

FORMATS = ("bfloat16", "int8", "nf4")
SMALL = ("int8", "nf4")
INT8_ROWS = 24  # above, the kernel of torch for CPUs is slower than a product with restored weights
INT8_LANES = 16  # inputs that the kernel takes at once; with AVX-512 it reads and adds what lies beyond an uneven end
NF4_BLOCK = 64  # weights of one scale; bitsandbytes restores rows that end within one wrongly with AVX-512
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
        outputs = _scaled_product(inputs.flatten(0, -2), self.weight, self.scale)
        return (outputs if self.bias is None else outputs + self.bias).view(*inputs.shape[:-1], -1)

    def some(self, rows: torch.Tensor, outputs: slice | torch.Tensor) -> torch.Tensor:
        """Some outputs `[R, S]` of inputs `[R, I]`, without the bias."""
        return _scaled_product(rows, self.weight[outputs], self.scale[outputs])


def _scaled_product(rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[R, I]` and int8 `[O, I]` to `[R, O]`."""
    if takes_few_rows(rows, weight):
        return few_rows_product(rows, weight) * scale
    if len(rows) <= INT8_ROWS and weight.device.type == "cpu" and weight.shape[1] % INT8_LANES == 0:
        return torch._weight_int8pack_mm(rows.contiguous(), weight, scale)
    exact = rows if has_fast_bf16(rows.device) else rows.float()
    return (F.linear(exact, weight.to(exact.dtype)) * scale).to(rows.dtype)


class PackedLinear(nn.Module):
    """`x W^T + bias` in bfloat16 on a CPU, the weights laid out for oneDNN once rather than at every call.

    Only a CPU that is fast in bfloat16 has the layout; see `unimm.nn.processor`.

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


def check_format(weights: str | None) -> None:
    """Refuse what no layer can be stored as.

    Raises:
        ValueError: an unknown format, or one whose library is not installed.
    """
    if weights is None:
        return
    if weights not in FORMATS:
        raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(FORMATS)}, or None to leave them.")
    if weights == "nf4" and not is_bitsandbytes_available():
        raise ValueError("weights='nf4' is stored by bitsandbytes, which is not installed; pip install 'unimm[qlora]'.")


def four_bit_linear(linear: nn.Linear) -> nn.Module:
    """The layer of bitsandbytes with NF4 weights and doubly quantised constants (2305.14314)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    stored = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    weight = linear.weight.detach().bfloat16()
    stored.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    stored.bias = linear.bias
    return stored.to(linear.weight.device)  # which quantises


def store_linears(body: nn.Module, weights: str) -> None:
    """Turn all linear layers of a part, in place, into layers of one of `FORMATS`, whose activations are bfloat16.

    Layers whose inputs are no multiple of `NF4_BLOCK` are not stored in four bits.
    """
    device = next(body.parameters()).device
    fast = has_fast_bf16(device)
    if weights == "bfloat16" and not fast:
        warnings.warn("This processor is slow in bfloat16: float32 and int8 are faster.", stacklevel=2)
    for name, module in list(body.named_modules()):
        if type(module) is not nn.Linear:
            continue
        if weights == "int8":
            body.set_submodule(name, Int8Linear.from_linear(module))
        elif weights == "nf4":
            if module.in_features % NF4_BLOCK == 0:
                body.set_submodule(name, four_bit_linear(module))
        elif device.type == "cpu" and fast:
            body.set_submodule(name, PackedLinear(module))
