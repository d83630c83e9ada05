"""What a processor is fast in decides where a recipe does not."""

import torch

from unimm.nn.precision import has_fast_bf16
from unimm.training.loop import computes_in_bf16


def test_a_recipe_decides_or_the_processor_does():
    assert computes_in_bf16(True) is True
    assert computes_in_bf16(False) is False
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    assert computes_in_bf16(None) is has_fast_bf16(device)


def test_weights_are_laid_out_for_bfloat16_exactly_where_it_is_fast():
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    except RuntimeError:
        laid_out = False
    else:
        laid_out = True
    assert laid_out is has_fast_bf16(torch.device("cpu"))
