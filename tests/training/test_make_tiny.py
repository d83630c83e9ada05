"""`make tiny`, whole: killed at random and started again, it ends where an untouched run ends."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
import yaml
from conftest import needs_font

from unimm.config import read_yaml

STAGES = ("codec", "detokenizer", "pretrain", "sft")
SMALL = {
    "codec": {"data": {"pool_size": 200, "batch_size": 4}, "optimizer": {"steps": 30}},
    "detokenizer": {"data": {"pool_size": 40, "batch_size": 4}, "optimizer": {"steps": 15}},
    "pretrain": {"data": {"num_rows": 60}, "batch_size": 4, "optimizer": {"steps": 30}},
    "sft": {"data": {"num_rows": 60}, "batch_size": 4, "optimizer": {"steps": 15}},
}
LOGGING = {
    "codec": {"every": 1, "validate_every": 30, "save_every": 5},
    "detokenizer": {"every": 1, "validate_every": 15, "save_every": 5},
    "pretrain": {"every": 1, "sample_every": 30, "save_every": 5},
    "sft": {"every": 1, "sample_every": 15, "save_every": 5},
}


def small_recipes(source, folder):
    """The shipped recipes at a few steps, their runs below `folder`."""
    (folder / "recipes").mkdir(parents=True)
    for stage in STAGES:
        recipe = yaml.safe_load((source / f"{stage}.yaml").read_text().replace("runs/", f"{folder}/runs/"))
        for key, change in SMALL[stage].items():
            recipe[key] = recipe[key] | change if isinstance(change, dict) else change
        recipe["run"]["directory"], recipe["logging"] = f"{folder}/runs", LOGGING[stage]
        (folder / "recipes" / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))


def steps_taken(folder):
    return sum(path.read_text().count("\n") for path in folder.glob("runs/*/metrics.jsonl"))


@pytest.mark.slow
@needs_font
def test_killing_make_tiny_twice_changes_nothing(pytestconfig, tmp_path):
    root = pytestconfig.rootpath
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums in one order

    def command(folder):
        places = (f"RECIPES={folder}/recipes", f"RUNS={folder}/runs", f"CARD={folder}/card")
        return ["make", "--no-print-directory", "-C", str(root), "tiny", *places, "TRIALS=2"]

    untouched, killed = tmp_path / "untouched", tmp_path / "killed"
    for folder in (untouched, killed):
        small_recipes(root / "recipes" / "tiny", folder)
    subprocess.run(command(untouched), check=True, env=environment, timeout=900)
    moments, steps = random.Random(0), steps_taken(untouched)
    for share in (moments.uniform(0.1, 0.4), moments.uniform(0.5, 0.9)):
        process = subprocess.Popen(command(killed), env=environment, start_new_session=True)
        while steps_taken(killed) < share * steps:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "card").exists()
    subprocess.run(command(killed), check=True, env=environment, timeout=900)
    for stage in STAGES:
        records = [
            [
                json.loads(line)
                for line in (folder / "runs" / f"tiny-{stage}" / "metrics.jsonl").read_text().splitlines()
            ]
            for folder in (untouched, killed)
        ]
        one, other = ({r["step"]: r["loss"] for r in record if "loss" in r} for record in records)
        assert other == pytest.approx(one, rel=1e-4), stage
    one, other = (read_yaml(folder / "card" / "report.json")["figures"] for folder in (untouched, killed))
    assert [figure["name"] for figure in one] == [figure["name"] for figure in other]
    for mine, theirs in zip(one, other, strict=True):
        assert theirs["value"] == pytest.approx(mine["value"], rel=1e-3), mine["name"]
