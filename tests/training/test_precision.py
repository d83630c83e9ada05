"""What a processor is fast in decides where a recipe does not."""

import pytest
import torch

from unimm.nn.processor import has_fast_bf16
from unimm.training.loop import computes_in_bf16


def test_a_recipe_decides_or_the_processor_does():
    assert computes_in_bf16(True) is True
    assert computes_in_bf16(False) is False
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    assert computes_in_bf16(None) is has_fast_bf16(device)


def test_weights_are_laid_out_for_bfloat16_wherever_it_is_fast_or_imitated():
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._reorder_linear_weight(weight, 4)
    except RuntimeError:
        laid_out = False
    else:
        laid_out = True
    assert laid_out is bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert laid_out or not has_fast_bf16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("supported", "avx512", "instructions", "fast"),
    [(False, False, False, False), (True, True, False, False), (True, True, True, True), (True, False, False, True)],
)
def test_a_processor_that_imitates_bfloat16_is_not_fast_in_it(monkeypatch, supported, avx512, instructions, fast):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert has_fast_bf16(torch.device("cpu")) is fast
