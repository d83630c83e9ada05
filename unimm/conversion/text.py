"""The text tokenizer of a published system, over every row of its model.

Upstream adds its codes to the tokenizer as tokens, which makes it slow to load and lets user text spell a picture. Here
they, and rows that no token has, are entries of the vocabulary that no merge leads to: every id has a name, and text
becomes none of them. Only the ids that structure a sequence are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PLACEHOLDER = "<|image|>"
TEMPLATES = Path(__file__).parent / "templates"


def upstream_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Upstream's tokenizer.

    Raises:
        ValueError: the folder has none that the tokenizers library reads.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{folder} has no text tokenizer that can be read ({' '.join(str(error).split())[:200]}); put upstream's "
            "tokenizer.json and tokenizer_config.json there."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer in {folder} has no tokenizer.json; save it as a fast one.")
    return tokenizer


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token.

    Raises:
        ValueError: the tokenizer does not know it.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"The text tokenizer has no token {token!r}; is it the one of this system?")
    return found


def first_code(tokenizer: PreTrainedTokenizerBase, name: str, size: int, rows: int) -> int:
    """The row of the first of `size` codes, which the tokenizer calls `name` with their numbers in it.

    Raises:
        ValueError: names that do not follow each other, or reach beyond the `rows` of the language model.
    """
    offset = token_id(tokenizer, name.format(0))
    if token_id(tokenizer, name.format(size - 1)) != offset + size - 1 or rows < offset + size:
        raise ValueError(
            f"{size} codes from row {offset} on are not those of the text tokenizer, or not of {rows} rows; convert "
            "the tokenizers that came with this language model."
        )
    return offset


def tokenizer_of_rows(
    upstream: PreTrainedTokenizerBase,
    *,
    names: Mapping[int, str],
    structural: Mapping[str, str],
    rows: int,
    max_length: int,
    pad_token: str,
) -> PreTrainedTokenizerFast:
    """Upstream's tokenizer with a name for every row.

    Args:
        upstream: the tokenizer.
        names: of rows that are its tokens no longer, or never were.
        structural: attribute and token of the ids that structure a sequence, `boi_token`, `eoi_token` and `image_token`
            among them.
        rows: of the model.
        max_length: tokens that the model takes.
        pad_token: one of upstream's.
    """
    state = json.loads(upstream.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise ValueError(
            f"The text tokenizer is a {state['model']['type']} model; only BPE ones take rows of pictures."
        )
    tokens = set(structural.values())
    added = [entry for entry in state["added_tokens"] if entry["id"] not in names and entry["content"] not in tokens]
    vocabulary |= {entry["content"]: entry["id"] for entry in state["added_tokens"]}
    renamed = set(names.values())
    vocabulary = {token: row for token, row in vocabulary.items() if row not in names and token not in renamed}
    vocabulary |= {name: row for row, name in names.items()}
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused-{row}>": row for row in range(rows) if row not in taken}
    state["model"]["vocab"] = vocabulary
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added += [{"id": vocabulary[token], "content": token, **flags} for token in structural.values()]
    state["added_tokens"] = sorted(added, key=lambda entry: entry["id"])
    special = {
        name: getattr(upstream, name)
        for name in ("bos_token", "eos_token", "unk_token")
        if getattr(upstream, name) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=pad_token,
        extra_special_tokens=dict(structural),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **special,
    )


def template(name: str, **settings: str) -> str:
    """A chat template, with variables set before it."""
    lines = [f"{{%- set {key} = {json.dumps(value)} -%}}" for key, value in settings.items()]
    return "\n".join([*lines, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")])
