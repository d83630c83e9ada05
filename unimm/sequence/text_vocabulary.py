"""A small text vocabulary learned from captions, for models that start from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = {
    "pad_token": "<|pad|>",
    "eos_token": "<|end|>",
    "user_token": "<|user|>",
    "assistant_token": "<|assistant|>",
    "system_token": "<|system|>",
    "boi_token": "<|boi|>",
    "eoi_token": "<|eoi|>",
    "image_token": "<|image|>",
}
# Capitals and digits stand alone, so that a written word is spelled letter by letter; other words keep their leading
# space.
PIECES = Regex(r"[A-Z]|[0-9]| ?[^\sA-Z0-9\W]+| ?[^\s\w]+|\s+")


def train_text_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` rows, the structural specials included; any text round-trips.

    Args:
        texts: what the model will read and write.
        vocab_size: rows; fewer where the texts hold fewer merges.
        max_length: tokens that the model takes at most.

    Raises:
        ValueError: fewer rows than bytes and specials.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise ValueError(
            f"vocab_size is {vocab_size}; {len(alphabet)} bytes and {len(SPECIALS)} structural tokens need at least "
            f"{len(alphabet) + len(SPECIALS)} rows."
        )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(PIECES, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    named = {name: token for name, token in SPECIALS.items() if name not in ("pad_token", "eos_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS["pad_token"],
        eos_token=SPECIALS["eos_token"],
        extra_special_tokens=named,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
