"""The guided tour of the shipped model."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from unimm.files import atomic_write
from unimm.pipelines import Picture, UniMM, load, open_image

PROMPTS = (
    "a red circle",
    "a green star",
    "three blue hearts",
    "a red heart above a blue star",
    "a yellow square left of a purple ring",
    "a green circle and a black star",
    "pizza",
    'the word "CAKE" in red',
)
CHAT = "show me an orange heart and say what it is"
SEED = 7
OUTPUT = Path("demo_output")
GAP, LABEL = 10, 18


def tour(model: UniMM, folder: Path) -> None:
    """Draw, describe and chat; write everything into `folder` and print where it is."""
    drawings = draw_all(model)
    sheet = contact_sheet(drawings, PROMPTS)
    _save(sheet, folder / "contact_sheet.png")
    for drawing, prompt in zip(drawings, PROMPTS, strict=True):
        _save(drawing, folder / f"{re.sub('[^a-z]+', '_', prompt.lower()).strip('_')}.png")
    print(f"\nEight drawings: {folder / 'contact_sheet.png'}")

    example = Path(__file__).with_name("example.png")
    print("\nTwo pictures, described:")
    for name, picture in (("the drawing of the red heart", drawings[3]), ("an example picture", open_image(example))):
        print(f"  {name}: {model.understand(picture)[0].text}")
    _save(open_image(example), folder / "example.png")

    print(f"\nOne answer of text and picture:\n  you: {CHAT}\n  unimm: ", end="")
    reply = model.chat([{"role": "user", "content": CHAT}], seed=SEED)
    for part in reply.parts:
        if isinstance(part, Picture):
            _save(part.image, folder / "chat.png")
            print(f"[{folder / 'chat.png'}] ", end="")
        else:
            print(part.text, end=" ")
    print(f"\n\nEverything is in {folder.resolve()}")


def draw_all(model: UniMM) -> list[Image.Image]:
    """One drawing per prompt, with a progress bar."""
    drawings = []
    for prompt in tqdm(PROMPTS, desc="drawing"):
        drawings += model.generate(prompt, seed=SEED)[0].images
    return drawings


def contact_sheet(pictures: list[Image.Image], labels: tuple[str, ...]) -> Image.Image:
    """Four pictures a row, each over its prompt, at twice their size."""
    side = 2 * pictures[0].width
    rows = -(-len(pictures) // 4)
    sheet = Image.new("RGB", (4 * (side + GAP) + GAP, rows * (side + GAP + LABEL) + GAP), "#f0f0f0")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = GAP + index % 4 * (side + GAP), GAP + index // 4 * (side + GAP + LABEL)
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + side + 2), label, fill="black", font_size=14)
    return sheet


def main() -> None:
    """Load the shipped model and tour it; errors are one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
    began = time.monotonic()
    print("loading unimm-tiny ...")
    try:
        tour(load(), OUTPUT)
    except (ValueError, OSError) as error:
        sys.exit(f"unimm demo: {' '.join(str(error).split())}")
    print(f"({time.monotonic() - began:.0f} s)")


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary)
