"""From a folder or a Hub name to a model that draws and reads, refusing checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PretrainedConfig

from unimm.files import check_model_name
from unimm.nn.processor import check_device
from unimm.nn.stored import check_format
from unimm.pipelines.unimm import DETOKENIZER_FOLDER, UniMM
from unimm.sequence import UniMMProcessor
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration, compress, four_bits

SHIPPED = Path(__file__).resolve().parents[2] / "model_cards" / "unimm-tiny"


def load(
    path: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str | None = None,
    offload: bool = False,
) -> UniMM:
    """A model with its processor.

    Args:
        path: folder or Hub name; None takes the model that ships with the repository.
        device: where it runs.
        dtype: of the language model; the codec stays in float32.
        weights: how those of linear layers are stored, for drawing and reading and not for training; approximate.
            `int8` and `bfloat16` make it fast, `int8` and `nf4` (four bits, by bitsandbytes) small, a detokenizer of
            diffusers included. None leaves them. Codes of pictures stay the same.
        offload: what is not at work waits in the CPU's memory: the language model while a detokenizer draws, and every
            part of the detokenizer until it is needed.

    Raises:
        ValueError: an unknown format, or one whose library is not installed, a device that is not here, no such folder,
            one of another kind of model, or a checkpoint with missing or extra weights.
    """
    if path is None and not SHIPPED.is_dir():
        raise ValueError("The shipped model lies in the repository only; name a folder or a Hub model to load.")
    check_format(weights)
    check_device(device)
    name = str(SHIPPED if path is None else path)
    check_kind(name, UniMMConfig)
    quantized = {}
    if weights == "nf4":
        quantized = {"quantization_config": four_bits(UniMMConfig.from_pretrained(name)), "device_map": device}
    model, report = UniMMForConditionalGeneration.from_pretrained(
        name, dtype=dtype, output_loading_info=True, **quantized
    )
    problems = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    found = [f"{kind.replace('_', ' ')}: {', '.join(map(str, keys[:3]))}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"The weights in {name} do not fit its config ({'; '.join(found)}). Save the model again.")
    assert isinstance(model.generation_config, GenerationConfig)
    local = Path(name).is_dir()
    folder = Path(name if local else snapshot_download(name, allow_patterns=f"{DETOKENIZER_FOLDER}/*"))
    model = model.to(device).eval()
    if weights in ("bfloat16", "int8"):
        compress(model, weights)
    return UniMM(model, UniMMProcessor.from_pretrained(name), folder, weights=weights, offload=offload)


def check_kind(name: str, kind: type[PretrainedConfig]) -> None:
    """Raise `ValueError` where a name is of no model, or of another kind, as a codec alone for a unified one."""
    check_model_name(name)
    found = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if found != kind.model_type:
        raise ValueError(
            f"{name} holds a model of type {found!r}; one of type {kind.model_type!r} is needed here "
            "(`unimm_codec` is a codec, `unimm` the model around it)."
        )
