"""Which weights Muon takes."""

import pytest
import torch
from pytorch_optimizer import Muon
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from unimm.codec import VisualCodecModel, load_preset
from unimm.training.optimizer import ExactMuon, OptimizerConfig, build_optimizer


def names_with_muon(model):
    optimizer = build_optimizer(model, OptimizerConfig(steps=1, muon_lr=0.02))
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [weight for weight in model.parameters() if weight.requires_grad]
    )
    return {names[id(w)] for group in optimizer.param_groups if group["use_muon"] for w in group["params"]}


def test_muon_takes_every_matrix_of_the_decoder_layers_and_no_row_of_the_vocabulary(tiny):
    model = tiny[0]
    layers = model.model.language_model.layers
    prefix = "model.language_model.layers."
    assert names_with_muon(model) == {
        f"{prefix}{name}.weight" for name, module in layers.named_modules() if isinstance(module, nn.Linear)
    }


def test_muon_takes_the_convolutions_of_a_codec_but_neither_pixels_nor_codebook():
    names = names_with_muon(VisualCodecModel(load_preset("smallest")))
    assert names
    assert all(".conv_in." in name or ".conv_out." in name for name in names)
    assert not any(part in name for name in names for part in ("layers.0.", "to_pixels", "quantizer", "resampler"))


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma3_text", "llama"])
def test_decoder_layers_of_other_families_are_residual_blocks_too(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = CONFIG_MAPPING[kind](**sizes, num_attention_heads=2, num_key_value_heads=1)
    names = names_with_muon(AutoModelForCausalLM.from_config(config))
    assert len(names) >= 4
    assert not any("embed" in name or "lm_head" in name for name in names)


def test_without_fast_bfloat16_updates_are_the_same_and_exact():
    torch.manual_seed(0)
    updates = [torch.randn(24, 8), torch.randn(8, 8), torch.randn(6, 4, 3, 3)]
    group = {"ns_steps": 5, "ns_coeffs": ((3.4445, -4.7750, 2.0315),)}
    exact = ExactMuon._orthogonalize(group, [update.clone() for update in updates])
    for one, update in zip(exact, updates, strict=True):
        near = Muon._orthogonalize(group, [update.clone()])[0].float()
        assert one.dtype == torch.float32
        assert float((one - near).norm() / one.norm()) < 0.03
        assert torch.linalg.svdvals(one).min() > 0.5  # Newton-Schulz brings every one near 1
