"""A run becomes a repository on the Hub, with a card made of what the run directory holds."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from unimm.files import atomic_write
from unimm.hub.card import count_weights
from unimm.hub.repository import write_repository

CARD = """---
license: {licence}
library_name: transformers
pipeline_tag: any-to-any
tags:
- unimm
- text-to-image
- image-to-text
{base}---

# {name}

One causal language model that reads and draws: a {layers}-layer {architecture} of width {width}, {parameters} weights
in all, the visual tokenizer included. Made by the stage `{task}` of unimm from {origin}.

## Use

```python
import unimm

model = unimm.load("{repository}")
model.generate("a red heart", seed=0)[0].images[0].save("heart.png")
```

Sampling defaults are in `generation_config.json`.
{samples}
## Data

{data}

## Measured while training

After the last step, over {steps} steps in all; no benchmark was run for this card.

| figure | value |
|---|---|
{figures}
{curves}
## Recipe

```yaml
{recipe}```

Versions: {versions}.

## Licence

{licence}. Licences of the data, and of the models that it began with, bind beside it.
"""


def push_run(
    run: Path, repository: str, *, private: bool = False, licence: str = "apache-2.0", detokenizer: Path | None = None
) -> str:
    """Lay out a finished run and upload it as `owner/name`; the address of the commit.

    Raises:
        ValueError: as `write_run_repository`.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = write_run_repository(
            run, Path(parent) / "repository", repository=repository, licence=licence, detokenizer=detokenizer
        )
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"unimm: {run.name}")
    return str(commit.commit_url)


def write_run_repository(
    run: Path, target: Path, *, repository: str, licence: str = "apache-2.0", detokenizer: Path | None = None
) -> Path:
    """Lay a finished run out at `target` as the Hub has it: weights, shims, card, curves and samples.

    Args:
        run: directory of the run.
        repository: `owner/name`, for the card.
        licence: as the Hub spells it.
        detokenizer: a saved pipeline that goes along.

    Raises:
        ValueError: a run that is not finished, or a name that is no repository's.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"The repository is {repository!r}; name it owner/name, as the Hub does.")
    if not (run / "finished.json").is_file():
        raise ValueError(f"{run} is no finished run; train it to its end first, or name its directory, not its model.")
    write_repository(run / "model", target, detokenizer)
    curves = run / "plots" / "metrics.png"
    sheets = sorted((run / "samples").glob("step-*.png"))
    if curves.is_file():
        shutil.copy(curves, target / "curves.png")
    if sheets:
        shutil.copy(sheets[-1], target / "samples.png")
    with atomic_write(target / "README.md") as path:
        path.write_text(run_card(run, target, repository=repository, licence=licence), encoding="utf-8")
    return target


def run_card(run: Path, folder: Path, *, repository: str, licence: str) -> str:
    """The card of a run that is laid out in `folder`."""
    recipe: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text())
    text = json.loads((folder / "config.json").read_text())["text_config"]
    environment: dict[str, str] = json.loads((run / "environment.json").read_text())
    last: dict[str, float] = json.loads((run / "finished.json").read_text())
    backbone = (recipe.get("backbone") or {}).get("llm")
    shown = {name: value for name, value in last.items() if name not in ("step", "epoch", "seconds")}
    weights = sum(count_weights(path) for path in folder.glob("model*.safetensors"))
    return CARD.format(
        licence=licence,
        base=f"base_model: {backbone}\n" if backbone else "",
        name=repository.split("/")[1],
        repository=repository,
        layers=text["num_hidden_layers"],
        architecture=text["model_type"],
        width=text["hidden_size"],
        parameters=f"{weights:,}",
        task=recipe["task"],
        origin=backbone or recipe.get("init_from") or "nothing",
        samples="\n![drawings of fixed prompts after the last step](samples.png)\n"
        if (folder / "samples.png").is_file()
        else "",
        data=_data(recipe),
        steps=last.get("step", recipe["optimizer"]["steps"]),
        figures="\n".join(f"| {name} | {value:.4g} |" for name, value in shown.items()),
        curves="\n![curves over steps](curves.png)\n" if (folder / "curves.png").is_file() else "",
        recipe=yaml.safe_dump(recipe, sort_keys=False),
        versions=", ".join(f"{name} {version}" for name, version in environment.items()),
    )


def _data(recipe: dict[str, Any]) -> str:
    """What was learned from, a line for each part."""
    data, prompts = recipe.get("data") or {}, recipe.get("prompts") or {}
    lines = [f"- rows of `{name}`, weight {weight:g}" for name, weight in (data.get("sources") or {}).items()]
    lines += [
        f"- the rendered world `{name}`, weight {weight:g}" for name, weight in (data.get("worlds") or {}).items()
    ]
    lines += [f"- prompts `{name}`, weight {weight:g}" for name, weight in (prompts.get("categories") or {}).items()]
    if prompts.get("source"):
        lines.append(f"- prompts of `{prompts['source']}`")
    lines += [f"- the reward `{name}`, weight {weight:g}" for name, weight in (recipe.get("rewards") or {}).items()]
    return "\n".join(lines)
