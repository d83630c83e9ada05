"""One row space for text and pictures: text rows, one contiguous block of code rows, special rows where there are any.

Codes become ids by adding an offset; where a position has K codes, the block holds one codebook after the other and a
position becomes K ids in a row. They are never tokens of the text tokenizer: 131,072 added tokens cost seconds per
load and would let user text spell a picture. Structural ids are text rows, or special rows after the codes where a
published model has them there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_MULTIPLE = 128


@dataclass(frozen=True)
class VisualVocabulary:
    """Which row of the embedding and of the head means what.

    Args:
        image_token_offset: row of code 0; every row below belongs to text.
        codebook_sizes: code rows of each of the K slots of a position.
        boi_token_id: opens a picture.
        eoi_token_id: closes a picture.
        image_token_id: stands in a prompt for a code that the model has yet to compute.
        pad_token_id: fills batches.
        num_special_rows: rows right after the codes that structural ids may take.

    Raises:
        ValueError: a structural id outside the text and special rows, or two of them equal.
    """

    image_token_offset: int
    codebook_sizes: tuple[int, ...]
    boi_token_id: int
    eoi_token_id: int
    image_token_id: int
    pad_token_id: int
    num_special_rows: int = 0

    def __post_init__(self) -> None:
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(
                f"codebook_sizes are {self.codebook_sizes}; name one positive size per slot. A codec of continuous "
                "latents has none, and no language model of codes reads it."
            )
        if self.num_special_rows < 0:
            raise ValueError(f"num_special_rows is {self.num_special_rows}; it must be 0 or more.")
        structural = (self.boi_token_id, self.eoi_token_id, self.image_token_id)
        text, special = range(self.image_token_offset), range(self.image_token_end, self.special_token_end)
        legal = all(i in text or i in special for i in structural) and self.pad_token_id in text
        if len(set(structural)) < 3 or not legal:
            allowed = f", or special rows, {special.start} to {special.stop - 1}" if special else ""
            raise ValueError(
                f"boi, eoi and image ids are {structural}, pad is {self.pad_token_id}; they must be different text "
                f"rows, below image_token_offset = {self.image_token_offset}{allowed}."
            )

    @property
    def num_codebooks(self) -> int:
        """K."""
        return len(self.codebook_sizes)

    @property
    def image_token_end(self) -> int:
        """One past the last code row."""
        return self.image_token_offset + sum(self.codebook_sizes)

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Rows of each slot's codes."""
        starts = [self.image_token_offset + sum(self.codebook_sizes[:slot]) for slot in range(self.num_codebooks)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.codebook_sizes, strict=True))

    @property
    def special_token_end(self) -> int:
        """One past the last special row."""
        return self.image_token_end + self.num_special_rows

    @property
    def text_blocks(self) -> tuple[slice, ...]:
        """Rows of what may stand outside pictures: the text rows, and the special rows where there are any."""
        special = (slice(self.image_token_end, self.special_token_end),) if self.num_special_rows else ()
        return (slice(0, self.image_token_offset), *special)

    @property
    def size(self) -> int:
        """Rows of the embedding and of the head, a multiple of 128; those past `special_token_end` mean nothing."""
        return -(-self.special_token_end // ROW_MULTIPLE) * ROW_MULTIPLE

    def to_token_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[..., K]` to ids of the same shape.

        Raises:
            ValueError: another K, or a code outside its codebook.
        """
        starts, sizes = self._starts(codes), codes.new_tensor(self.codebook_sizes)
        if not bool(((codes >= 0) & (codes < sizes)).all()):
            raise ValueError(
                f"Codes range over [{int(codes.min())}, {int(codes.max())}]; the codebooks have 0 to "
                f"{', '.join(str(size - 1) for size in self.codebook_sizes)}."
            )
        return codes + starts

    def to_codes(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Ids `[..., K]` of code rows to codes of the same shape.

        Raises:
            ValueError: another K, or an id that is no code of its slot.
        """
        codes = token_ids - self._starts(token_ids)
        if not bool(((codes >= 0) & (codes < codes.new_tensor(self.codebook_sizes))).all()):
            ranges = ", ".join(f"{block.start} to {block.stop - 1}" for block in self.blocks)
            raise ValueError(f"Some ids are no picture codes; those of the slots are {ranges}.")
        return codes

    def _starts(self, like: torch.Tensor) -> torch.Tensor:
        if not like.ndim or like.shape[-1] != self.num_codebooks:
            raise ValueError(f"The last dimension of {tuple(like.shape)} must be the {self.num_codebooks} slots.")
        return like.new_tensor([block.start for block in self.blocks])

    def is_visual(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Where ids are codes or special rows, bool of the same shape: what vision-only layers work on."""
        return token_ids >= self.image_token_offset
