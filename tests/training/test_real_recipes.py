"""The recipes of real models parse, can be planned, and run two steps on random weights of their architecture."""

import json

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from test_language_data import HELLO, folder_of, picture_row
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from unimm import UniMMForConditionalGeneration, VisualCodecConfig, VisualCodecModel
from unimm.cli.main import main
from unimm.config import read_yaml
from unimm.sequence import train_text_tokenizer
from unimm.training.plan import WORDS, plan
from unimm.training.recipe import read_recipe, train

MODELS = ["qwen3-0.6b", "qwen2.5-7b"]
NAMES = ["codec", "detokenizer", "pretrain", "sft", "sft_lora", "sft_qlora", "grpo"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def recipes(request):
    return request.config.rootpath / "recipes"


@pytest.fixture(scope="module", params=MODELS)
def begun(request, recipes, worlds_folder, tmp_path_factory):
    """A model of the recipe's architecture, made small, and rows for it."""
    folder = recipes / request.param
    tokenizer = train_text_tokenizer(["a red heart, what color is it?"] * 5, vocab_size=400, max_length=512)
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    sizes = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    torch.manual_seed(0)
    fields = json.loads((folder / "config.json").read_text()) | SMALL | sizes
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    codec = UniMMForConditionalGeneration.from_pretrained(worlds_folder).codec
    layers = 1 if request.param == "qwen2.5-7b" else 0
    parts = UniMMForConditionalGeneration.from_backbones(
        AutoModelForCausalLM.from_config(config),
        codec,
        tokenizer,
        vision_layers_before=layers,
        vision_layers_after=layers,
    )
    made = tmp_path_factory.mktemp(request.param)
    for part in parts:
        part.save_pretrained(made / "model")
    hello = {"codes": [], "height": 0, "width": 0, "messages": HELLO, "fingerprint": codec.fingerprint()}
    folder_of(made / "rows", codec, [picture_row(codec, np.random.default_rng(0), captions=["a red heart"]), hello])
    (made / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("a heart", "a red one"))
    )
    return folder, made


def overrides(made, tmp_path, steps=2):
    return [
        f"run.directory={tmp_path}",
        f"init_from={made / 'model'}",
        f"optimizer.steps={steps}",
        "optimizer.warmup=0",
        "logging.report_to=[]",
        "logging.every=1",
        "bf16=false",
    ]


def language_overrides(made, tmp_path):
    small = ["pack_length=200", "batch_size=2", "micro_batch=1", "attention=eager", "sampling.guidance_scale=1.0"]
    return [*overrides(made, tmp_path), f"data.sources={{{made / 'rows'}: 1.0}}", *small]


def losses(directory):
    return [record["loss"] for record in directory.metrics() if "loss" in record]


@pytest.mark.parametrize(("name", "frozen"), [("sft_lora", "bfloat16"), ("sft_qlora", "int8")])
def test_adapters_run_two_steps(begun, tmp_path, name, frozen):
    """Four bits need a GPU: on CPUs their gradients vanish after the first sheet of samples."""
    if frozen == "int8":
        pytest.importorskip("bitsandbytes")
    folder, made = begun
    changes = [*language_overrides(made, tmp_path), f"adapter.frozen={frozen}", "optimizer.lr=1e-2"]
    directory = train(folder / f"{name}.yaml", changes)
    assert len(losses(directory)) == 2
    before, after = (UniMMForConditionalGeneration.from_pretrained(path) for path in (made / "model", directory.model))
    text = slice(0, before.config.image_token_offset)
    assert after.lm_head.weight[text].float().equal(before.lm_head.weight[text].to(after.dtype).float())
    changed = [
        key for key, weight in after.state_dict().items() if not weight.equal(before.state_dict()[key].to(weight.dtype))
    ]
    assert any("q_proj" in key for key in changed)
    assert "lm_head.weight" in changed
    assert not any("visual" in key for key in changed)


