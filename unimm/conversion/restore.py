"""The way back: a saved model of ours as upstream's `config.json` and `weights.safetensors`, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM

from unimm.conversion.convert import WEIGHTS
from unimm.conversion.registry import UPSTREAMS, find_upstream
from unimm.files import atomic_directory


def restore(system: str, source: str | Path, target: str | Path) -> Path:
    """Write the model in `source`, converted from a system and perhaps trained further, in that system's layout.

    Raises:
        ValueError: an unknown system, one with no way back, or a target that exists.
    """
    upstream, source, target = find_upstream(system), Path(source), Path(target)
    if upstream.restore is None:
        known = ", ".join(name for name, other in UPSTREAMS.items() if other.restore is not None)
        raise ValueError(f"{upstream.system} has no way back to upstream's layout; there is one for {known}.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a new folder for upstream's files.")
    fields, weights = upstream.restore(AutoModelForMultimodalLM.from_pretrained(source))
    with atomic_directory(target) as folder:
        save_file(weights, folder / WEIGHTS)
        (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    return target
