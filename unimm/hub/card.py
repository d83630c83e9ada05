"""The model card: what the model is, how it was measured, how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from unimm.files import atomic_write

FRONT_MATTER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: any-to-any
tags:
- unimm
- text-to-image
- image-to-text
---
"""
BODY = """
# unimm-tiny

One causal language model that reads and draws 128 x 128 pictures: its codec turns a picture into 64 positions of
two codes, a form and a palette, and a {layers}-layer {architecture} of width {width} works over text and codes alike.
{parameters} weights in all.{detokenizer}

![drawings, failures first, framed by the judge](drawings.png)

## Use

```python
import unimm

model = unimm.load("model_cards/unimm-tiny")
model.generate("a red heart above a blue star", seed=0)[0].images[0].save("heart.png")
```

Prompts are what it was trained on: `a red circle`, `three blue stars`, `a green heart above a pink square`, `pizza`,
`the word "CAKE" in red`. Sampling defaults are in `generation_config.json`.

## What it knows

Three rendered worlds: {num_shapes} shapes in {num_colours} colours (alone, counted, in relations, side by side),
{num_emoji} emoji of Noto Color Emoji by their Unicode names, and words of one to four capital letters. It knows
nothing else: no photographs, no general language. It reads pictures as they were rendered more surely than copies of
them, its own drawings included. It was trained from nothing on two CPU cores with the recipes in `recipes/tiny/`.

## Measured

On combinations that training never shows; ceilings are ground-truth pictures after one trip through the codec.

{report}

## Licence

Apache-2.0. Emoji pictures were rendered from Noto Color Emoji (SIL OFL 1.1); the font is not included.
"""
DETOKENIZER = """ A rectified-flow detokenizer of {parameters} weights in `detokenizer/` draws the same codes in 4 to 20
steps from noise, and sees what the codec's own decoder draws of them in one pass, to which it adds detail:
`model.generate(prompt, diffusion_steps=8)`."""


def write_card(folder: Path, report_markdown: str, *, num_shapes: int, num_colours: int, num_emoji: int) -> None:
    """Write `README.md` of a repository from its config, its weights and its measured report."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    denoiser = folder / "detokenizer" / "transformer" / "diffusion_pytorch_model.safetensors"
    card = FRONT_MATTER + BODY.format(
        layers=text["num_hidden_layers"],
        architecture=text["model_type"],
        width=text["hidden_size"],
        parameters=f"{count_weights(folder / 'model.safetensors'):,}",
        detokenizer=DETOKENIZER.format(parameters=f"{count_weights(denoiser):,}") if denoiser.exists() else "",
        num_shapes=num_shapes,
        num_colours=num_colours,
        num_emoji=num_emoji,
        report=report_markdown,
    )
    with atomic_write(folder / "README.md") as path:
        path.write_text(card, encoding="utf-8")


def count_weights(path: Path) -> int:
    """Numbers in a safetensors file, read from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for side in entry["shape"]:
                size *= side
            total += size
    return total