@pytest.mark.usefixtures("brightness")
def test_grpo_runs_two_steps(begun, tmp_path):
    folder, made = begun
    changes = [
        *overrides(made, tmp_path),
        f"prompts.source={made / 'prompts.jsonl'}",
        "rewards={brightness: 1.0}",
        "alignment_model=null",
        "rollout={prompts: 1, group_size: 2, micro_batch: 2}",
        "logging.sample_every=2",
    ]
    if folder.name == "qwen2.5-7b":
        changes.append("adapter.frozen=float32")  # as exact as the check of the first ratios wants it
    directory = train(folder / "grpo.yaml", changes)
    assert len(losses(directory)) == 2
    assert directory.metrics()[0]["ratio_deviation"] < 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_parses_and_names_stages_that_are_there(recipes, model):
    made = {}
    for path in sorted((recipes / model).glob("*.yaml")):
        recipe = read_recipe(path)
        made[f"{recipe.run.directory}/{recipe.run.name}/model"] = path.name
    wanted = [read_yaml(path).get(key) for path in (recipes / model).glob("*.yaml") for key in ("init_from", "codec")]
    assert {name for name in wanted if name} <= set(made)
    assert {f"{name}.yaml" for name in NAMES} <= {path.name for path in (recipes / model).glob("*.yaml")}
    readme = (recipes / model / "README.md").read_text()
    assert all(f"{name}.yaml" in readme for name in NAMES)
    assert "nobody has run" in readme


@pytest.mark.parametrize("model", MODELS)
def test_lora_and_full_differ_in_a_few_lines(recipes, model):
    full = (recipes / model / "sft.yaml").read_text().splitlines()
    for name in ("sft_lora", "sft_qlora"):
        assert len(set((recipes / model / f"{name}.yaml").read_text().splitlines()) - set(full)) <= 4


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_reads_its_files(recipes, engine):
    path = recipes / "accelerate" / f"{engine}.yaml"
    assert load_config_from_file(str(path)).num_processes == 8
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "bf16"


def test_a_plan_counts_the_weights_of_the_model_that_is_built(begun, tmp_path, worlds_folder):
    folder, made = begun
    model = UniMMForConditionalGeneration.from_pretrained(made / "model")
    found = plan(folder / "sft.yaml", language_overrides(made, tmp_path), world_size=2, gpu="h100")
    assert found.total == sum(weight.numel() for weight in model.parameters())
    assert found.trainable == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert found.trainable < found.total  # the codec is frozen
    assert found.work.units == 2 * 2 * 200
    assert {way.engine for way in found.memory} == {"ddp", "zero2", "fsdp2/zero3"}
    lora = plan(folder / "sft_lora.yaml", [*language_overrides(made, tmp_path), "adapter.rank=1"])
    assert 0 < lora.trainable < found.trainable
    assert lora.memory[0].states < found.memory[0].states


def test_a_plan_of_real_sizes_reads_earlier_stages_off_their_recipes(recipes):
    found = plan(recipes / "qwen2.5-7b" / "sft.yaml", world_size=64)
    assert 9.4e9 < found.total < 10.0e9  # 7.6 of the language model, 1.86 of vision layers, untied code rows
    sharded = {way.engine: way for way in found.memory}
    assert sharded["fsdp2/zero3"].states * 40 < sharded["ddp"].states
    assert "does not fit" in found.to_text()
    small = plan(recipes / "qwen3-0.6b" / "grpo.yaml", world_size=8)
    assert small.work.units == 200 * 4 * 16 * 8
    with pytest.raises(ValueError, match="name one of rtx4090"):
        plan(recipes / "qwen3-0.6b" / "grpo.yaml", gpu="abacus")
    with pytest.raises(ValueError, match="run the stage before this one"):
        plan(recipes / "qwen3-0.6b" / "grpo.yaml", ["init_from=nowhere"])


def test_a_plan_counts_codes_that_lie_on_no_grid(recipes, tmp_path):
    """32 codes of a picture whose encoder has 64 cells."""
    VisualCodecConfig(**read_yaml(recipes / "codecs" / "titok.yaml")["model"]).save_pretrained(tmp_path)
    recipe = recipes / "tiny" / "pretrain.yaml"
    found = plan(recipe, [f"codec={tmp_path}", "optimizer.steps=1", "batch_size=1"])
    assert found.work.units == 1 + 32 + 1 + WORDS


def test_every_recipe_of_the_shipped_model_has_a_plan(recipes, capsys):
    for path in sorted((recipes / "tiny").glob("*.yaml")):
        assert main(["train", "--plan", str(path)]) == 0
        shown = capsys.readouterr().out
        assert "weights " in shown
        assert "fits" in shown


def test_a_plan_counts_arithmetic_as_torch_does(recipes, tmp_path):
    path = tmp_path / "codec.yaml"
    data = read_yaml(recipes / "tiny" / "codec.yaml") | {"optimizer": {"steps": 10}}
    path.write_text(yaml.safe_dump(data))
    found = plan(path)
    assert found.work.units == 10 * data["data"]["batch_size"]
    codec = VisualCodecModel(VisualCodecModel.config_class(**data["model"]))
    assert found.trainable == sum(weight.numel() for weight in codec.parameters())
    assert found.work.flops > 6 * found.work.units * found.trainable  # convolutions use a weight at every place
