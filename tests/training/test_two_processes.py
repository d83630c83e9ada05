"""Two processes train as one does, and either goes on with what the other saved."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from test_language_data import folder_of, picture_row

from unimm import UniMMForConditionalGeneration
from unimm.training.recipe import train
from unimm.training.run_directory import RunConfig, RunDirectory

STEPS, SAVED = 6, 3
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "a red heart"}]},
    {"role": "assistant", "content": [{"type": "image", "text": None}]},
]


@pytest.fixture(scope="module")
def recipe(worlds_folder, tmp_path_factory):
    """Conversations of one length, so that means over processes are means over tokens."""
    folder = tmp_path_factory.mktemp("two")
    codec = UniMMForConditionalGeneration.from_pretrained(worlds_folder).codec
    rng = np.random.default_rng(0)
    folder_of(folder / "rows", codec, [picture_row(codec, rng, messages=MESSAGES) for _ in range(12)])
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


def run(recipe, name, *, processes):
    """Train here, or in two new processes; the losses by step."""
    if processes == 1:
        train(recipe, [f"run.name={name}"])
    else:
        command = [sys.executable, *TORCHRUN, "-m", "unimm.cli", "train", str(recipe), f"run.name={name}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        subprocess.run(command, check=True, env=environment, timeout=1200)
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


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_each_resumes_the_other(recipe):
    one = run(recipe, "one", processes=1)
    two = run(recipe, "two", processes=2)
    assert len(one) == 3 * STEPS
    assert one[STEPS, "loss"] < 0.9 * one[1, "loss"]
    assert two == pytest.approx(one, rel=1e-3)
    forget(recipe, "two", "two-then-one")
    forget(recipe, "one", "one-then-two")
    assert run(recipe, "two-then-one", processes=1) == pytest.approx(one, rel=1e-3)
    assert run(recipe, "one-then-two", processes=2) == pytest.approx(one, rel=1e-3)
    weights = [
        UniMMForConditionalGeneration.from_pretrained(directory(recipe, name).model).lm_head.weight
        for name in ("one", "two-then-one", "one-then-two")
    ]
    assert all((weights[0] - other).abs().max() < 1e-3 for other in weights[1:])
