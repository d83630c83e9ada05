"""What would waste hours is refused at once, with the way out."""

from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from test_stages import codec_recipe
from transformers import AutoModelForCausalLM, Qwen3Config

from unimm import UniMMForConditionalGeneration, UniMMProcessor
from unimm.codec import load_preset
from unimm.codes import VisualCodes
from unimm.data.rows import FEATURES, ShardReport, read_rows, write_rows, write_shard
from unimm.sequence import train_text_tokenizer
from unimm.training.pool import PoolConfig, prepare_pool
from unimm.training.prompts import PromptsConfig, make_prompts
from unimm.training.recipe import train
from unimm.training.run_directory import RunConfig, RunDirectory
from unimm.unified import UniMMConfig


def test_a_loss_that_is_not_a_number_stops_the_run(worlds_folder, tmp_path):
    model = UniMMForConditionalGeneration.from_pretrained(worlds_folder)
    write_rows(model.codec, {"shapes": 1.0}, num_rows=4, seed=0, folder=tmp_path / "rows")
    model.lm_head.weight.data.fill_(float("nan"))
    for part in (model, UniMMProcessor.from_pretrained(worlds_folder)):
        part.save_pretrained(tmp_path / "broken")
    recipe = {
        "task": "sft",
        "run": {"name": "run", "directory": str(tmp_path)},
        "init_from": str(tmp_path / "broken"),
        "data": {"worlds": {"shapes": 1.0}, "folder": str(tmp_path / "rows"), "num_rows": 4},
        "batch_size": 2,
        "optimizer": {"steps": 2, "warmup": 0},
        "logging": {"every": 1, "sample_every": 9, "save_every": 9},
        "bf16": False,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"not finite at step 1\. Lower"):
        train(tmp_path / "run.yaml")


def test_what_is_saved_is_finite(tmp_path):
    """The second loss is not, and no line is logged between the checkpoints."""
    path = codec_recipe(tmp_path, "codec")
    with pytest.raises(ValueError, match=r"not finite at step 3\. Lower optimizer\.lr"):
        train(path, ["optimizer.lr=1e30", "optimizer.warmup=0", "optimizer.clip=1e9", "logging.every=100"])
    assert not list((tmp_path / "codec" / "checkpoints").glob("step-*"))


def test_a_broken_checkpoint_is_named(tmp_path):
    path = codec_recipe(tmp_path, "codec")
    folder = train(path).root
    (folder / "finished.json").unlink()
    weights = sorted(folder.glob("checkpoints/step-*/model.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{weights.parent.name} cannot be loaded .*; delete it"):
        train(path)


@pytest.mark.parametrize("key", ["ema_decay", "model.quantizer.ema_decay"])
def test_a_decay_that_is_no_share_is_refused(tmp_path, key):
    path = codec_recipe(tmp_path, "codec")
    with pytest.raises(ValueError, match=r"ema_decay is 1\.5; give 0 or more"):
        train(path, ["model.quantizer={kind: vq, size: 8, dim: 4}", f"{key}=1.5"])


def test_an_adapter_of_nothing_is_refused(tmp_path, codec):
    codec.save_pretrained(tmp_path / "codec")
    recipe = {
        "task": "pretrain",
        "run": {"name": "run", "directory": str(tmp_path)},
        "codec": str(tmp_path / "codec"),
        "adapter": {"rank": 2},
        "data": {"worlds": {"shapes": 1.0}},
        "optimizer": {"steps": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="name one in init_from"):
        train(tmp_path / "run.yaml")


def test_shards_without_rows_are_refused(codec, tmp_path):
    nothing = Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
    nothing.to_parquet(str(tmp_path / "rows-00000.parquet"))
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path, codec)


def test_a_folder_with_rows_of_another_codec_is_refused(codec, tmp_path):
    for number, fingerprint in enumerate((codec.fingerprint(), "another")):
        write_shard([{"codes": [], "fingerprint": fingerprint}], tmp_path / f"rows-{number}.parquet", ShardReport(1))
    with pytest.raises(ValueError, match=f"made by codec {codec.fingerprint()}, another"):
        read_rows(tmp_path, codec)


def test_a_source_without_the_column_of_pictures_is_refused(tmp_path):
    Dataset.from_dict({"picture": ["a"]}).to_parquet(str(tmp_path / "pictures.parquet"))
    directory, config = RunDirectory(RunConfig("run", str(tmp_path))), load_preset("smallest")
    with pytest.raises(ValueError, match="no column 'image' for --image"):
        prepare_pool(PoolConfig(source=str(tmp_path / "pictures.parquet")), config, directory, seed=0, held_out=1)


def test_codes_beyond_the_codebook_are_refused(tiny):
    """A row whose codes would be ids of another block, or of none."""
    codes = VisualCodes.from_grid(torch.full((1, 8, 8, 1), max(tiny[1].codebook_sizes)))
    messages = [{"role": "assistant", "content": [{"type": "image"}]}]
    with pytest.raises(ValueError, match="the codebooks have 0 to"):
        tiny[1].encode_messages(messages, [codes], answers_only=False)


def test_a_chat_template_without_answer_marks_is_refused(tiny):
    processor = UniMMProcessor(
        tiny[1].image_processor,
        tiny[1].tokenizer,
        grids=[[2, 2]],
        codebook_sizes=tiny[1].codebook_sizes,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(ValueError, match="generation"):
        processor.encode_messages(messages, [], answers_only=True)


def test_a_vocabulary_that_does_not_fit_is_refused(tiny):
    with pytest.raises(ValueError, match="need at least 264 rows"):
        train_text_tokenizer(["a red heart"], vocab_size=263, max_length=64)
    tokenizer = train_text_tokenizer(["a red heart"] * 5, vocab_size=300, max_length=64)
    with pytest.raises(ValueError, match="pass text_rows of at least that many"):
        UniMMProcessor.from_tokenizer(
            tokenizer, tiny[1].image_processor, grids=[(2, 2)], codebook_sizes=(4,), downsample=16, text_rows=20
        )


def test_tied_embeddings_are_refused_in_a_config_and_untied_from_a_backbone(tiny, codec, tokenizer):
    with pytest.raises(ValueError, match="from_backbones, which unties it"):
        UniMMConfig(**(tiny[0].config.to_dict() | {"tie_word_embeddings": True}))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True, **sizes
    )
    tied = AutoModelForCausalLM.from_config(config)
    model, _ = UniMMForConditionalGeneration.from_backbones(tied, codec, tokenizer)
    text = slice(0, len(tokenizer))
    assert model.lm_head.weight[text].equal(model.get_input_embeddings().weight[text])
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("stage", "key"),
    [("codec", "begin"), ("detokenizer", "codec"), ("pretrain", "codec"), ("sft", "init_from"), ("grpo", "init_from")],
)
def test_a_stage_before_the_one_it_begins_with_is_refused(tmp_path, stage, key):
    recipe = Path(__file__).parents[2] / "recipes" / "tiny" / f"{stage}.yaml"
    with pytest.raises(ValueError, match=f"{key}: There is no model folder .*/earlier/model;.* run first"):
        train(recipe, [f"run.directory={tmp_path}", f"{key}={tmp_path}/earlier/model"])


