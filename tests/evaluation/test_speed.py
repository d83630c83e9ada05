"""The bench runs every task of a small model and says what it measured."""

import json

import pytest
import torch

from unimm.cli.main import main
from unimm.evaluation.random_models import SIZES, random_model
from unimm.evaluation.scaling import BATCHES
from unimm.evaluation.speed import TASKS, Bench, SpeedReport
from unimm.evaluation.timing import Machine, Way, compare


def test_the_ways_of_a_task_take_turns():
    ran, ticks = [], iter(range(100))
    ways = [Way("slow", lambda: ran.append("slow"), 2), Way("fast", lambda: ran.append("fast"), 4, floor=0.05)]
    slow, fast = compare("draw", "code", ways, lambda: next(ticks), rounds=2)
    assert ran == ["slow", "fast"] * 3
    assert (slow.milliseconds, fast.milliseconds, fast.speedup, fast.floor) == (500, 250, 2, 50)


def test_a_way_that_stops_early_tells_the_time_of_the_whole():
    ticks = iter([0, 7, 7, 7 + 7 + 3 * 2])  # 7 seconds until the second code is there, 2 for every later one
    way = Way("early", lambda: None, 5, begin=lambda: None, whole=11, begun=2)
    assert way.seconds(lambda: next(ticks)) == (7 + 9 * 2) / 11


def test_every_task_is_measured(tiny, tmp_path):
    model, _ = tiny
    machine = Machine.measure(torch.device("cpu"))
    bench = Bench(model, machine, rounds=1, batch=2, codes=3, formats=("bfloat16", "int8"), window=2)
    speeds = tuple(bench.run(TASKS))
    ways = {"draw": 6, "read": 2, "train": 2, "tokenize": 3, "detokenize": 3}
    assert [speed.task for speed in speeds] == [task for task in TASKS for _ in range(ways[task])]
    assert all(speed.milliseconds > 0 for speed in speeds[6:])  # what is told from so few codes may be anything
    bench.compressed["the same"] = model
    agreement = bench.agreement()
    assert agreement.keys() == {"bfloat16", "int8", "the same"}
    assert agreement["the same"] == 1
    assert all(0 <= share <= 1 for share in agreement.values())
    per_pass = bench.codes_per_pass()
    assert per_pass is not None
    assert 1 <= per_pass <= 2
    report = SpeedReport("unimm bench", "tiny", "wall time", 1, 10.0, 50.0, speeds, None, agreement, per_pass)
    report.save(tmp_path)
    assert "one pass settles" in report.to_markdown()
    assert report.to_markdown().count("| draw |") == 6
    assert json.loads((tmp_path / "speed.json").read_text())["speeds"][0]["speedup"] == 1
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_a_model_that_draws_by_levels_is_measured_without_stock(tiny, monkeypatch):
    model, _ = tiny
    monkeypatch.setattr(model.config, "levels", [4])
    bench = Bench(model, Machine.measure(torch.device("cpu")), rounds=1, codes=8, formats=("int8",))
    speeds = bench.run(["draw", "read", "train"])
    assert [speed.way for speed in speeds[:2]] == ["engine", "engine, int8"]
    assert speeds[0].floor is None
    assert bench.agreement() == {}
    assert bench.codes_per_pass() == pytest.approx(bench.picture / (bench.picture / 4 + 1))  # and one for its end


def test_passes_are_counted_by_the_engine_alone(tiny, monkeypatch):
    model, _ = tiny
    monkeypatch.setattr(type(model), "decoder", lambda self: None)
    assert Bench(model, Machine.measure(torch.device("cpu")), window=4).codes_per_pass() is None


def test_too_few_codes_are_refused(tiny):
    with pytest.raises(ValueError, match="codes is 2; draw more than 2"):
        Bench(tiny[0], Machine.measure(torch.device("cpu")), codes=2)


def test_the_command_of_a_report_is_whole(tiny_folder, capsys, monkeypatch):
    """Codes for every pass are of drawing, and are not counted where nothing is drawn."""
    monkeypatch.delattr(Bench, "codes_per_pass")
    options = f"--model {tiny_folder} --device cpu --rounds 1 --window 4 --weights int8 --tasks read"
    assert main(["bench", *options.split()]) == 0
    printed = capsys.readouterr().out
    assert f"--model {tiny_folder} --weights int8 --device cpu --batch 1 --rounds 1 --window 4 --formats" in printed


def test_scaling_is_reported_over_batches_and_lengths(tiny, tmp_path, monkeypatch):
    model, _ = tiny
    monkeypatch.setattr("unimm.evaluation.scaling.LENGTHS", (2, 3, 1_000))
    bench = Bench(model, Machine.measure(torch.device("cpu")), rounds=1)
    scaling = bench.scaling()
    assert [(point.batch, point.codes) for point in scaling.batches] == [(batch, bench.picture) for batch in BATCHES]
    assert [(point.batch, point.codes) for point in scaling.lengths] == [(1, 2), (1, 3), (1, bench.picture)]
    for point in (*scaling.batches, *scaling.lengths):
        assert point.pictures_per_second * point.codes * point.speed.milliseconds == pytest.approx(1000)
    floors = [point.speed.floor for point in scaling.lengths]
    assert floors == sorted(floors)
    report = SpeedReport("unimm bench", "tiny", "wall time", 1, 10.0, 50.0, (), scaling, {}, None)
    report.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"speed.md", "speed.json", "scaling.png"}
    table = (tmp_path / "speed.md").read_text().splitlines()
    assert table[0].startswith("| pictures at once")
    assert sum(line.startswith("| ") for line in table) == 2 + len(BATCHES) + 3
    assert json.loads((tmp_path / "speed.json").read_text())["scaling"]["batches"][-1]["batch"] == BATCHES[-1]


def test_random_models_have_their_size():
    models = {name: random_model(name, codes=256, dtype=torch.bfloat16, device="meta") for name in SIZES}
    bodies = {name: model.model.language_model for name, model in models.items()}
    counts = {name: sum(weight.numel() for weight in body.parameters()) for name, body in bodies.items()}
    assert counts["20m"] == pytest.approx(22e6, rel=0.05)
    assert counts["150m"] == pytest.approx(145e6, rel=0.05)
    assert counts["7b"] == pytest.approx(7.1e9, rel=0.05)


@pytest.mark.parametrize(
    "options", ["--tasks sing", "--config 3m", "--config tiny --codes 5", "--rounds 0", "--drawn 1"]
)
def test_what_cannot_be_measured_is_one_line(options, capsys):
    assert main(["bench", *options.split()]) == 2
    assert capsys.readouterr().err.startswith("unimm: ")
