"""Tar: a plain Qwen2 whose vocabulary ends with the codes of TA-Tok, at three lengths that a token names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unimm.conversion.maps import tar
from unimm.conversion.text import PLACEHOLDER, first_code, template, token_id, upstream_tokenizer
from unimm.conversion.upstream import Plan, Upstream, UpstreamConfig, WeightFile, read_config
from unimm.conversion.whole import Front, padded_rows, plain_renames, stock_detokenizer, text_fields, whole_plan
from unimm.unified import UniMMConfig

CODE_NAME, SIZE_NAME = "<I{}>", "<S{}>"
OPEN, CLOSE = "<im_start>", "<im_end>"
SYSTEM_PROMPT = "You are a helpful assistant."
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "top_k": 1200}
STEPS, GUIDANCE = 20, 4.0  # of the release, the second


def read(source: Path) -> dict[str, Any]:
    """The language model's configuration, and the tokenizer's as its file holds it under `visual_tokenizer`."""
    fields = read_config(source)
    if "visual_tokenizer" not in fields and (source / tar.CODEC_FILE).is_file():
        fields["visual_tokenizer"] = {"args": tar.stored_args(source)}
    return fields


def restore_sizes(fields: dict[str, Any], _source: Path, folder: Path) -> None:
    """Put the tokenizer's sizes back into its file, beside the weights."""
    tar.restore_args(fields["visual_tokenizer"]["args"], folder)


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of a Tar folder with `ta_tok.pth` in it.

    Raises:
        ValueError: as the tokenizer's plan, or codes that are not the text tokenizer's.
    """
    codec = tar.plan(UpstreamConfig(upstream.get("visual_tokenizer")))
    tokenizer, rows = upstream_tokenizer(upstream.folder), upstream.get("vocab_size")
    size = codec.config.quantizer["size"]
    offset = first_code(tokenizer, CODE_NAME, size, rows)
    policy = codec.config.length
    grids = [[policy["rows"] // pool, policy["columns"] // pool] for pool in policy["pools"]]
    sizes = [SIZE_NAME.format(scale) for scale in range(len(grids))]
    end_of_turn, padding = token_id(tokenizer, "<|im_end|>"), tokenizer.pad_token or "<|endoftext|>"
    config = UniMMConfig(
        text_config=text_fields(upstream, "qwen2", padded_rows(rows + 1)),
        codec_config=codec.config.to_dict(),
        image_token_offset=offset,
        codebook_sizes=[size],
        num_special_rows=rows - offset - size + 1,
        boi_token_id=token_id(tokenizer, OPEN),
        eoi_token_id=token_id(tokenizer, CLOSE),
        image_token_id=rows,
        pad_token_id=token_id(tokenizer, padding),
        eos_token_id=end_of_turn,
        span_shapes=[
            {"grid": grid, "prefix": [token_id(tokenizer, name)], "min_positions": length, "max_positions": length}
            for grid, name in zip(grids, sizes, strict=True)
            for length in [grid[0] * grid[1]]
        ],
        default_grid=grids[0],
        null_prompt_ids=[token_id(tokenizer, padding)],
    )
    names = {offset + code: CODE_NAME.format(code) for code in range(size)} | {rows: PLACEHOLDER}
    names |= {token_id(tokenizer, token): token for token in (OPEN, CLOSE, *sizes)}
    front = Front(
        tokenizer={
            "upstream": tokenizer,
            "names": names,
            "structural": {
                "boi_token": OPEN,
                "eoi_token": CLOSE,
                "image_token": PLACEHOLDER,
                **{f"size_{scale}_token": name for scale, name in enumerate(sizes)},
            },
            "max_length": upstream.get("max_position_embeddings", 32768),
            "pad_token": padding,
        },
        processor={
            "chat_template": template(
                "chatml", default_system=SYSTEM_PROMPT, before_picture=OPEN + sizes[0], after_picture=CLOSE
            ),
            "frames_pictures": False,  # upstream's prompts hold the codes alone
        },
        sampling=SAMPLING,
        codec=codec,
        detokenizer=stock_detokenizer(upstream, "SanaPipeline", steps=STEPS, guidance=GUIDANCE),
    )
    files = (WeightFile(), WeightFile(tar.CODEC_FILE, inside=(tar.CODEC_KEYS,)))
    tied = upstream.get("tie_word_embeddings", False)
    return whole_plan(config, plain_renames(config.vocabulary.size, tied=tied), front, files=files, tied=tied)


SYSTEM = Upstream(
    system="tar",
    repository="csuhan/Tar",
    licence="Apache-2.0 according to the README, no licence file",
    paper="arXiv 2506.18898",
    plan=plan,
    restricted=True,
    read=read,
    restore_rest=restore_sizes,
)
