"""X-Omni as a whole: language model, tokenizer of pictures and the FLUX detokenizer in one repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from unimm.conversion.maps import xomni, xomni_lm
from unimm.conversion.shards import SHARD_BYTES, Output, write_weights
from unimm.conversion.text import PLACEHOLDER, template, token_id, upstream_tokenizer
from unimm.conversion.upstream import Plan, Upstream, UpstreamConfig, WeightFile
from unimm.conversion.weights import StoredTensor, stored_tensors
from unimm.conversion.whole import DETOKENIZER, Front, whole_plan, write_json
from unimm.detokenizer.drawers import SETTINGS
from unimm.unified import UniMMConfig

SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CODE_NAME = "<MM-Token-{}>"
# As published; top_k is what transformers 4.51 adds where a script does not name it.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.03, "top_k": 50}
PROJECTION = "siglip_embed.weight"
CLASS_NAME = "FluxTransformer2DModelWithSigLIP"
FLUX_WEIGHTS = "diffusion_pytorch_model"
SHARED_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `XOmniForCausalLM` with `init_vision`.

    Raises:
        ValueError: as the plans of the two, or a text tokenizer that spells numbers otherwise than by digits.
    """
    vision = upstream.get("vision_config")
    encoder, transform = vision["encoder"], vision["transform"]
    sizes = {name: vision[name] for name in ("siglip_model_config", "patched_literals") if name in vision}
    codec = xomni.plan(UpstreamConfig({"args": encoder, **sizes}), shapes=transform)
    fields = xomni_lm.language_fields(upstream)
    tokenizer = upstream_tokenizer(upstream.folder)
    names = list(upstream.get("mm_special_tokens", xomni_lm.SPECIALS))
    offset, (codes,) = fields["image_token_offset"], fields["codebook_sizes"]
    wanted = {CODE_NAME.format(0): offset, names[0]: fields["boi_token_id"]}
    if (found := {name: token_id(tokenizer, name) for name in wanted}) != wanted:
        raise ValueError(f"The text tokenizer has {found}; by config.json they are {wanted}.")
    patch = transform["patch_size"]
    sides = [-(-transform["short_size"] // patch), transform["long_size"] // patch]
    digits, between = spelling(tokenizer)
    fields |= {
        "codec_config": codec.config.to_dict(),
        "span_shapes": [],
        "spelled_sizes": {
            "rows": sides,
            "columns": sides,
            "digits": digits,
            "between": between,
            "end": [token_id(tokenizer, names[2])],
        },
        "default_grid": [sides[1], sides[1]],
        "eos_token_id": token_id(tokenizer, "<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "null_prompt_ids": [tokenizer.pad_token_id],
    }
    config = UniMMConfig(**fields)
    first_special = offset + codes
    rows = {offset + code: CODE_NAME.format(code) for code in range(codes)}
    rows |= {first_special + place: name for place, name in enumerate(names)}
    rows[config.image_token_id] = PLACEHOLDER
    front = Front(
        tokenizer={
            "upstream": tokenizer,
            "names": rows,
            "structural": {
                "boi_token": names[0],
                "eoi_token": names[1],
                "size_token": names[2],
                "image_token": PLACEHOLDER,
            },
            "max_length": upstream.get("max_position_embeddings", 32768),
            "pad_token": tokenizer.pad_token,
        },
        processor={
            "chat_template": template("chatml", default_system=SYSTEM_PROMPT, before_picture="", after_picture=""),
            "draws_from_bare_prompts": True,
        },
        sampling=SAMPLING,
        codec=codec,
        detokenizer=None if upstream.detokenizer is None else partial(write_detokenizer, upstream, vision["decoder"]),
    )
    files = (WeightFile(), *xomni.separate_files(encoder["siglip_path"], encoder["projector_path"]))
    return whole_plan(config, xomni_lm.renames(config), front, files=files)


def spelling(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the ten digits, and of the space between two numbers."""
    digits = [tokenizer(str(digit), add_special_tokens=False)["input_ids"] for digit in range(10)]
    between = tokenizer("24 35", add_special_tokens=False)["input_ids"]
    flat = [ids[0] for ids in digits]
    if any(len(ids) != 1 for ids in digits) or [*between[:2], *between[-2:]] != [flat[place] for place in (2, 4, 3, 5)]:
        raise ValueError("The text tokenizer spells numbers otherwise than digit by digit; X-Omni's does not.")
    return flat, between[2:-2]


def write_detokenizer(upstream: UpstreamConfig, decoder: dict[str, Any], folder: Path) -> None:
    """A `FeaturesToFluxPipeline` from X-Omni's transformer and the other parts of a FLUX pipeline.

    Raises:
        ValueError: two guidances, or a FLUX folder that is none.
        FileNotFoundError: a part is missing.
    """
    flux, source = upstream.detokenizer, upstream.folder / decoder["model_path"]
    assert flux is not None
    if decoder["cfg_scale"] != decoder.get("cfg_scale_2", decoder["cfg_scale"]):
        raise ValueError(f"decoder has cfg_scale {decoder['cfg_scale']} and another cfg_scale_2; they must be equal.")
    index_file = flux / "model_index.json"
    if not index_file.is_file():
        raise FileNotFoundError(f"{flux} has no model_index.json; name the folder of the FLUX.1-dev pipeline.")
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for part in SHARED_PARTS:
        if index.get(part, [None, None])[0] is not None:
            shutil.copytree(flux / part, folder / part)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    channels = config.pop("siglip_channels", upstream.get("vision_config")["encoder"]["z_channels"])
    config.pop("drop_token_prob", None)
    write_json(folder / "transformer" / "config.json", config | {"_class_name": "FluxTransformer2DModel"})
    stored = stored_tensors(source, (WeightFile(),))
    if PROJECTION not in stored:
        raise ValueError(f"{source} has no {PROJECTION!r}; it is a plain FLUX transformer, not X-Omni's.")
    projection = stored.pop(PROJECTION)
    outputs = [_copied(name, tensor) for name, tensor in sorted(stored.items())]
    write_weights(folder / "transformer", outputs, name=FLUX_WEIGHTS, shard_bytes=SHARD_BYTES)
    width = projection.shape[0]
    fields = {"_class_name": "FeatureCondition", "in_features": channels, "width": width}
    write_json(folder / "condition" / "config.json", fields)
    write_weights(
        folder / "condition", [_copied("project.weight", projection)], name=FLUX_WEIGHTS, shard_bytes=SHARD_BYTES
    )
    parts = {part: index.get(part, [None, None]) for part in SHARED_PARTS}
    own = {
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "condition": ["unimm.detokenizer.flux", "FeatureCondition"],
    }
    write_json(folder / "model_index.json", {"_class_name": "FeaturesToFluxPipeline", **parts, **own})
    settings = {"num_inference_steps": decoder["num_inference_steps"], "guidance_scale": float(decoder["cfg_scale"])}
    write_json(folder / SETTINGS, settings)


def restore_detokenizer(fields: dict[str, Any], source: Path, target: Path) -> None:
    """X-Omni's transformer of the detokenizer, where the converted model has one."""
    folder = source / DETOKENIZER
    if not (folder / "condition").is_dir():
        return
    place = target / fields["vision_config"]["decoder"]["model_path"]
    stored = stored_tensors(folder / "transformer", (WeightFile(),))
    stored[PROJECTION] = stored_tensors(folder / "condition", (WeightFile(),))["project.weight"]
    outputs = [_copied(name, tensor) for name, tensor in sorted(stored.items())]
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    own = {"_class_name": CLASS_NAME, "siglip_channels": stored[PROJECTION].shape[1], "drop_token_prob": 0.0}
    write_json(place / "config.json", config | own)
    write_weights(place, outputs, name=FLUX_WEIGHTS, shard_bytes=SHARD_BYTES)


def _copied(name: str, stored: StoredTensor) -> Output:
    def parts() -> Iterator[torch.Tensor]:
        return iter((stored.read(),))

    return Output(name, stored.shape, stored.dtype, parts)


SYSTEM = Upstream(
    system="xomni",
    repository="X-Omni-Team/X-Omni",
    licence="Apache-2.0; a detokenizer from FLUX.1-dev is under that model's non-commercial licence",
    paper="arXiv 2507.22058",
    plan=plan,
    aliases=("x_omni",),
    restore_rest=restore_detokenizer,
)
