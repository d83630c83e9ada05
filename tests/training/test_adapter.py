"""Adapters: text rows do not move, code rows do, and the merged model is the adapted one."""

import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from test_grpo import curve, grpo_recipe

from unimm import UniMMForConditionalGeneration
from unimm.config import from_dict, read_yaml
from unimm.data.rows import write_rows
from unimm.training.adapter import AdapterConfig, begin_adapter, lora_config, merge_adapter
from unimm.training.language import LanguageRecipe
from unimm.training.recipe import train

SMALL = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]}


def code_block(model):
    vocabulary = model.config.vocabulary
    return slice(vocabulary.image_token_offset, vocabulary.image_token_end)


def assert_adapted(before, after):
    """Code rows and adapted layers moved, every other weight is what it was."""
    block, old, new = code_block(before), before.state_dict(), after.state_dict()
    rows = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    for name, weight in old.items():
        if name in rows:
            kept = torch.ones(len(weight), dtype=torch.bool)
            kept[block] = False
            assert new[name][kept].equal(weight[kept])
            assert not new[name][block].equal(weight[block])
        else:
            adapted = name.endswith(("q_proj.weight", "down_proj.weight"))
            assert new[name].equal(weight) != adapted, name


def test_a_merged_model_has_the_logits_of_its_adapter(tiny, tmp_path):
    model = UniMMForConditionalGeneration(tiny[0].config).eval()
    config = from_dict(AdapterConfig, SMALL)
    adapted = begin_adapter(model, config)
    plain_names = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any("trainable_tokens" in name for name in plain_names)
    assert not any("visual" in name for name in plain_names)
    torch.manual_seed(0)
    ids = torch.randint(8, model.config.vocabulary.image_token_end, (2, 12))
    plain = adapted(ids).logits.detach()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
        changed = adapted(ids).logits
        merged = merge_adapter(adapted, config, tmp_path)(ids).logits
    assert torch.allclose(merged, changed, atol=1e-5)
    assert not torch.allclose(merged, plain, atol=1e-3)


def test_sft_of_an_adapter_moves_what_it_should_and_reloads(worlds_folder, tmp_path):
    before = UniMMForConditionalGeneration.from_pretrained(worlds_folder)
    write_rows(before.codec, {"shapes": 1.0}, num_rows=8, seed=0, folder=tmp_path / "rows")
    recipe = {
        "task": "sft",
        "run": {"name": "lora", "directory": str(tmp_path)},
        "init_from": str(worlds_folder),
        "adapter": SMALL,
        "data": {"worlds": {"shapes": 1.0}, "folder": str(tmp_path / "rows"), "num_rows": 8},
        "batch_size": 2,
        "answers_only": True,
        "optimizer": {"steps": 2, "lr": 1e-2, "warmup": 0},
        "logging": {"every": 1, "sample_every": 2, "save_every": 1},
        "bf16": False,
    }
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe))
    directory = train(tmp_path / "lora.yaml")
    after = UniMMForConditionalGeneration.from_pretrained(directory.model)
    assert_adapted(before, after)
    again = PeftModel.from_pretrained(before, directory.root / "adapter").eval()
    ids = torch.arange(8, 40)[None]
    assert torch.allclose(again(ids).logits, after(ids).logits, atol=1e-5)
    losses = [record["loss"] for record in directory.metrics() if "loss" in record]
    (directory.root / "finished.json").unlink()
    shutil.rmtree(directory.checkpoints / "checkpoint-2")
    train(tmp_path / "lora.yaml")
    assert [record["loss"] for record in directory.metrics() if "loss" in record] == losses


@pytest.mark.usefixtures("brightness")
def test_grpo_of_an_adapter_moves_what_it_should(worlds_folder, tmp_path):
    recipe = grpo_recipe(
        tmp_path, worlds_folder, "lora", adapter=SMALL, optimizer={"steps": 2, "lr": 1e-2, "warmup": 0}
    )
    directory = train(recipe)
    assert directory.metrics()[0]["ratio_deviation"] < 1e-3
    assert curve(directory)[0][3] == pytest.approx(0, abs=1e-5)  # the reference is the model without its adapter
    assert curve(directory)[1][3] > 1e-6
    before, after = (UniMMForConditionalGeneration.from_pretrained(path) for path in (worlds_folder, directory.model))
    assert_adapted(before, after)


def test_layers_that_are_not_there_are_refused(tiny):
    with pytest.raises(ValueError, match="the text model has down_proj"):
        lora_config(tiny[0], AdapterConfig(target_modules=("query",)))


def test_lora_and_full_differ_in_a_few_lines(request):
    recipes = request.config.rootpath / "recipes" / "tiny"
    full, lora = (recipes / "sft.yaml").read_text().splitlines(), (recipes / "sft_lora.yaml").read_text().splitlines()
    assert len(set(lora) - set(full)) <= 5
    assert from_dict(LanguageRecipe, read_yaml(recipes / "sft_lora.yaml")).adapter is not None
