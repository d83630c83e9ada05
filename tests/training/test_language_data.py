"""Rows of any folder are trained on: mixtures keep their weights, packs keep conversations apart."""

import numpy as np
import pytest
import torch
import yaml
from conftest import random_llm
from transformers import TrainingArguments

from unimm import UniMMForConditionalGeneration, UniMMProcessor
from unimm.codec import VisualCodecImageProcessor
from unimm.data.conversations import TaskRates
from unimm.data.rows import ShardReport, read_rows, write_shard
from unimm.sequence import ImagePart
from unimm.training.language import LanguageTrainer, share_batch
from unimm.training.language_data import ConversationDataset, PackInOneRow, PadRight, RowsConfig
from unimm.training.optimizer import OptimizerConfig
from unimm.training.recipe import train

HELLO = [
    {"role": "user", "content": [{"type": "text", "text": "what color is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]


def picture_row(codec, rng, **words):
    (rows, columns), sizes = codec.config.length_policy.grids()[0], codec.spec_without_fingerprint.sizes
    codes = [[int(rng.integers(size)) for size in sizes] for _ in range(rows * columns)]
    return {"codes": codes, "height": rows, "width": columns, "fingerprint": codec.fingerprint(), **words}


def folder_of(path, codec, rows):
    write_shard(rows, path / "rows-00000-00000.parquet", ShardReport(len(rows)))
    return path


@pytest.fixture(scope="module")
def captioned(codec, tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [picture_row(codec, rng, captions=[text]) for text in ("a red heart", "a blue star above three circles", "")]
    return folder_of(tmp_path_factory.mktemp("captioned"), codec, rows)


@pytest.fixture(scope="module")
def chat(codec, tmp_path_factory):
    row = {"codes": [], "height": 0, "width": 0, "messages": HELLO, "fingerprint": codec.fingerprint()}
    return folder_of(tmp_path_factory.mktemp("chat"), codec, [row])


def dataset(codec, processor, folders, pack_length=None, length=400):
    return ConversationDataset(
        [(read_rows(folder, codec), weight) for folder, weight in folders.items()],
        processor,
        tasks=TaskRates(draw=1.0, read=1.0, show=1.0),
        answers_only=False,
        pack_length=pack_length,
        seed=0,
        length=length,
    )


def test_a_mixture_keeps_its_weights_and_repeats_itself(codec, tiny, captioned, chat):
    mixed = dataset(codec, tiny[1], {captioned: 1.0, chat: 3.0})
    hello = tiny[1].encode_messages(HELLO, [], answers_only=False).input_ids
    found = [item["input_ids"] == hello for index in range(len(mixed)) for item in mixed[index]]
    assert 0.68 < np.mean(found) < 0.82
    assert mixed[7] == dataset(codec, tiny[1], {captioned: 1.0, chat: 3.0})[7]


def test_pictures_to_read_are_copies_and_pictures_to_draw_are_not(codec, tiny, tmp_path):
    rng = np.random.default_rng(0)
    row = picture_row(codec, rng, captions=["a red heart"])
    row["copy_codes"] = picture_row(codec, rng)["codes"]
    folder, processor = folder_of(tmp_path / "rows", codec, [row]), tiny[1]
    rows = [(read_rows(folder, codec), 1.0)]
    for rates, expected in (
        (TaskRates(draw=0.0, read=1.0, show=0.0, copied=1.0), "copy_codes"),
        (TaskRates(draw=0.0, read=1.0, show=0.0, copied=0.0), "codes"),
        (TaskRates(draw=1.0, read=0.0, show=0.0, copied=1.0), "codes"),
        (TaskRates(draw=0.0, read=0.0, show=1.0, copied=1.0), "codes"),
    ):
        items = ConversationDataset(
            rows, processor, tasks=rates, answers_only=False, pack_length=None, seed=0, length=1
        )
        (picture,) = [part for part in processor.parse(items[0][0]["input_ids"]) if isinstance(part, ImagePart)]
        assert picture.codes.ids[0].tolist() == row[expected]


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_packed_logits_are_the_unpacked_ones(codec, tiny, captioned, chat, attention):
    model = UniMMForConditionalGeneration(tiny[0].config).eval()
    model.set_attn_implementation({"text_config": attention})
    items = dataset(codec, tiny[1], {captioned: 1.0, chat: 1.0}, pack_length=200)[0]
    assert len(items) > 2
    batch = PackInOneRow()([items])
    assert batch["input_ids"].shape == (1, sum(len(item["input_ids"]) for item in items))
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([item["input_ids"]])).logits[0] for item in items])
    assert torch.allclose(packed, alone, atol=1e-5)


def test_the_trainer_scores_packs_as_it_scores_conversations(codec, tiny, captioned, chat, tmp_path):
    model = UniMMForConditionalGeneration(tiny[0].config)
    trainer = LanguageTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        optimizer_config=OptimizerConfig(steps=1),
    )
    batch = [dataset(codec, tiny[1], {captioned: 1.0, chat: 1.0}, pack_length=120)[index] for index in range(2)]
    with torch.no_grad():
        packed = trainer.compute_loss(model, PackInOneRow()(batch))
        padded = trainer.compute_loss(model, PadRight(0)(batch))
    assert float(packed) == pytest.approx(float(padded), rel=1e-5)


def test_packs_are_filled_and_conversations_that_never_fit_are_refused(codec, tiny, captioned):
    packs = dataset(codec, tiny[1], {captioned: 1.0}, pack_length=300, length=20)
    lengths = [sum(len(item["input_ids"]) for item in packs[index]) for index in range(20)]
    assert max(lengths) <= 300
    assert np.mean(lengths) > 200
    with pytest.raises(ValueError, match="never fits"):
        dataset(codec, tiny[1], {captioned: 1.0}, pack_length=5)[0]


def test_a_batch_is_shared_by_any_number_of_processes():
    assert share_batch(64, None, 4) == (16, 1)
    assert share_batch(64, 2, 4) == (2, 8)
    for world_size, micro_batch in ((3, None), (4, 3), (128, None)):
        with pytest.raises(ValueError, match="processes share a batch"):
            share_batch(64, micro_batch, world_size)


def test_rows_come_from_sources_or_from_worlds():
    for wrong in ({}, {"sources": {"a": 1.0}, "worlds": {"shapes": 1.0}}, {"sources": {"a": 0.0}}):
        with pytest.raises(ValueError, match=r"data\.sources are"):
            RowsConfig(**wrong)
    assert RowsConfig(sources={"a": 2.0}).weights == {"a": 2.0}


@pytest.fixture(scope="module")
def backbone(codec, tokenizer, tmp_path_factory):
    """A language model without pictures, and a codec, as they are published."""
    folder = tmp_path_factory.mktemp("backbone")
    random_llm(tokenizer).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    codec.save_pretrained(folder / "codec")
    VisualCodecImageProcessor.for_codec(codec.config).save_pretrained(folder / "codec")
    return folder


def backbone_recipe(folder, backbone, captioned, chat, **changes):
    recipe = {
        "task": "pretrain",
        "run": {"name": "run", "directory": str(folder)},
        "codec": str(backbone / "codec"),
        "backbone": {
            "llm": str(backbone / "llm"),
            "chat_template": str(folder / "chat.jinja"),
            "max_length": 300,
            "eos_token": "<|user|>",
        },
        "data": {"sources": {str(captioned): 0.5, str(chat): 0.5}},
        "batch_size": 2,
        "micro_batch": 1,
        "pack_length": 200,
        "z_loss_weight": 1e-4,
        "gradient_checkpointing": True,
        "optimizer": {"steps": 2, "lr": 1e-2, "warmup": 0, "weight_decay": 0.1, "schedule": "constant_with_warmup"},
        "logging": {"every": 1, "sample_every": 2, "save_every": 2},
        "bf16": False,
    }
    template = "{% for m in messages %}{{ m.content if m.content is string else '' }}{% if m.content is not string %}"
    template += "{% for p in m.content %}{{ '<|image|>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    (folder / "chat.jinja").write_text(template + "{{ '<|end|>' }}{% endfor %}")
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe | changes))
    return folder / "run.yaml"


