"""Loss curves and picture sheets as PNG: what a person looks at while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw

from unimm.files import atomic_write

GAP = 4
LABEL_HEIGHT = 14


def plot_metrics(records: Sequence[dict[str, float]], path: Path) -> None:
    """One panel per metric over steps; nothing is written for an empty run."""
    names = sorted({name for record in records for name in record if name not in ("step", "seconds")})
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
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=90)
    pyplot.close(figure)


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
