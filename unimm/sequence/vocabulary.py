"""One row space for text and pictures: text rows first, then one contiguous block of code rows.

Codes become ids by adding an offset. They are never tokens of the text tokenizer: 131,072 added tokens cost seconds per
load and would let user text spell a picture.
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
        codebook_size: code rows.
        boi_token_id: opens a picture.
        eoi_token_id: closes a picture.
        image_token_id: stands in a prompt for a code that the model has yet to compute.
        pad_token_id: fills batches.

    Raises:
        ValueError: a structural id outside the text rows, or two of them equal.
    """

    image_token_offset: int
    codebook_size: int
    boi_token_id: int
    eoi_token_id: int
    image_token_id: int
    pad_token_id: int

    def __post_init__(self) -> None:
        structural = (self.boi_token_id, self.eoi_token_id, self.image_token_id)
        if len(set(structural)) < 3 or not all(
            0 <= i < self.image_token_offset for i in (*structural, self.pad_token_id)
        ):
            raise ValueError(
                f"boi, eoi and image ids are {structural}, pad is {self.pad_token_id}; they must be different text "
                f"rows, below image_token_offset = {self.image_token_offset}."
            )
        if self.codebook_size < 1:
            raise ValueError(f"codebook_size is {self.codebook_size}; it must be positive.")

    @property
    def image_token_end(self) -> int:
        """One past the last code row."""
        return self.image_token_offset + self.codebook_size

    @property
    def size(self) -> int:
        """Rows of the embedding and of the head, a multiple of 128; those past `image_token_end` mean nothing."""
        return -(-self.image_token_end // ROW_MULTIPLE) * ROW_MULTIPLE

    def to_token_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of any shape to ids.

        Raises:
            ValueError: a code outside the codebook.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"Codes range over [{int(codes.min())}, {int(codes.max())}]; "
                f"the codebook has 0 to {self.codebook_size - 1}."
            )
        return codes + self.image_token_offset

    def to_codes(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Ids of code rows to codes.

        Raises:
            ValueError: an id that is no code.
        """
        if not bool(self.is_code(token_ids).all()):
            raise ValueError(
                f"Some ids are no picture codes; those are {self.image_token_offset} to {self.image_token_end - 1}."
            )
        return token_ids - self.image_token_offset

    def is_code(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Where ids are codes, bool of the same shape."""
        return (token_ids >= self.image_token_offset) & (token_ids < self.image_token_end)