def test_new_rows_are_fitted_to_a_language_model_that_stays_bit_by_bit(backbone, captioned, chat, tmp_path, tokenizer):
    """Rank 0: text rows and layers as they were, code rows and layers for pictures trained, merged, and resumed."""
    recipe = backbone_recipe(tmp_path, backbone, captioned, chat, adapter={"rank": 0})
    data = yaml.safe_load(recipe.read_text())
    data["backbone"] |= {"vision_layers_before": 1, "vision_layers_after": 1}
    recipe.write_text(yaml.safe_dump(data))
    directory = train(recipe)
    model = UniMMForConditionalGeneration.from_pretrained(directory.model)
    llm, text = random_llm(tokenizer), slice(0, len(tokenizer))
    assert model.get_input_embeddings().weight[text].equal(llm.get_input_embeddings().weight)
    assert model.lm_head.weight[text].equal(llm.lm_head.weight)
    middle = model.model.language_model.layers[1].state_dict()
    assert all(middle[name].equal(weight) for name, weight in llm.model.layers[0].state_dict().items())
    ids = torch.arange(8, 40)[None]
    assert model(ids).logits[..., text].equal(llm(ids).logits)
    torch.manual_seed(0)
    data["run"]["name"], data["optimizer"]["lr"] = "still", 0.0
    recipe.write_text(yaml.safe_dump(data))
    still = UniMMForConditionalGeneration.from_pretrained(train(recipe).model)
    vocabulary = model.config.vocabulary
    codes = slice(vocabulary.image_token_offset, vocabulary.image_token_end)
    moved = [
        name
        for name, weight in model.state_dict().items()
        if not still.state_dict()[name].equal(weight) and "visual" not in name
    ]
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(moved)
    assert all(
        name.startswith(("model.language_model.layers.0.", "model.language_model.layers.2.")) or "norm" in name
        for name in moved
        if "embed" not in name and "lm_head" not in name
    )
    assert len(moved) > 10
    assert not still.lm_head.weight[codes].equal(model.lm_head.weight[codes])


