"""SEED-LLaMA: a plain LLaMA whose vocabulary ends with the codes and the two ids around a picture."""

from __future__ import annotations

from functools import partial

from unimm.conversion.maps import seed
from unimm.conversion.text import PLACEHOLDER, first_code, template, token_id, upstream_tokenizer
from unimm.conversion.upstream import Plan, Upstream, UpstreamConfig, WeightFile
from unimm.conversion.whole import Front, padded_rows, plain_renames, stock_detokenizer, text_fields, whole_plan
from unimm.unified import UniMMConfig

CODE_NAME = "<img_{:05d}>"
OPEN, CLOSE = "<img>", "</img>"
SAMPLING = {"temperature": 1.0, "top_p": 0.5, "top_k": 50}
STEPS, GUIDANCE = 20, 10.0
QUANTIZER_FILE = "seed_quantizer.pt"


def plan(upstream: UpstreamConfig, *, prompts: str) -> Plan:
    """The plan of a SEED-LLaMA folder with `seed_quantizer.pt` in it.

    Args:
        upstream: the configuration of the language model; `visual_tokenizer` in it holds sizes of the tokenizer other
            than the published ones.
        prompts: name of the chat template.

    Raises:
        ValueError: as the tokenizer's plan, or codes that are not the text tokenizer's.
    """
    codec = seed.plan(UpstreamConfig(upstream.get("visual_tokenizer", {})))
    tokenizer, rows = upstream_tokenizer(upstream.folder), upstream.get("vocab_size")
    size = codec.config.quantizer["size"]
    offset = first_code(tokenizer, CODE_NAME, size, rows)
    padding, tokens = tokenizer.pad_token or tokenizer.unk_token, codec.config.resampler["tokens"]
    config = UniMMConfig(
        text_config=text_fields(upstream, "llama", padded_rows(rows + 1)),
        codec_config=codec.config.to_dict(),
        image_token_offset=offset,
        codebook_sizes=[size],
        num_special_rows=rows - offset - size + 1,
        boi_token_id=token_id(tokenizer, OPEN),
        eoi_token_id=token_id(tokenizer, CLOSE),
        image_token_id=rows,
        pad_token_id=token_id(tokenizer, padding),
        eos_token_id=tokenizer.eos_token_id,
        span_shapes=[{"grid": None, "prefix": [], "min_positions": tokens, "max_positions": tokens}],
        null_prompt_ids=[token_id(tokenizer, padding)],
    )
    names = {offset + code: CODE_NAME.format(code) for code in range(size)}
    names |= {config.boi_token_id: OPEN, config.eoi_token_id: CLOSE, rows: PLACEHOLDER}
    front = Front(
        tokenizer={
            "upstream": tokenizer,
            "names": names,
            "structural": {"boi_token": OPEN, "eoi_token": CLOSE, "image_token": PLACEHOLDER},
            "max_length": upstream.get("max_position_embeddings", 2048),
            "pad_token": padding,
        },
        processor={"chat_template": template(prompts), "num_placeholders": tokens},
        sampling=SAMPLING,
        codec=codec,
        detokenizer=stock_detokenizer(upstream, "StableUnCLIPImg2ImgPipeline", steps=STEPS, guidance=GUIDANCE),
    )
    files = (WeightFile(), WeightFile(QUANTIZER_FILE))
    return whole_plan(config, plain_renames(config.vocabulary.size), front, files=files)


REPOSITORY, PAPER = "AILab-CVC/SEED", "arXiv 2310.01218"
LICENCE = (
    "LLaMA-2 licence (8B: LLaMA's, through Vicuna); the tokenizer Apache-2.0 with a clause that limits use to research"
)
SEED_LLAMA_8B = Upstream(
    system="seed_llama_8b",
    repository=REPOSITORY,
    licence=LICENCE,
    paper=PAPER,
    plan=partial(plan, prompts="seed_vicuna"),
    restricted=True,
    aliases=("seed_llama",),
)
SEED_LLAMA_14B = Upstream(
    system="seed_llama_14b",
    repository=REPOSITORY,
    licence=LICENCE,
    paper=PAPER,
    plan=partial(plan, prompts="seed_llama_2"),
    restricted=True,
)
