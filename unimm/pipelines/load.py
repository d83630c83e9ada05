"""From a folder or a Hub name to a model that draws and reads, refusing checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from unimm.pipelines.unimm import DETOKENIZER_FOLDER, UniMM
from unimm.sequence import UniMMProcessor
from unimm.unified import UniMMForConditionalGeneration, compress

SHIPPED = Path(__file__).resolve().parents[2] / "model_cards" / "unimm-tiny"


def load(
    path: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str | None = None,
) -> UniMM:
    """A model with its processor.

    Args:
        path: folder or Hub name; None takes the model that ships with the repository.
        device: where it runs.
        dtype: of the language model; the codec stays in float32.
        weights: `int8` or `bfloat16` stores those of the linear layers for drawing and reading fast, not for training;
            approximate. None leaves them.

    Raises:
        ValueError: an unknown format, no such folder, or a checkpoint with missing or extra weights.
    """
    if path is None and not SHIPPED.is_dir():
        raise ValueError("The shipped model lies in the repository only; name a folder or a Hub model to load.")
    name = str(path or SHIPPED)
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/"))):
        raise ValueError(f"There is no model folder {name}; name a folder that holds config.json, or a Hub model.")
    model, report = UniMMForConditionalGeneration.from_pretrained(name, dtype=dtype, output_loading_info=True)
    problems = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    found = [f"{kind.replace('_', ' ')}: {', '.join(map(str, keys[:3]))}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"The weights in {name} do not fit its config ({'; '.join(found)}). Save the model again.")
    assert isinstance(model.generation_config, GenerationConfig)
    local = Path(name).is_dir()
    folder = Path(name if local else snapshot_download(name, allow_patterns=f"{DETOKENIZER_FOLDER}/*"))
    model = model.to(device).eval()
    if weights is not None:
        compress(model, weights)
    return UniMM(model, UniMMProcessor.from_pretrained(name), folder)
