"""DPO learns to prefer what a reward prefers, and starts from no preference."""

import math
import shutil

import pytest
import torch
import yaml

from unimm import UniMMForConditionalGeneration
from unimm.training.dpo import PairCollator
from unimm.training.recipe import train

pytestmark = pytest.mark.usefixtures("brightness")


def dpo_recipe(folder, model_folder, **changes):
    recipe = {
        "task": "dpo",
        "run": {"name": "dpo", "directory": str(folder)},
        "init_from": str(model_folder),
        "prompts": {"categories": {"single": 1.0}},
        "rewards": {"brightness": 1.0},
        "pairs": {"prompts": 4, "group_size": 4, "prompts_at_once": 2, "margin": 0.0},
        "beta": 1.0,
        "batch_size": 4,
        "micro_batch": 2,
        "optimizer": {"steps": 6, "lr": 1e-2, "warmup": 0},
        "logging": {"every": 1, "sample_every": 6, "save_every": 3},
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(recipe | changes))
    return folder / "dpo.yaml"


def curve(directory):
    names = ("loss", "rewards/margins", "rewards/accuracies")
    return [tuple(record[name] for name in names) for record in directory.metrics() if "loss" in record]


@pytest.mark.parametrize("adapter", [None, {"rank": 2, "target_modules": ["q_proj", "v_proj"]}])
def test_pairs_are_learned_from_an_even_start_and_resumed(worlds_folder, tmp_path, adapter):
    directory = train(dpo_recipe(tmp_path, worlds_folder, adapter=adapter))
    whole = curve(directory)
    assert whole[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert whole[0][1] == pytest.approx(0, abs=1e-4)
    assert whole[-1][0] < 0.6
    assert whole[-1][2] == 1
    before, after = (UniMMForConditionalGeneration.from_pretrained(path) for path in (worlds_folder, directory.model))
    assert not after.lm_head.weight.equal(before.lm_head.weight)
    (directory.root / "finished.json").unlink()
    shutil.rmtree(directory.checkpoints / "checkpoint-6")
    assert curve(train(tmp_path / "dpo.yaml")) == whole


def test_drawings_without_a_difference_and_a_nucleus_are_refused(worlds_folder, tmp_path):
    with pytest.raises(ValueError, match=r"lower the margin"):
        train(dpo_recipe(tmp_path, worlds_folder, pairs={"prompts": 1, "group_size": 2, "margin": 1.0}))
    with pytest.raises(ValueError, match="different nuclei"):
        train(dpo_recipe(tmp_path, worlds_folder, sampling={"top_p": 0.9}))


def test_pairs_are_laid_out_as_the_policy_reads_them():
    items = [
        {"prompt_ids": [7, 8, 1], "chosen_ids": [20, 2], "rejected_ids": [21, 2]},
        {"prompt_ids": [9, 1], "chosen_ids": [22, 23, 2], "rejected_ids": [24, 2]},
    ]
    batch = PairCollator(0)(items)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    assert ids.tolist() == [
        [7, 8, 1, 20, 2, 0],
        [0, 9, 1, 22, 23, 2],
        [7, 8, 1, 21, 2, 0],
        [0, 9, 1, 24, 2, 0],
    ]
    assert batch["completion_mask"].sum(dim=1).tolist() == [2, 3, 2, 2]
    assert batch["prompt_mask"][1].tolist() == [0, 1, 1]
