"""A conversation in the terminal: text as text, pictures as coloured half blocks, and always as files too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.files import atomic_write
from unimm.pipelines import Picture, UniMM, open_image

COLUMNS = 48  # characters across a picture in the terminal


def converse(model: UniMM, *, folder: str, seed: int | None) -> None:
    """Read lines until the end of input; `/image PATH question` shows a picture, `/new` begins again."""
    messages: list[dict[str, Any]] = []
    count = 0
    print("Say what to draw, or /image PATH what you want to know; /new begins again, Ctrl-D leaves.")
    for line in iter(_read_line, None):
        if line == "/new":
            messages = []
            continue
        if not line:
            continue
        try:
            messages.append({"role": "user", "content": _content(line)})
            reply = model.chat(messages, seed=seed)
        except ValueError as error:
            messages = messages[:-1] if messages and messages[-1]["role"] == "user" else messages
            print(f"({error})")
            continue
        messages.append(reply.message)
        for part in reply.parts:
            if isinstance(part, Picture):
                path = Path(folder) / f"{count:03d}.png"
                count += 1
                with atomic_write(path) as temporary:
                    part.image.save(temporary)
                if sys.stdout.isatty():
                    print(half_blocks(part.image))
                print(f"[{path}]")
            else:
                print(part.text.strip())


def half_blocks(image: Image.Image) -> str:
    """A picture as lines of upper half blocks in 24-bit colour, two pixels a character."""
    small = image.convert("RGB").resize((COLUMNS, COLUMNS * image.height // image.width // 2 * 2))
    lines = []
    for y in range(0, small.height, 2):
        cells = []
        for x in range(small.width):
            top, bottom = small.getpixel((x, y)), small.getpixel((x, y + 1))
            assert isinstance(top, tuple)
            assert isinstance(bottom, tuple)
            cells.append("\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*top, *bottom))
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _content(line: str) -> Any:
    if not line.startswith("/image "):
        return line
    path, _, question = line.removeprefix("/image ").partition(" ")
    text = {"type": "text", "text": question or "describe the picture"}
    return [{"type": "image", "image": open_image(path)}, text]


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None
