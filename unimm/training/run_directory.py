"""A run directory holds exactly what ran: recipe, environment, metrics, plots, samples, checkpoints."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unimm.config import to_dict
from unimm.files import atomic_write

PACKAGES = (
    "unimm",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "datasets",
    "tokenizers",
    "trl",
    "peft",
    "numpy",
)
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives.

    Args:
        name: of the run; its directory is `directory/name`.
        directory: parent of all runs.
        seed: of weights, data order and noise.
    """

    name: str
    directory: str = "runs"
    seed: int = 0


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, run: RunConfig) -> None:
        self.root = Path(run.directory) / run.name
        self.recipe_file = self.root / "recipe.yaml"
        self.metrics_file = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.samples = self.root / "samples"
        self.plots = self.root / "plots"
        self.model = self.root / "model"

    def start(self, recipe: Any) -> None:
        """Write the resolved recipe and the environment.

        Raises:
            ValueError: the directory holds a run of another recipe.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.is_of(recipe):
            raise ValueError(
                f"{self.root} holds a run of another recipe; resume it with that recipe ({self.recipe_file}), "
                "choose another run.name, or delete the directory."
            )
        with atomic_write(self.recipe_file) as path:
            path.write_text(_written(recipe))
        with atomic_write(self.root / "environment.json") as path:
            path.write_text(json.dumps(environment(), indent=2) + "\n")

    def is_of(self, recipe: Any) -> bool:
        """Whether the directory holds a run of this recipe, or none."""
        return not self.recipe_file.exists() or self.recipe_file.read_text() == _written(recipe)

    @property
    def finished(self) -> bool:
        return (self.root / "finished.json").exists()

    def finish(self, summary: dict[str, float]) -> None:
        """Mark the run complete, with its final figures."""
        with atomic_write(self.root / "finished.json") as path:
            path.write_text(json.dumps(summary, indent=2) + "\n")

    def log(self, record: dict[str, float]) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """All whole records; a line cut by a kill is skipped."""
        records = []
        for line in self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind(self, step: int) -> None:
        """Drop records after `step`, so that a resumed run does not log them twice."""
        kept = [record for record in self.metrics() if record["step"] <= step]
        with atomic_write(self.metrics_file) as path:
            path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def half_checkpoint(self, step: int) -> Path:
        """Where a checkpoint is written; it does not count before `commit`."""
        return self.checkpoints / f".step-{step:08d}"

    def commit(self, step: int) -> None:
        """Make a written checkpoint count, and drop the old ones."""
        os.replace(self.half_checkpoint(step), self.checkpoints / f"step-{step:08d}")
        self.prune()

    def last_checkpoint(self) -> Path | None:
        found = sorted(self.checkpoints.glob("step-*")) if self.checkpoints.exists() else []
        return found[-1] if found else None

    def prune(self) -> None:
        """Keep the newest checkpoints, and no half-written ones."""
        for stale in sorted(self.checkpoints.glob("step-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(stale, ignore_errors=True)
        for half in self.checkpoints.glob(".step-*"):
            shutil.rmtree(half, ignore_errors=True)


def _written(recipe: Any) -> str:
    return yaml.safe_dump(to_dict(recipe), sort_keys=False)


def environment() -> dict[str, str]:
    """Versions and revision that a reader needs to repeat the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    try:
        command = ["git", "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {"python": platform.python_version(), "machine": platform.machine(), "revision": revision, **versions}
