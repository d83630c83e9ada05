"""What the language stages read: conversations about rows, drawn from a mixture, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from unimm.codec import VisualCodecModel
from unimm.data.conversations import Message, TaskRates, converse
from unimm.data.rows import read_rows, row_pictures, row_texts
from unimm.sequence import IGNORED_LABEL, UniMMProcessor

Item = dict[str, list[int]]


@dataclass(frozen=True)
class RowsConfig:
    """Pre-tokenised rows: of folders that `unimm tokenize` wrote, or of the rendered worlds.

    Args:
        sources: folders of rows to their weights in the mixture.
        worlds: world names to their weights; rows are written into `folder` where they are missing.
        folder, num_rows, seed: of the worlds' rows.

    Raises:
        ValueError: neither sources nor worlds, or both, or no positive weight.
    """

    sources: dict[str, float] = field(default_factory=dict)
    worlds: dict[str, float] = field(default_factory=dict)
    folder: str = "runs/tiny-rows"
    num_rows: int = 60_000
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.sources) == bool(self.worlds):
            raise ValueError(
                f"data.sources are {self.sources} and data.worlds {self.worlds}; name folders of rows, or worlds."
            )
        if self.sources and (min(self.sources.values()) < 0 or sum(self.sources.values()) <= 0):
            raise ValueError(f"data.sources are {self.sources}; give positive weights to some of them.")

    @property
    def weights(self) -> dict[str, float]:
        """Folders to their weights."""
        return self.sources or {self.folder: 1.0}


class ConversationDataset(torch.utils.data.Dataset):
    """Row and task of item i are pure functions of the seed and i, so that a resumed run goes on exactly.

    An item is one conversation; with `pack_length` it is as many as fit into that many tokens, where the first that
    does not fit is dropped.

    Args:
        rows: folders of rows, with their weights.
        processor: turns messages into ids.
        tasks: of rows that have captions; rows with messages are taken as they are. Pictures that a user shows are
            copies at its rate, where a row has one.
        answers_only: learn the assistant's turns only.
        pack_length: tokens per item, or None.
        seed: of the order.
        length: items.
    """

    def __init__(
        self,
        rows: Sequence[tuple[Dataset, float]],
        processor: UniMMProcessor,
        *,
        tasks: TaskRates,
        answers_only: bool,
        pack_length: int | None,
        seed: int,
        length: int,
    ) -> None:
        self.rows = [part for part, _ in rows]
        weights = np.array([weight for _, weight in rows])
        self.shares = weights / weights.sum()
        self.processor, self.tasks, self.answers_only = processor, tasks, answers_only
        self.pack_length, self.seed, self.length = pack_length, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Item]:
        rng = np.random.default_rng([self.seed, 1, index])
        if self.pack_length is None:
            return [self._conversation(rng)]
        taken: list[Item] = []
        left = self.pack_length
        while len((item := self._conversation(rng))["input_ids"]) <= left:
            taken.append(item)
            left -= len(item["input_ids"])
        if not taken:
            raise ValueError(
                f"A conversation has {len(item['input_ids'])} tokens; pack_length is {self.pack_length}, so that it "
                "never fits. Raise pack_length, or leave long conversations out of the rows."
            )
        return taken

    def _conversation(self, rng: np.random.Generator) -> Item:
        rows = self.rows[rng.choice(len(self.rows), p=self.shares)]
        row = rows[int(rng.integers(len(rows)))]
        messages = row_messages(row, self.tasks, rng)
        copied = shows_picture(messages) and rng.random() < self.tasks.copied
        encoded = self.processor.encode_messages(
            messages, row_pictures(row, copied=copied), answers_only=self.answers_only
        )
        return {"input_ids": encoded.input_ids, "labels": encoded.labels}


@dataclass(frozen=True)
class PadRight:
    """Batches of unequal rows; causal attention needs no mask for padding on the right."""

    pad_token_id: int

    def __call__(self, items: Sequence[Sequence[Item]]) -> dict[str, torch.Tensor]:
        flat = list(chain.from_iterable(items))
        length = max(len(item["input_ids"]) for item in flat)
        ids = torch.full((len(flat), length), self.pad_token_id)
        labels = torch.full((len(flat), length), IGNORED_LABEL)
        for row, item in enumerate(flat):
            ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
            labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class PackInOneRow:
    """All conversations of a batch in one row without padding, isolated by positions that begin anew.

    transformers reads the boundaries off the positions, for every kind of attention, as long as there is no cache.
    """

    def __call__(self, items: Sequence[Sequence[Item]]) -> dict[str, torch.Tensor]:
        return DataCollatorWithFlattening(return_tensors="pt")(list(chain.from_iterable(items)))


def row_messages(row: dict[str, Any], tasks: TaskRates, rng: np.random.Generator) -> list[Message]:
    """The messages of a row, or some that are made of its captions and questions."""
    if row.get("messages"):
        return row["messages"]
    return converse(row_texts(row), tasks, rng)


def shows_picture(messages: Sequence[Message]) -> bool:
    """Whether a picture is there to be read, and not to be drawn."""
    return any(
        message["role"] == "user" and any(part["type"] == "image" for part in message["content"])
        for message in messages
        if not isinstance(message["content"], str)
    )


def open_mixture(config: RowsConfig, codec: VisualCodecModel) -> list[tuple[Dataset, float]]:
    """The rows of every folder, with their weights.

    Raises:
        ValueError: a folder without rows, or of another codec.
    """
    return [(read_rows(Path(folder), codec), weight) for folder, weight in config.weights.items()]
