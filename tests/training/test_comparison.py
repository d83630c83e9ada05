"""Runs side by side: seeds become means, and what is missing is left out."""

import json

import pytest
from PIL import Image

from unimm.cli.main import main
from unimm.training.comparison import SHAPES, Cell, compare_runs
from unimm.training.plots import Curve


def judged(folder, run, way, **values):
    figures = [{"group": "drawing", "name": name, "value": value} for name, value in values.items()]
    path = folder / run / way / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": "x", "figures": figures}))


def logged(folder, run, metric, values):
    lines = [json.dumps({"step": step, metric: value}) for step, value in enumerate(values, start=1)]
    (folder / run / "metrics.jsonl").write_text("\n".join(lines))


@pytest.fixture
def experiment(tmp_path):
    shapes = dict.fromkeys(SHAPES, 0.5)
    judged(tmp_path, "start", "judged", **shapes, emoji=0.6, word=0.8)
    for seed, gain in ((2, 0.1), (3, 0.3)):
        judged(tmp_path, f"grammar-{seed}", "judged", **dict.fromkeys(SHAPES, 0.5 + gain), emoji=0.6, word=0.8 + gain)
        judged(tmp_path, f"grammar-{seed}", "judged-at-1", emoji=0.5)
        logged(tmp_path, f"grammar-{seed}", "reward", [gain, 2 * gain, 3 * gain])
    return tmp_path


def test_seeds_of_a_variant_become_a_mean_and_a_spread(experiment):
    tables = compare_runs(experiment).tables
    assert list(tables) == ["judged", "judged-at-1"]
    word = tables["judged"]["drawing", "word"]
    assert (word["start"].mean, word["start"].deviation) == (0.8, 0.0)
    assert word["grammar"].mean == pytest.approx(1.0)
    assert word["grammar"].deviation == pytest.approx(0.2 / 2**0.5)
    assert tables["judged"]["drawing", "mean of shapes"]["grammar"].mean == pytest.approx(0.7)
    assert tables["judged"]["drawing", "mean of all drawing"]["start"].mean == pytest.approx((5 * 0.5 + 0.6 + 0.8) / 7)
    assert set(tables["judged-at-1"]) == {("drawing", "emoji")}
    assert set(tables["judged-at-1"]["drawing", "emoji"]) == {"grammar"}


def test_the_command_writes_a_table_its_numbers_and_curves(experiment, capsys):
    assert main(["compare", str(experiment)]) == 0
    shown = capsys.readouterr().out
    assert "| group | figure | grammar (2 seeds) | start |" in shown
    assert "| drawing | word | 1.000 ± 0.141 | 0.800 |" in shown
    assert (experiment / "comparison.md").read_text() == shown
    written = json.loads((experiment / "comparison.json").read_text())
    assert {"group": "drawing", "figure": "emoji", "values": {"grammar": [0.5, 0.5]}} in written["judged-at-1"]
    assert Image.open(experiment / "curves.png").size[0] > 100
    assert main(["compare", str(experiment)]) == 0  # what it wrote is no run


def test_curves_are_over_the_steps_that_all_runs_have():
    runs = [[{"step": 1, "kl": 0.0}, {"step": 2, "kl": 1.0}], [{"step": 2, "kl": 3.0}, {"step": 3, "loss": 1.0}], []]
    steps, values = Curve("grammar", runs).points("kl")
    assert (steps.tolist(), values.tolist()) == ([2], [[1.0], [3.0]])
    assert not len(Curve("grammar", runs).points("reward")[0])


def test_one_value_has_no_spread():
    assert str(Cell.of([0.25])) == "0.250"


def test_a_folder_without_reports_is_refused(tmp_path):
    (tmp_path / "grammar-2").mkdir()
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="judge its runs first"):
            compare_runs(folder)
