"""Successes and failures side by side, for a person to judge the judge."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from unimm.files import atomic_write

SHOWN = 10  # drawings per category, failures first
GAP = 6
LABEL = 14


def verdict_sheet(drawn: dict[str, list[tuple[Image.Image, str, bool]]], path: Path) -> None:
    """One row per category; a red frame marks what the judge refused."""
    side = next(iter(drawn.values()))[0][0].width
    sheet = Image.new("RGB", (SHOWN * (side + GAP) + GAP, len(drawn) * (side + GAP + LABEL) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, verdicts in enumerate(drawn.values()):
        failures = [verdict for verdict in verdicts if not verdict[2]][: SHOWN // 2]
        successes = [verdict for verdict in verdicts if verdict[2]]
        for column, (image, caption, right) in enumerate([*failures, *successes][:SHOWN]):
            left, top = GAP + column * (side + GAP), GAP + row * (side + GAP + LABEL)
            pen.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), fill="#20a040" if right else "#d02020")
            sheet.paste(image, (left, top))
            pen.text((left, top + side + 2), caption[: side // 5], fill="black", font_size=9)
    with atomic_write(path) as temporary:
        sheet.save(temporary)
