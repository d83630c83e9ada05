"""Runs of an experiment side by side: what they reached, as means over seeds with their spread, and their curves.

In: a folder of run directories. A name that ends in a number is one seed of a variant (`grammar-2` of `grammar`), and
every folder in a run that holds a `report.json` is one way it was judged. Out: a table, its numbers, and a picture.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unimm.files import atomic_write
from unimm.training.plots import Curve, plot_curves
from unimm.training.run_directory import RunConfig, RunDirectory

SHAPES = ("single", "colour", "count", "position", "binding")
# Means of figures that a judge gives one by one.
MEANS = {"mean of shapes": SHAPES, "mean of all drawing": (*SHAPES, "emoji", "word")}
NO_CURVES = ("step", "epoch", "learning_rate", "grad_norm", "step_time", "rollout_time", "reward_time")
SMOOTHED = 10  # log lines


@dataclass(frozen=True)
class Cell:
    """One figure of one variant: the mean over its seeds, their sample deviation (0 of one seed), and their values."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.deviation:.3f}" if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Comparison:
    """Figures of every way to judge: way, then (group, name), then variant."""

    folder: str
    tables: dict[str, dict[tuple[str, str], dict[str, Cell]]]

    def to_markdown(self) -> str:
        """One table per way to judge."""
        lines: list[str] = []
        for way, figures in self.tables.items():
            variants = list(dict.fromkeys(variant for row in figures.values() for variant in row))
            seeds = {
                variant: max(len(row[variant].values) for row in figures.values() if variant in row)
                for variant in variants
            }
            heads = [f"{variant} ({number} seeds)" if number > 1 else variant for variant, number in seeds.items()]
            lines += [f"## {way}", "", f"| group | figure | {' | '.join(heads)} |", "|---" * (2 + len(variants)) + "|"]
            for (group, name), row in figures.items():
                cells = [str(row[variant]) if variant in row else "" for variant in variants]
                lines.append(f"| {group} | {name} | {' | '.join(cells)} |")
            lines.append("")
        return "\n".join([*lines, f"Mean ± sample deviation over seeds. Gathered by `unimm compare {self.folder}`."])

    def save(self, folder: Path) -> None:
        """Write `comparison.md` and `comparison.json`."""
        with atomic_write(folder / "comparison.md") as path:
            path.write_text(self.to_markdown() + "\n", encoding="utf-8")
        plain = {
            way: [
                {"group": group, "figure": name, "values": {variant: cell.values for variant, cell in row.items()}}
                for (group, name), row in figures.items()
            ]
            for way, figures in self.tables.items()
        }
        with atomic_write(folder / "comparison.json") as path:
            path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def compare_runs(folder: Path) -> Comparison:
    """Gather the runs of a folder and write `comparison.md`, `comparison.json` and `curves.png` into it.

    Raises:
        ValueError: no report in any of the runs.
    """
    runs = runs_of(folder)
    values: dict[str, dict[tuple[str, str], dict[str, list[float]]]] = defaultdict(dict)
    for variant, directories in runs.items():
        for directory in directories:
            for path in sorted(directory.root.glob("*/report.json")):
                for name, value in read_report(path).items():
                    values[path.parent.name].setdefault(name, defaultdict(list))[variant].append(value)
    if not values:
        raise ValueError(
            f"{folder} has no RUN/*/report.json; judge its runs first, for example `unimm evaluate tiny --model "
            f"{folder}/RUN/model --folder {folder}/RUN/judged`."
        )
    comparison = Comparison(
        str(folder),
        {
            way: {name: {variant: Cell.of(found) for variant, found in row.items()} for name, row in figures.items()}
            for way, figures in values.items()
        },
    )
    comparison.save(folder)
    curves = [Curve(variant, [directory.metrics() for directory in found]) for variant, found in runs.items()]
    plot_curves(
        [curve for curve in curves if any(curve.runs)], folder / "curves.png", leave_out=NO_CURVES, window=SMOOTHED
    )
    return comparison


def runs_of(folder: Path) -> dict[str, list[RunDirectory]]:
    """Variants to the directories of their seeds."""
    runs: dict[str, list[RunDirectory]] = defaultdict(list)
    for path in sorted(item for item in folder.iterdir() if item.is_dir()) if folder.is_dir() else []:
        seeded = re.fullmatch(r"(.+)-\d+", path.name)
        runs[seeded[1] if seeded else path.name].append(RunDirectory(RunConfig(path.name, str(folder))))
    return dict(runs)


def read_report(path: Path) -> dict[tuple[str, str], float]:
    """Figures of a report by (group, name), and the means of `MEANS` where all that they need was judged."""
    found = {(one["group"], one["name"]): float(one["value"]) for one in json.loads(path.read_text())["figures"]}
    for name, parts in MEANS.items():
        needed = [("drawing", part) for part in parts]
        if found.keys() >= set(needed):
            found["drawing", name] = statistics.fmean(found[part] for part in needed)
    return found
