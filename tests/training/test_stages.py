"""Stages run, resume on the same curve, and refuse what would waste hours."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import needs_font

from unimm import UniMMForConditionalGeneration, UniMMProcessor
from unimm.codec import VisualCodecModel, load_preset
from unimm.config import from_dict, read_yaml
from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.data.rows import read_rows, row_pictures, write_rows
from unimm.detokenizer import CodesToImagePipeline
from unimm.sequence import Levels
from unimm.training.codec import CodecTask
from unimm.training.loop import check_finite
from unimm.training.pool import held_out_pictures
from unimm.training.recipe import STAGES, train
from unimm.training.run_directory import RunConfig, RunDirectory
from unimm.unified.glyphs import glyph_rows, texts_of_tokens

RECIPES = ["codec", "detokenizer", "pretrain", "sft", "sft_lora", "dpo", "grpo"]
SHAPES = {"shapes": 1.0}
TINY_CODEC = {
    "encoder": {"kind": "conv", "patch": 16, "channels": [8], "blocks": 1},
    "resampler": {"kind": "grid", "dim": 8},
    "quantizer": {"kind": "fsq", "levels": [4, 4]},
    "decoder": {"kind": "conv", "patch": 16, "channels": [8], "blocks": 1},
}


def write_recipe(path, **recipe):
    path.write_text(yaml.safe_dump(recipe))
    return path


def codec_recipe(folder, name, steps=6):
    return write_recipe(
        folder / f"{name}.yaml",
        task="codec",
        run={"name": name, "directory": str(folder)},
        data={"worlds": SHAPES, "pool_size": 24, "batch_size": 4},
        model=TINY_CODEC,
        optimizer={"steps": steps, "warmup": 2},
        logging={"every": 1, "validate_every": 3, "save_every": 3},
        bf16=False,
    )


def losses(directory):
    return {r["step"]: r["loss"] for r in directory.metrics() if "loss" in r}


@pytest.fixture(scope="module")
def trained_codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return train(codec_recipe(folder, "whole"))


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_parse(name, request):
    data = read_yaml(request.config.rootpath / "recipes" / "tiny" / f"{name}.yaml")
    recipe = from_dict(STAGES[data["task"]][0], data)
    assert recipe.optimizer.steps > 0


def test_a_run_directory_holds_what_ran(trained_codec):
    names = {path.name for path in trained_codec.root.iterdir()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "plots", "samples", "model", "finished.json"} <= names
    assert VisualCodecModel.from_pretrained(trained_codec.model).config.downsample == 16
    assert list(losses(trained_codec)) == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_goes_on_on_the_same_curve(trained_codec, tmp_path):
    recipe = codec_recipe(tmp_path, "whole")
    shutil.copytree(trained_codec.root, tmp_path / "whole")
    directory = RunDirectory(RunConfig("whole", str(tmp_path)))
    (directory.root / "recipe.yaml").write_text(
        (directory.root / "recipe.yaml").read_text().replace(str(trained_codec.root.parent), str(tmp_path))
    )
    (directory.root / "finished.json").unlink()
    shutil.rmtree(directory.checkpoints / "step-00000006")
    (directory.checkpoints / ".step-00000006-half").mkdir()
    again = train(recipe)
    assert losses(again) == losses(trained_codec)


def test_the_average_of_the_weights_is_saved_and_survives_a_kill(trained_codec, tmp_path, monkeypatch):
    trajectory, learn = [], CodecTask.losses

    def watched(task, model, step, rank):
        if len(trajectory) < 6:
            trajectory.append(task.codec.encoder.layers[0].conv.weight.detach().clone())
        return learn(task, model, step, rank)

    monkeypatch.setattr(CodecTask, "losses", watched)
    recipe = read_yaml(codec_recipe(tmp_path, "averaged")) | {"ema_decay": 0.5}
    directory = train(write_recipe(tmp_path / "averaged.yaml", **recipe))
    assert losses(directory) == losses(trained_codec)  # training itself knows nothing of it
    trajectory.append(VisualCodecModel.from_pretrained(trained_codec.model).encoder.layers[0].conv.weight)
    expected = trajectory[1]
    for step, weight in enumerate(trajectory[2:], start=1):
        expected = torch.lerp(weight, expected, min(0.5, (1 + step) / (10 + step)))  # which rises at first
    saved = VisualCodecModel.from_pretrained(directory.model)
    torch.testing.assert_close(saved.encoder.layers[0].conv.weight, expected, atol=1e-6, rtol=0)
    (directory.root / "finished.json").unlink()
    shutil.rmtree(directory.checkpoints / "step-00000006")
    shutil.rmtree(directory.model)
    again = VisualCodecModel.from_pretrained(train(tmp_path / "averaged.yaml").model)
    assert again.fingerprint() == saved.fingerprint()
    assert again.encoder.layers[0].conv.weight.equal(saved.encoder.layers[0].conv.weight)


@pytest.mark.parametrize("stage", ["codec", "pretrain"])
def test_a_run_killed_before_its_first_checkpoint_begins_anew(trained_codec, tmp_path, stage):
    recipe = codec_recipe(tmp_path, "run") if stage == "codec" else language_recipe(tmp_path, trained_codec, "run")
    (tmp_path / "run").mkdir()
    RunDirectory(RunConfig("run", str(tmp_path))).log({"step": 1, "loss": 9.0})
    records = [record for record in train(recipe).metrics() if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert records[0]["loss"] != 9.0


def test_an_embedding_of_glyphs_ends_as_it_began(trained_codec, tmp_path):
    recipe = read_yaml(language_recipe(tmp_path, trained_codec, "glyphs"))
    recipe["model"]["glyphs"] = True
    directory = train(write_recipe(tmp_path / "glyphs.yaml", **recipe))
    model = UniMMForConditionalGeneration.from_pretrained(directory.model)
    tokenizer = UniMMProcessor.from_pretrained(directory.model).tokenizer
    offset, rows = model.config.image_token_offset, model.get_input_embeddings().weight
    wanted = glyph_rows(texts_of_tokens(tokenizer, offset), rows.shape[1], float(rows[:offset].norm(dim=1).mean()))
    torch.testing.assert_close(rows[:offset], wanted)
    assert model.config.frozen_embedding
    assert not rows.requires_grad


def test_a_finished_run_is_left_alone(trained_codec, capsys):
    recipe = trained_codec.root.parent / "whole.yaml"
    train(recipe)
    assert "is finished; delete it" in capsys.readouterr().out
    train(recipe, ["optimizer.lr=3e-4"])
    assert "is finished, by another recipe" in capsys.readouterr().out


def test_another_recipe_in_the_same_directory_is_refused(trained_codec):
    (trained_codec.root / "finished.json").rename(trained_codec.root / "was-finished.json")
    with pytest.raises(ValueError, match="another recipe"):
        train(trained_codec.root.parent / "whole.yaml", ["optimizer.lr=0.5"])
    (trained_codec.root / "was-finished.json").rename(trained_codec.root / "finished.json")


def test_rows_restart_and_refuse_another_codec(tmp_path, monkeypatch):
    monkeypatch.setattr("unimm.data.rows.SHARD_ROWS", 8)
    codec = VisualCodecModel(load_preset("smallest").__class__(**TINY_CODEC)).eval()
    other = VisualCodecModel(codec.config).eval()
    write_rows(codec, SHAPES, num_rows=20, seed=0, folder=tmp_path)
    whole = read_rows(tmp_path, codec).to_list()
    (tmp_path / "rows-00001.parquet").unlink()
    write_rows(codec, SHAPES, num_rows=20, seed=0, folder=tmp_path)
    assert read_rows(tmp_path, codec).to_list() == whole
    assert len(whole) == 20
    with pytest.raises(ValueError, match="another recipe or codec"):
        write_rows(codec, SHAPES, num_rows=21, seed=0, folder=tmp_path)
    other.quantizer.to_channels.weight.data.add_(1)
    with pytest.raises(ValueError, match="codes mean other pictures"):
        read_rows(tmp_path, other)
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path / "nothing", codec)


def test_rows_of_worlds_have_the_codes_of_copies_as_jpeg_or_not(tmp_path):
    codec = VisualCodecModel(load_preset("smallest").__class__(**TINY_CODEC)).eval()
    write_rows(codec, SHAPES, num_rows=12, seed=0, folder=tmp_path)
    as_they_are = 0
    for row in read_rows(tmp_path, codec):
        codes, copied = row_pictures(row)[0], row_pictures(row, copied=True)[0]
        assert copied.grid == codes.grid
        shown = to_pixel_values(np.stack([np.asarray(picture) for picture in to_pictures(codec.pictures(codes))]))
        as_they_are += copied.ids.equal(codec.encode(shown).ids)
    assert 1 <= as_they_are < 12


def detokenizer_recipe(folder, codec_run, name):
    return write_recipe(
        folder / f"{name}.yaml",
        task="detokenizer",
        run={"name": name, "directory": str(folder)},
        codec=str(codec_run.model),
        data={"worlds": SHAPES, "pool_size": 24, "batch_size": 4},
        model={"patch_size": 16, "width": 16, "depth": 1, "num_heads": 2},
        optimizer={"steps": 4, "warmup": 2, "muon_lr": 0.02},
        logging={"every": 1, "validate_every": 4, "save_every": 2},
        bf16=False,
    )


def test_a_detokenizer_is_trained_resumed_and_reloaded(trained_codec, tmp_path):
    whole = train(detokenizer_recipe(tmp_path, trained_codec, "detokenizer"))
    before = losses(whole)
    (whole.root / "finished.json").unlink()
    shutil.rmtree(whole.checkpoints / "step-00000004")
    again = train(tmp_path / "detokenizer.yaml")
    assert losses(again) == before
    assert {"psnr_shapes", "codec_psnr_shapes"} <= set(read_yaml(again.root / "finished.json"))
    codec = VisualCodecModel.from_pretrained(trained_codec.model)
    codes = codec.encode(held_out_pictures("shapes", 2)[0])
    images = CodesToImagePipeline.from_pretrained(again.model)(codes, num_inference_steps=4).images
    assert [image.size for image in images] == [(128, 128)] * 2


def language_recipe(folder, codec_run, name, **changes):
    recipe = {
        "task": "pretrain",
        "run": {"name": name, "directory": str(folder)},
        "codec": str(codec_run.model),
        "data": {"worlds": SHAPES, "folder": str(folder / "rows"), "num_rows": 16},
        "model": {
            "vocab_size": 400,
            "max_length": 256,
            "options": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "head_dim": 16,
            },
        },
        "batch_size": 2,
        "optimizer": {"steps": 4, "warmup": 1, "muon_lr": 0.02},
        "logging": {"every": 1, "sample_every": 4, "save_every": 2},
        "bf16": False,
    }
    return write_recipe(folder / f"{name}.yaml", **(recipe | changes))


def test_language_stages_run_and_resume(trained_codec, tmp_path):
    first = train(language_recipe(tmp_path, trained_codec, "first"))
    shutil.copytree(first.root, tmp_path / "kept")
    (first.root / "finished.json").unlink()
    (first.checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"cut')
    again = train(language_recipe(tmp_path, trained_codec, "first"))
    assert losses(again) == losses(RunDirectory(RunConfig("kept", str(tmp_path))))
    tuned = train(
        language_recipe(
            tmp_path, trained_codec, "tuned", task="sft", init_from=str(first.model), codec=None, answers_only=True
        )
    )
    assert (tuned.samples / "step-00000004.png").exists()
    assert (tuned.model / "chat_template.jinja").exists()


@pytest.mark.parametrize("adapter", [None, {"rank": 2}])
def test_a_model_learns_to_draw_by_levels_and_is_saved_as_one(trained_codec, tmp_path, adapter):
    first = train(language_recipe(tmp_path, trained_codec, "first"))
    tuned = train(
        language_recipe(
            tmp_path,
            trained_codec,
            "levels",
            task="sft",
            init_from=str(first.model),
            codec=None,
            levels=[1, 3, 12],
            **({} if adapter is None else {"adapter": adapter}),
        )
    )
    before, model = (UniMMForConditionalGeneration.from_pretrained(run.model) for run in (first, tuned))
    assert model.config.drawing_levels == Levels((1, 3, 12))
    asks = model.config.image_token_id
    moved = [old.get_input_embeddings().weight[asks] for old in (before, model)]
    assert not moved[0].equal(moved[1])
    assert (tuned.samples / "step-00000004.png").exists()  # drawn by levels


def test_bad_recipes_are_refused_before_they_cost_time(tmp_path):
    with pytest.raises(ValueError, match="task is 'dance'"):
        train(write_recipe(tmp_path / "a.yaml", task="dance"))
    with pytest.raises(ValueError, match="Did you mean optimizer"):
        train(write_recipe(tmp_path / "b.yaml", task="codec", optimiser={}))
    with pytest.raises(ValueError, match="is not finite at step 3"):
        check_finite({"loss": float("nan")}, 3)


@needs_font
def test_emoji_rows_say_what_they_show(tmp_path):
    codec = VisualCodecModel(load_preset("smallest").__class__(**TINY_CODEC)).eval()
    write_rows(codec, {"emoji": 1.0}, num_rows=4, seed=0, folder=tmp_path)
    row = read_rows(tmp_path, codec)[0]
    assert len(row["codes"]) == row["height"] * row["width"] == 64
    assert row["captions"]
    assert row["questions"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["codec", "pretrain"])
def test_two_processes_train_one_model(trained_codec, tmp_path, stage):
    """Both ranks step, one of them writes."""
    recipe = codec_recipe(tmp_path, "two") if stage == "codec" else language_recipe(tmp_path, trained_codec, "two")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "unimm.cli", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    subprocess.run([sys.executable, *command, str(recipe)], check=True, env=environment, timeout=300)
    directory = RunDirectory(RunConfig("two", str(tmp_path)))
    assert directory.finished
    assert len(losses(directory)) == read_yaml(recipe)["optimizer"]["steps"]
    assert (directory.model / "model.safetensors").is_file()