def test_a_language_model_without_chat_template_is_refused(backbone, captioned, chat, tmp_path):
    recipe = backbone_recipe(tmp_path, backbone, captioned, chat)
    data = yaml.safe_load(recipe.read_text())
    del data["backbone"]["chat_template"]
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match="has no chat template, as base models have none"):
        train(recipe)


def test_whole_training_of_a_language_model_moves_everything(backbone, captioned, chat, tmp_path):
    directory = train(backbone_recipe(tmp_path, backbone, captioned, chat))
    assert [record["loss"] for record in directory.metrics() if "loss" in record][1] > 0
    model = UniMMForConditionalGeneration.from_pretrained(directory.model)
    assert model.config.z_loss_weight == 1e-4
    tokenizer = UniMMProcessor.from_pretrained(directory.model).tokenizer
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|user|>")
    with pytest.raises(ValueError, match="has no token for"):
        train(directory.root.parent / "run.yaml", ["run.name=other", "backbone.eos_token=<|nothing|>"])


def test_micro_batches_average_to_the_batch(backbone, captioned, chat, tmp_path):
    """Gradients of two halves are the gradient of the whole, up to the different lengths of packs."""
    norms = {}
    for name, micro_batch in (("whole", 2), ("halves", 1)):
        recipe = backbone_recipe(tmp_path, backbone, captioned, chat, micro_batch=micro_batch)
        norms[name] = train(recipe, [f"run.name={name}", "optimizer.steps=1"]).metrics()[0]["grad_norm"]
    assert norms["halves"] == pytest.approx(norms["whole"], rel=0.1)
