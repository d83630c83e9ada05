"""LaVIT: a LLaMA-2 that draws by codes of any number and reads by features, and its Stable Diffusion."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unimm.conversion.maps import lavit
from unimm.conversion.text import PLACEHOLDER, template, token_id, upstream_tokenizer
from unimm.conversion.upstream import LEAVES, Plan, Rename, Upstream, UpstreamConfig, WeightFile, read_config
from unimm.conversion.weights import unpickled
from unimm.conversion.whole import DETOKENIZER, Front, padded_rows, plain_renames, text_fields, whole_plan, write_json
from unimm.detokenizer.drawers import CONDITION, SETTINGS, UNCONDITIONAL
from unimm.detokenizer.sdxl import PooledCondition
from unimm.files import atomic_write
from unimm.unified import UniMMConfig

OPEN, CLOSE, CODE_NAME = "<image>", "</image>", "<image_{}>"
TEXT_ROWS = 32000  # of LLaMA; a picture's opening, its end and the codes follow
FEWEST, MOST = 20, 200  # codes of a drawn picture
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "guidance_scale": 4.0}
STEPS, GUIDANCE = 50, 5.0
LARGE_STEPS, LARGE_GUIDANCE = 25, 7.0
LANGUAGE, PIXELS = "language_model", "pixel_decoding"
READER = "reader"
PARTS = ("scheduler", "unet", "vae")
LARGE_FILE = f"{lavit.VISUAL}/{lavit.LARGE_DECODER}.bin"
# Upstream's names of what Stable Diffusion XL reads through, and ours.
CONDITION_PARTS = {
    "unet_proj_1": "first",
    "unet_proj_2": "second",
    "unet_attnpool.q_proj": "pool.query",
    "unet_attnpool.k_proj": "pool.key",
    "unet_attnpool.v_proj": "pool.value",
    "unet_attnpool.c_proj": "pool.out",
}
CONDITION_NAMES = {
    f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in CONDITION_PARTS.items() for leaf in ("weight", "bias")
} | {"unet_attnpool.positional_embedding": "positions"}


def read(source: Path) -> dict[str, Any]:
    """The language model's configuration, and under `visual_tokenizer` sizes other than the published ones."""
    fields = read_config(source / LANGUAGE)
    sizes = source / lavit.VISUAL / "config.json"
    return fields | ({"visual_tokenizer": json.loads(sizes.read_text(encoding="utf-8"))} if sizes.is_file() else {})


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of LaVIT's repository.

    Its pictures are drawn by the Stable Diffusion in `pixel_decoding`, or by the one in the folder that the user names:
    Stable Diffusion XL (`highres_pixel_decoding`) reads codes through another decoder.

    Raises:
        ValueError: as the tokenizer's plan, or another number of rows than of text, codes and two ids.
    """
    decoding = upstream.detokenizer or upstream.folder / PIXELS
    large = _is_large(decoding) or (upstream.folder / DETOKENIZER / CONDITION).is_dir()
    codec = lavit.plan(UpstreamConfig(upstream.get("visual_tokenizer", {})), large=large)
    folder = upstream.folder / LANGUAGE
    tokenizer = upstream_tokenizer(folder if folder.is_dir() else upstream.folder)
    text_rows, size = upstream.get("text_vocab_size", TEXT_ROWS), codec.config.quantizer["size"]
    rows, padding = upstream.get("vocab_size"), tokenizer.pad_token or tokenizer.unk_token
    if rows != text_rows + 2 + size:
        raise ValueError(
            f"vocab_size is {rows}; {text_rows} text rows, 2 ids and {size} codes are {text_rows + 2 + size}."
        )
    cells = codec.config.length_policy.max_length
    shortest = FEWEST if cells > FEWEST else 1
    config = UniMMConfig(
        text_config=text_fields(upstream, "llama", padded_rows(rows + 1)),
        codec_config=codec.config.to_dict(),
        image_token_offset=text_rows + 2,
        codebook_sizes=[size],
        num_special_rows=1,
        boi_token_id=text_rows,
        eoi_token_id=text_rows + 1,
        image_token_id=rows,
        pad_token_id=token_id(tokenizer, padding),
        eos_token_id=tokenizer.eos_token_id,
        span_shapes=[{"grid": None, "prefix": [], "min_positions": shortest, "max_positions": min(cells, MOST)}],
        null_prompt_ids=[token_id(tokenizer, padding)],
        reads_features=True,
    )
    names = {text_rows: OPEN, text_rows + 1: CLOSE, rows: PLACEHOLDER}
    names |= {text_rows + 2 + code: CODE_NAME.format(code) for code in range(size)}
    write = partial(_write_large, upstream, codec) if large else _write_small
    front = Front(
        tokenizer={
            "upstream": tokenizer,
            "names": names,
            "structural": {"boi_token": OPEN, "eoi_token": CLOSE, "image_token": PLACEHOLDER},
            "max_length": upstream.get("max_position_embeddings", 4096),
            "pad_token": padding,
        },
        processor={
            "chat_template": template("lavit"),
            "num_placeholders": cells,
            "draws_from_bare_prompts": True,
        },
        sampling=SAMPLING,
        codec=codec,
        detokenizer=partial(write, decoding) if decoding.is_dir() else None,
    )
    files = (
        WeightFile(LANGUAGE, prefix=f"{LANGUAGE}."),
        WeightFile(f"{LANGUAGE}/visual_weight.bin", prefix=f"{READER}."),
        *lavit.separate_files(lavit.VISUAL, large=large),
    )
    renames = (
        *plain_renames(config.vocabulary.size, prefix=rf"{LANGUAGE}\."),
        *lavit.merger_renames(rf"{READER}\.causal_encoder", "model.reader.merger"),
        Rename(rf"{READER}\.vit_proj\.{LEAVES}", r"model.reader.project.\g<leaf>"),
    )
    return whole_plan(config, renames, front, files=files)


def _is_large(decoding: Path) -> bool:
    """Whether a folder of a diffusion model is one of Stable Diffusion XL."""
    file = decoding / "unet" / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("addition_embed_type") == "text_time"


def _write_small(source: Path, folder: Path) -> None:
    """A stock `StableDiffusionPipeline` that reads features in the place of a prompt's.

    Raises:
        FileNotFoundError: a part of it, or the features of no picture, are missing.
    """
    _write_pipeline(source, folder, "StableDiffusionPipeline", ("safety_checker",), STEPS, GUIDANCE)
    features = unpickled(source / "uncond_embeddings.bin")
    save_file({"features": features.reshape(1, *features.shape[-2:]).contiguous()}, folder / UNCONDITIONAL)


def _write_large(upstream: UpstreamConfig, codec: Plan, source: Path, folder: Path) -> None:
    """A stock `StableDiffusionXLPipeline`, and what it reads the features through.

    Raises:
        FileNotFoundError: a part of it is missing.
    """
    second = ("text_encoder_2", "tokenizer_2")
    _write_pipeline(source, folder, "StableDiffusionXLPipeline", second, LARGE_STEPS, LARGE_GUIDANCE)
    stored = unpickled(upstream.folder / LARGE_FILE)
    weights = {ours: stored[theirs] for theirs, ours in CONDITION_NAMES.items()}
    condition = PooledCondition(
        in_features=weights["positions"].shape[1],
        tokens=len(weights["positions"]) - 1,
        widths=(len(weights["first.bias"]), len(weights["second.bias"])),
        pooled_width=len(weights["pool.out.bias"]),
        num_heads=codec.config.resampler["num_heads"],
    ).to(weights["positions"].dtype)
    condition.load_state_dict(weights)
    condition.save_pretrained(folder / CONDITION)


def restore_condition(_fields: dict[str, Any], source: Path, folder: Path) -> None:
    """What Stable Diffusion XL reads through goes back into the file of its decoder."""
    if not (source / DETOKENIZER / CONDITION).is_dir():
        return
    condition = PooledCondition.from_pretrained(source / DETOKENIZER / CONDITION, dtype="auto").state_dict()
    whole = unpickled(folder / LARGE_FILE) | {theirs: condition[ours] for theirs, ours in CONDITION_NAMES.items()}
    with atomic_write(folder / LARGE_FILE) as temporary:
        torch.save(whole, temporary)


def _write_pipeline(
    source: Path, folder: Path, class_name: str, absent: tuple[str, ...], steps: int, guidance: float
) -> None:
    """A pipeline of diffusers without what reads prompts, its settings as published beside it."""
    index: dict[str, Any] = {"_class_name": class_name, "requires_safety_checker": False}
    index |= dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "image_encoder", *absent), [None] * 2)
    for part in PARTS:
        file = source / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}; LaVIT's {PIXELS} folder has {', '.join(PARTS)}.")
        shutil.copytree(source / part, folder / part)
        index[part] = ["diffusers", json.loads(file.read_text(encoding="utf-8"))["_class_name"]]
    write_json(folder / "model_index.json", index)
    write_json(folder / SETTINGS, {"num_inference_steps": steps, "guidance_scale": guidance})


SYSTEM = Upstream(
    system="lavit",
    repository="jy0205/LaVIT",
    licence="LaVIT Community License; the language model carries the LLaMA-2 licence",
    paper="arXiv 2309.04669",
    plan=plan,
    restricted=True,
    read=read,
    restore_rest=restore_condition,
)
