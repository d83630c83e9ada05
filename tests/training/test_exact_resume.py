"""Killed at a random step and started again, every stage goes on with the very losses of a run that was left alone."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import yaml
from test_dpo import dpo_recipe
from test_grpo import grpo_recipe
from test_stages import codec_recipe, detokenizer_recipe, language_recipe
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from unimm import UniMMForConditionalGeneration
from unimm.config import read_yaml
from unimm.data.rows import write_rows
from unimm.training.recipe import train
from unimm.training.run_directory import RunConfig, RunDirectory

STEPS, SAVED, AFTER, LATEST = 100, 7, 50, 30
ADAPTER = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
LOOKS = {"codec": "validate_every", "detokenizer": "validate_every"}
TIMES = ("seconds", "step_time", "rollout_time", "reward_time", "rollout_share")


@pytest.fixture(scope="module")
def codec_run(tmp_path_factory):
    return train(codec_recipe(tmp_path_factory.mktemp("codec"), "codec"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A random classifier, which tells even the drawings of a random model apart."""
    folder = tmp_path_factory.mktemp("judge")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, patch_size=16, num_labels=1, initializer_range=1.0, **sizes)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(worlds_folder, tmp_path_factory):
    """What a recipe says of rows of the saved model's codec."""
    data = {"worlds": {"shapes": 1.0}, "folder": str(tmp_path_factory.mktemp("rows")), "num_rows": 16}
    codec = UniMMForConditionalGeneration.from_pretrained(worlds_folder).codec
    write_rows(codec, data["worlds"], num_rows=data["num_rows"], seed=0, folder=Path(data["folder"]))
    return data


@pytest.fixture(scope="module")
def processes():
    """New processes of one thread each, so that sums have one order, forked from one that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["unimm.training.recipe"])
        yield context


@pytest.fixture
def recipe(request, codec_run, worlds_folder, rows, judge, tmp_path):
    """The recipe of a stage, of many steps."""
    judged = {"rewards": {"aesthetic": 1.0}, "judges": {"aesthetic": str(judge)}}
    sft = {"task": "sft", "init_from": str(worlds_folder), "codec": None, "answers_only": True, "data": rows}
    makers = {
        "codec": lambda: codec_recipe(tmp_path, "run"),
        "detokenizer": lambda: detokenizer_recipe(tmp_path, codec_run, "run"),
        "pretrain": lambda: language_recipe(tmp_path, codec_run, "run"),
        "sft": lambda: language_recipe(tmp_path, codec_run, "run", **sft),
        "sft_lora": lambda: language_recipe(
            tmp_path, codec_run, "run", **sft, adapter=ADAPTER, optimizer={"warmup": 1}
        ),
        "dpo": lambda: dpo_recipe(tmp_path, worlds_folder, **judged),
        "grpo": lambda: grpo_recipe(tmp_path, worlds_folder, "run", **judged),
    }
    path = makers[request.param]()
    data = read_yaml(path)
    data["optimizer"]["steps"] = STEPS
    data["logging"] |= {"save_every": SAVED, LOOKS.get(request.param, "sample_every"): 3 * SAVED}
    path.write_text(yaml.safe_dump(data))
    return path


def run(path, overrides):
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as they do elsewhere
    train(path, overrides)


def records(directory):
    """Everything that is logged but times."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in directory.metrics()]


def reached(directory):
    return max((record["step"] for record in directory.metrics()), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["codec", "detokenizer", "pretrain", "sft", "sft_lora", "dpo", "grpo"], indirect=True
)
def test_a_run_that_was_killed_has_the_losses_of_one_that_was_not(recipe, processes, tmp_path):
    """Bit for bit, in at least 50 steps after SIGKILL."""

    def start(name):
        places = [f"run.name={name}", f"run.directory={tmp_path}"]
        process = processes.Process(target=run, args=(recipe, places))
        process.start()
        return process, RunDirectory(RunConfig(name, str(tmp_path)))

    left_alone, untouched = start("untouched")
    left_alone.join()
    assert left_alone.exitcode == 0
    seed = random.randrange(2**32)
    moment = random.Random(seed).randint(1, LATEST)
    victim, killed = start("killed")
    while reached(killed) < moment:
        assert victim.is_alive()
        time.sleep(0.01)
    victim.kill()
    victim.join()
    step = reached(killed)
    print(f"seed {seed}: to be killed at step {moment}, was killed at step {step}")
    assert not killed.finished
    resumed, _ = start("killed")
    resumed.join()
    assert resumed.exitcode == 0
    assert STEPS - step >= AFTER
    assert records(killed) == records(untouched)
    losses = [record["loss"] for record in records(killed) if "loss" in record]
    assert len(set(losses)) > AFTER  # something was learned