@pytest.mark.parametrize(("stage", "key"), [("codec", "begin"), ("pretrain", "codec"), ("sft", "init_from")])
def test_a_beginning_of_another_kind_is_refused(tmp_path, codec, tiny_folder, stage, key):
    recipe = Path(__file__).parents[2] / "recipes" / "tiny" / f"{stage}.yaml"
    codec.save_pretrained(tmp_path / "codec")
    folder = tmp_path / "codec" if key == "init_from" else tiny_folder
    with pytest.raises(ValueError, match=f"{key}: .* holds a model of type 'unimm"):
        train(recipe, [f"run.directory={tmp_path}", f"{key}={folder}"])


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("codec", "optimizer.steps=0"),
        ("sft", "optimizer.steps=-1"),
        ("codec", "logging.every=0"),
        ("sft", "logging.save_every=0"),
        ("codec", "data.batch_size=0"),
        ("detokenizer", "data.pool_size=0"),
        ("sft", "tasks={draw: 0, read: 0, show: 0}"),
        ("sft", "tasks={draw: -1, read: 2, show: 0}"),
    ],
)
def test_nothing_to_do_is_refused(tmp_path, stage, change):
    recipe = Path(__file__).parents[2] / "recipes" / "tiny" / f"{stage}.yaml"
    with pytest.raises(ValueError, match=r"1 or more|one step or more|0 or more"):
        train(recipe, [f"run.directory={tmp_path}", change])


@pytest.mark.parametrize(("text", "column"), [("prompt\n", "prompt"), ("caption\na star\n", "prompt")])
def test_prompts_of_no_rows_or_another_column_are_refused(tmp_path, text, column):
    (tmp_path / "prompts.csv").write_text(text)
    with pytest.raises(ValueError, match=r"prompts\.column is 'prompt'"):
        make_prompts(PromptsConfig(source=str(tmp_path / "prompts.csv"), column=column), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "word"}, r"2 rows of prompt, text; prompts\.text_column is 'word'"),
        ({"text_column": "text"}, "no word in 'text'"),
        ({"column": "text"}, "None among its prompts"),
    ],
)
def test_columns_without_text_are_refused(tmp_path, changes, message):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a star", "text": null}\n{"prompt": "a moon", "text": null}\n')
    with pytest.raises(ValueError, match=message):
        make_prompts(PromptsConfig(source=str(tmp_path / "prompts.jsonl"), **changes), 2)


def test_a_text_column_of_the_worlds_is_refused():
    with pytest.raises(ValueError, match="worlds know their own words"):
        PromptsConfig({"word": 1.0}, text_column="text")
