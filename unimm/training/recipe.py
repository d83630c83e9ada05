"""One entry for every stage: a recipe's `task` says which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.config import from_dict, read_yaml, set_by_path
from unimm.pipelines.load import check_kind
from unimm.training.codec import CodecRecipe, train_codec
from unimm.training.detokenizer import DetokenizerRecipe, train_detokenizer
from unimm.training.dpo import DpoRecipe, train_dpo
from unimm.training.grpo import GrpoRecipe, train_grpo
from unimm.training.language import LanguageRecipe, train_language
from unimm.training.run_directory import RunDirectory
from unimm.unified import UniMMConfig

STAGES: dict[str, tuple[type, Callable[[Any], RunDirectory]]] = {
    "codec": (CodecRecipe, train_codec),
    "detokenizer": (DetokenizerRecipe, train_detokenizer),
    "pretrain": (LanguageRecipe, train_language),
    "sft": (LanguageRecipe, train_language),
    "dpo": (DpoRecipe, train_dpo),
    "grpo": (GrpoRecipe, train_grpo),
}

# Keys of models that another stage has trained, and their kinds.
BEGINNINGS = {"begin": VisualCodecConfig, "codec": VisualCodecConfig, "init_from": UniMMConfig}


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> RunDirectory:
    """Run a recipe to its end, or go on where it stopped; a finished run is left alone.

    Raises:
        ValueError: an unknown task, key or value, or no such model to begin with.
    """
    recipe = read_recipe(recipe_path, overrides)
    directory = RunDirectory(recipe.run)
    if directory.finished:
        another = "" if directory.is_of(recipe) else f", by another recipe ({directory.recipe_file})"
        print(f"{directory.root} is finished{another}; delete it to train again, or choose another run.name.")
        return directory
    for key in BEGINNINGS:
        if name := getattr(recipe, key, None):
            check_begun(key, name)
    return STAGES[recipe.task][1](recipe)


def check_begun(key: str, name: str) -> None:
    """Raise `ValueError` where the model that a recipe begins with is not there, or is of another kind."""
    try:
        check_kind(name, BEGINNINGS[key])
    except ValueError as error:
        raise ValueError(f"{key}: {error} A recipe that trains one has to be run first.") from None


def read_recipe(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """The recipe in a file, of the class of its task.

    Raises:
        ValueError: an unknown task, key or value.
    """
    data = read_yaml(recipe_path)
    for override in overrides:
        set_by_path(data, override)
    task = data.get("task")
    if task not in STAGES:
        raise ValueError(f"{recipe_path}: task is {task!r}; it must be one of {', '.join(STAGES)}.")
    return from_dict(STAGES[task][0], data, where=str(recipe_path))
