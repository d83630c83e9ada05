"""Lays a model out as a Hub repository that loads with or without an earlier `import unimm`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from unimm.detokenizer import CodesToImagePipeline
from unimm.files import atomic_directory
from unimm.pipelines.unimm import DETOKENIZER_FOLDER
from unimm.sequence import UniMMProcessor
from unimm.unified import UniMMForConditionalGeneration
from unimm.unified.shims import write_shims


def write_repository(source: Path, target: Path, detokenizer: Path | None = None) -> Path:
    """Copy a trained model to `target`: the language model in bfloat16, the codec in float32, shims beside them.

    Args:
        source: a saved model with its processor.
        target: folder that becomes the repository.
        detokenizer: a saved pipeline, which goes to `detokenizer/` in bfloat16.

    Raises:
        ValueError: `source` holds no model, or `detokenizer` no pipeline, or `target` something else than an earlier
            repository, which would be lost.
    """
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} holds no saved model; train one first (make tiny).")
    if detokenizer is not None and not (detokenizer / "model_index.json").is_file():
        raise ValueError(f"{detokenizer} holds no saved pipeline; train one first (make tiny).")
    check_replaceable(target)
    model = UniMMForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    with atomic_directory(target) as folder:
        model.save_pretrained(folder)
        UniMMProcessor.from_pretrained(source).save_pretrained(folder)
        write_shims(folder)
        if detokenizer is not None:
            pipeline = CodesToImagePipeline.from_pretrained(detokenizer)
            pipeline.to(torch.bfloat16).save_pretrained(folder / DETOKENIZER_FOLDER)
        for path in folder.rglob("*.json"):
            _forget_paths(path)
    return target


def check_replaceable(target: Path) -> None:
    """Raise `ValueError` where a repository at `target` would take the place of something else."""
    strange = target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()
    if target.is_file() or strange or (target / ".git").exists():
        raise ValueError(
            f"{target} holds something else than a repository that was laid out here, and it would be lost; name a "
            "new folder."
        )


def _forget_paths(path: Path) -> None:
    """Take out of a configuration where it was loaded from: a folder of the machine that wrote it."""
    text = path.read_text(encoding="utf-8")
    if "_name_or_path" in text:
        kept = json.loads(text, object_hook=lambda fields: {k: v for k, v in fields.items() if k != "_name_or_path"})
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
