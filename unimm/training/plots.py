"""Loss curves and picture sheets as PNG: what a person looks at while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from unimm.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 4
LABEL_HEIGHT = 14


@dataclass(frozen=True)
class Curve:
    """A variant of an experiment, and the log records of its runs."""

    name: str
    runs: Sequence[Sequence[dict[str, float]]]

    def points(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `[S]` at which every run that has the metric logged it, and its values `[runs, S]`."""
        logged = [{record["step"]: record[metric] for record in run if metric in record} for run in self.runs]
        logged = [run for run in logged if run]
        steps = sorted(set.intersection(*map(set, logged))) if logged else []
        return np.array(steps), np.array([[run[step] for step in steps] for run in logged])


def plot_metrics(records: Sequence[dict[str, float]], path: Path) -> None:
    """One panel per metric over steps; nothing is written for an empty run."""
    plot_curves([Curve("run", [records])], path, leave_out=("step", "seconds", "epoch"))


def plot_curves(curves: Sequence[Curve], path: Path, *, leave_out: Sequence[str], window: int = 1) -> None:
    """One panel per metric: the mean of every variant, and the range of its runs; nothing where nothing was logged.

    Args:
        leave_out: metrics without a panel.
        window: log lines that every point is the mean of.
    """
    found = {name for curve in curves for run in curve.runs for record in run for name in record}
    names = sorted(found.difference(leave_out))
    if not names:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        for index, curve in enumerate(curves):
            steps, values = curve.points(name)  # [S], [runs, S]
            if not len(steps):
                continue
            taken = min(window, len(steps))
            smooth = np.stack([np.convolve(run, np.full(taken, 1 / taken), "valid") for run in values])
            shown, colour = steps[taken - 1 :], f"C{index}"
            axis.plot(shown, smooth.mean(axis=0), linewidth=1, color=colour, label=f"{curve.name} ({len(values)})")
            axis.fill_between(shown, smooth.min(axis=0), smooth.max(axis=0), alpha=0.2, color=colour, linewidth=0)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=7)
    figure.subplots_adjust(**_margins(figure))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=90)
    pyplot.close(figure)


def plot_usage(ids: torch.Tensor, sizes: Sequence[int], path: Path) -> None:
    """How often each code occurs in ids `[M, K]`, most frequent first, with a panel for each slot, of `sizes` codes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(sizes))
    rows = -(-len(sizes) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.4 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat[len(sizes) :]:
        axis.axis("off")
    for index, (axis, slot, size) in enumerate(zip(axes.flat, ids.cpu().unbind(dim=1), sizes, strict=False)):
        counts = slot.unique(return_counts=True)[1].sort(descending=True).values.numpy()
        axis.stairs(counts, np.arange(1, len(counts) + 2), baseline=0.5, fill=True)
        axis.set(xscale="log", yscale="log", xlim=(1, size + 1), ylim=(0.5, None))  # one code alone is seen too
        axis.set_title(f"slot {index}: {len(counts):,} of {size:,} codes", fontsize=9)
        axis.set_xlabel("rank of the code", fontsize=8)
    figure.subplots_adjust(**_margins(figure))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=90)
    pyplot.close(figure)


def _margins(figure: Figure) -> dict[str, float]:
    """Of panels with a title and a name below, by their size in inches; laying them out by their texts takes as long as
    drawing them.
    """
    width, height = figure.get_size_inches()
    return {
        "left": 0.6 / width,
        "right": 1 - 0.15 / width,
        "bottom": 0.5 / height,
        "top": 1 - 0.3 / height,
        "wspace": 0.2,
        "hspace": 0.45,
    }


def contact_sheet(
    pictures: Sequence[Image.Image], path: Path, *, columns: int, labels: Sequence[str] | None = None
) -> None:
    """Pictures of equal size in rows of `columns`, with an optional line of text under each."""
    width, height = pictures[0].size
    step_x, step_y = width + GAP, height + GAP + (LABEL_HEIGHT if labels else 0)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "#808080" if not labels else "white")
    pen = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, top = GAP + index % columns * step_x, GAP + index // columns * step_y
        sheet.paste(picture, (left, top))
        if labels:
            pen.text((left, top + height + 1), labels[index][: width // 5], fill="black", font_size=10)
    with atomic_write(path) as temporary:
        sheet.save(temporary)
