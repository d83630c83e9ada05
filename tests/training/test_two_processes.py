"""Two processes train as one does, and either goes on with what the other saved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_language_data import folder_of, picture_row

from unimm import UniMMForConditionalGeneration
from unimm.training.recipe import train
from unimm.training.run_directory import RunConfig, RunDirectory

STEPS, SAVED = 6, 3
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
UNIMM = ["-m", "unimm.cli"]
ACCELERATE = Path("recipes/accelerate")
IMAGE = {"type": "image", "text": None}
DRAW, READ = (
    [{"role": "user", "content": [asked]}, {"role": "assistant", "content": [answered]}]
    for asked, answered in (
        ({"type": "text", "text": "a red heart"}, IMAGE),
        (IMAGE, {"type": "text", "text": "three small blue stars above a heart"}),
    )
)


@pytest.fixture(scope="module")
def recipe(worlds_folder, tmp_path_factory):
    """Drawing and reading, so that processes and micro-batches have unequal numbers of targets."""
    folder = tmp_path_factory.mktemp("two")
    codec = UniMMForConditionalGeneration.from_pretrained(worlds_folder).codec
    rng = np.random.default_rng(0)
    folder_of(folder / "rows", codec, [picture_row(codec, rng, messages=DRAW if i % 3 else READ) for i in range(12)])
    data = {
        "task": "sft",
        "run": {"name": "run", "directory": str(folder)},
        "init_from": str(worlds_folder),
        "data": {"sources": {str(folder / "rows"): 1.0}},
        "batch_size": 4,
        "answers_only": True,
        "optimizer": {"steps": STEPS, "lr": 1e-2, "warmup": 0},
        "logging": {"every": 1, "sample_every": STEPS, "save_every": SAVED},
        "bf16": False,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(data))
    return folder / "run.yaml"


def run(recipe, name, *overrides):
    """Train here; the losses by step."""
    train(recipe, [f"run.name={name}", *overrides])
    return curve(recipe, name)


def run_in_two(recipe, name, launcher=(*TORCHRUN, *UNIMM), **environment):
    """Train in two new processes; the losses by step."""
    command = [sys.executable, *launcher, "train", str(recipe), f"run.name={name}"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, timeout=1200)
    return curve(recipe, name)


def directory(recipe, name):
    return RunDirectory(RunConfig(name, str(recipe.parent)))


def curve(recipe, name):
    """Losses of each step: all of it, of text and of codes."""
    names = ("loss", "text_loss", "image_loss")
    records = [record for record in directory(recipe, name).metrics() if "loss" in record]
    return {(record["step"], part): record[part] for record in records for part in names}


def forget(recipe, name, new):
    """A copy of a run as it was at its first checkpoint."""
    source = directory(recipe, name).root
    target = directory(recipe, new).root
    shutil.copytree(source, target)
    (target / "finished.json").unlink()
    shutil.rmtree(target / "checkpoints" / f"checkpoint-{STEPS}")
    text = (target / "recipe.yaml").read_text()
    (target / "recipe.yaml").write_text(text.replace(f"name: {name}\n", f"name: {new}\n"))


@pytest.fixture(scope="module")
def one(recipe):
    """The losses of one process."""
    losses = run(recipe, "one")
    assert len(losses) == 3 * STEPS
    assert losses[STEPS, "loss"] < 0.9 * losses[1, "loss"]
    return losses


def test_micro_batches_have_the_losses_of_whole_batches(recipe, one):
    assert run(recipe, "micro", "micro_batch=1") == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_each_resumes_the_other(recipe, one):
    assert run_in_two(recipe, "two", ACCELERATE_USE_CPU="1") == pytest.approx(one, rel=1e-3)
    forget(recipe, "two", "two-then-one")
    forget(recipe, "one", "one-then-two")
    assert run(recipe, "two-then-one") == pytest.approx(one, rel=1e-3)
    assert run_in_two(recipe, "one-then-two", ACCELERATE_USE_CPU="1") == pytest.approx(one, rel=1e-3)
    weights = [
        UniMMForConditionalGeneration.from_pretrained(directory(recipe, name).model).lm_head.weight
        for name in ("one", "two-then-one", "one-then-two")
    ]
    assert all((weights[0] - other).abs().max() < 1e-3 for other in weights[1:])


def check_spread(recipe, name, one, launcher, **environment):
    """Weights in pieces: the losses of one process, once more after a restart, and its model."""
    assert run_in_two(recipe, name, launcher, **environment) == pytest.approx(one, rel=1e-3)
    forget(recipe, name, f"{name}-again")
    assert run_in_two(recipe, f"{name}-again", launcher, **environment) == pytest.approx(one, rel=1e-3)
    saved, alone = (
        UniMMForConditionalGeneration.from_pretrained(directory(recipe, run).model).state_dict()
        for run in (f"{name}-again", "one")
    )
    assert saved.keys() == alone.keys()
    assert all((saved[key] - alone[key]).abs().max() < 1e-3 for key in alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_has_the_losses_of_one_process_and_resumes(recipe, one, stage):
    pytest.importorskip("deepspeed")
    arguments = ("--config_file", str(ACCELERATE / f"deepspeed_{stage}.yaml"), "--num_processes", "2")
    launcher = ["-m", "accelerate.commands.launch", *arguments, "--mixed_precision", "no", *UNIMM]
    check_spread(recipe, stage, one, launcher, DS_ACCELERATOR="cpu")


@pytest.mark.slow
def test_fsdp_has_the_losses_of_one_process_and_resumes(recipe, one):
    config = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value) for name, value in config.items()}  # as accelerate's launcher passes it
    launcher = [*TORCHRUN, str(Path(__file__).with_name("fsdp_on_processors.py"))]
    check_spread(recipe, "fsdp", one, launcher, ACCELERATE_USE_CPU="1", ACCELERATE_USE_FSDP="true", **environment)
