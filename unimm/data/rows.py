"""Pre-tokenised rows: pictures as codes without offset, with their words, in parquet shards.

A manifest names what the shards were made from; a restart writes the missing shards only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from pyarrow.parquet import read_metadata
from tqdm import tqdm

from unimm.codec import VisualCodecModel
from unimm.codes import VisualCodes
from unimm.data.conversations import PictureTexts
from unimm.data.pictures import Mixture, to_pixel_values
from unimm.files import atomic_write

SHARD_ROWS = 5_000
ENCODE_BATCH = 50
FEATURES = Features(
    {
        "codes": List(List(Value("uint32"))),
        "height": Value("int32"),
        "width": Value("int32"),
        "description": Value("string"),
        "captions": List(Value("string")),
        "questions": List(List(Value("string"))),
        "facts": Value("string"),
        "world": Value("string"),
        "category": Value("string"),
        "fingerprint": Value("string"),
    }
)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made from."""

    worlds: dict[str, float]
    num_rows: int
    seed: int
    fingerprint: str


def write_rows(codec: VisualCodecModel, worlds: dict[str, float], *, num_rows: int, seed: int, folder: Path) -> None:
    """Render and encode `num_rows` training examples into `folder`; shards that are there already are kept.

    Raises:
        ValueError: `folder` holds rows made from something else.
    """
    manifest = Manifest(worlds, num_rows, seed, codec.fingerprint())
    _check_manifest(manifest, folder)
    mixture = Mixture(worlds, seed=seed)
    starts = range(0, num_rows, SHARD_ROWS)
    for start in tqdm(starts, desc=f"tokenizing {num_rows} pictures", unit="shard"):
        path = folder / f"rows-{start // SHARD_ROWS:05d}.parquet"
        if path.exists():
            continue
        stop = min(start + SHARD_ROWS, num_rows)
        batches = [range(first, min(first + ENCODE_BATCH, stop)) for first in range(start, stop, ENCODE_BATCH)]
        rows = [row for batch in batches for row in _encode(codec, mixture, batch, manifest.fingerprint)]
        with atomic_write(path) as temporary:
            Dataset.from_list(rows, features=FEATURES).to_parquet(str(temporary))


def read_rows(folder: Path, codec: VisualCodecModel) -> Dataset:
    """The rows of a folder.

    Raises:
        ValueError: no rows, or rows of another codec.
    """
    files = sorted(str(path) for path in folder.glob("rows-*.parquet") if read_metadata(path).num_rows)
    if not files:
        raise ValueError(f"{folder} holds no rows; write them first (the pretrain stage does, or `unimm train`).")
    rows = load_dataset("parquet", data_files=files, split="train", features=FEATURES)
    found = rows[0]["fingerprint"]
    if found != codec.fingerprint():
        raise ValueError(
            f"The rows in {folder} were made by codec {found}, this one is {codec.fingerprint()}; their codes mean "
            "other pictures. Delete the folder and tokenize again."
        )
    return rows


def row_codes(row: dict) -> VisualCodes:
    """The picture of a row."""
    ids = torch.tensor(row["codes"], dtype=torch.int64)  # [N, K]
    return VisualCodes.from_grid(ids.view(1, row["height"], row["width"], -1))


def row_texts(row: dict) -> PictureTexts:
    """What is said about the picture of a row."""
    return PictureTexts(row["description"], row["captions"], [tuple(pair) for pair in row["questions"]])


def _encode(codec: VisualCodecModel, mixture: Mixture, indices: Sequence[int], fingerprint: str) -> list[dict]:
    examples = [mixture.example(index) for index in indices]
    pixels = to_pixel_values(np.stack([np.asarray(example.image) for _, example in examples]))
    codes = codec.encode(pixels.to(codec.device))
    assert codes.grid is not None
    return [
        {
            "codes": codes.ids[position].tolist(),
            "height": codes.grid[position][0],
            "width": codes.grid[position][1],
            "description": example.description,
            "captions": list(example.captions),
            "questions": [list(pair) for pair in example.questions],
            "facts": example.facts.to_json(),
            "world": world,
            "category": example.category,
            "fingerprint": fingerprint,
        }
        for position, (world, example) in enumerate(examples)
    ]


def _check_manifest(manifest: Manifest, folder: Path) -> None:
    path = folder / "manifest.json"
    if path.exists():
        if json.loads(path.read_text()) != asdict(manifest):
            raise ValueError(f"{folder} holds rows of another recipe or codec; delete it or name another folder.")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
