"""Figures with their trials, targets and intervals, as a table on screen, Markdown and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from unimm.files import atomic_write


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Args:
        group: codec, drawing, reading or grammar.
        name: what was measured.
        value: the number.
        trials: over how many trials.
        target: what it should reach.
        ceiling: the same judge on ground-truth pictures after one trip through the codec, where that makes sense.
        unit: empty for a share of the trials.
    """

    group: str
    name: str
    value: float
    trials: int
    target: float
    ceiling: float | None = None
    unit: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of a share."""
        if self.unit:
            return None
        z, n, p = 1.96, self.trials, self.value
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation and the command that makes them."""

    command: str
    figures: tuple[Figure, ...]

    def to_markdown(self) -> str:
        """A table, and the command under it."""
        lines = [
            "| group | figure | value | 95 % interval | target | ceiling | trials |",
            "|---|---|---|---|---|---|---|",
        ]
        for figure in self.figures:
            bounds = figure.interval
            interval = f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
            lines.append(
                f"| {figure.group} | {figure.name} | {_number(figure.value, figure.unit)} | "
                f"{interval} | {_number(figure.target, figure.unit)} | "
                f"{'' if figure.ceiling is None else _number(figure.ceiling, figure.unit)} | {figure.trials} |"
            )
        return "\n".join([*lines, "", f"Measured by `{self.command}`."])

    def save(self, folder: Path) -> None:
        """Write `report.md` and `report.json`."""
        with atomic_write(folder / "report.md") as path:
            path.write_text(self.to_markdown() + "\n", encoding="utf-8")
        with atomic_write(folder / "report.json") as path:
            data = {"command": self.command, "figures": [asdict(figure) for figure in self.figures]}
            path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _number(value: float, unit: str) -> str:
    return f"{value:.1f} {unit}" if unit else f"{value:.3f}"
