"""Pre-tokenised rows: pictures as codes without offset, with their words, in parquet shards.

A row has at most one picture. Its words are messages, or captions and questions that a stage makes messages of. A
rendered picture has the codes of a copy as well: readers meet pictures that were drawn, saved and sent around. A
manifest names what the shards were made from; a restart writes the missing shards only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from PIL import Image
from pyarrow.parquet import read_metadata, write_table
from tqdm import tqdm

from unimm.codec import VisualCodecModel
from unimm.codes import VisualCodes
from unimm.data.conversations import PictureTexts
from unimm.data.pictures import Mixture, to_pictures, to_pixel_values
from unimm.files import atomic_write

SHARD_ROWS = 5_000
ENCODE_BATCH = 50
JPEG_SHARE, JPEG_QUALITIES = 0.5, (60, 100)
PART = {"type": Value("string"), "text": Value("string")}
FEATURES = Features(
    {
        "codes": List(List(Value("uint32"))),
        "copy_codes": List(List(Value("uint32"))),
        "height": Value("int32"),
        "width": Value("int32"),
        "description": Value("string"),
        "captions": List(Value("string")),
        "questions": List(List(Value("string"))),
        "messages": List({"role": Value("string"), "content": List(PART)}),
        "facts": Value("string"),
        "world": Value("string"),
        "category": Value("string"),
        "fingerprint": Value("string"),
    }
)


REPORT_KEY = b"unimm"


@dataclass(frozen=True)
class ShardReport:
    """How many examples were read for some shards, and how many of them became no row, by reason."""

    seen: int
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    @classmethod
    def total(cls, reports: Iterable[ShardReport]) -> ShardReport:
        """The report of all shards together."""
        seen, skipped = 0, Counter[str]()
        for report in reports:
            seen += report.seen
            skipped.update(report.skipped)
        return cls(seen, dict(skipped.most_common()))


def write_rows(codec: VisualCodecModel, worlds: dict[str, float], *, num_rows: int, seed: int, folder: Path) -> None:
    """Render and encode `num_rows` training examples into `folder`; shards that are there already are kept.

    Raises:
        ValueError: `folder` holds rows made from something else.
    """
    fingerprint = codec.fingerprint()
    check_manifest({"worlds": worlds, "num_rows": num_rows, "seed": seed, "fingerprint": fingerprint}, folder)
    mixture = Mixture(worlds, seed=seed)
    starts = range(0, num_rows, SHARD_ROWS)
    for start in tqdm(starts, desc=f"tokenizing {num_rows} pictures", unit="shard"):
        path = folder / f"rows-{start // SHARD_ROWS:05d}.parquet"
        if path.exists():
            continue
        stop = min(start + SHARD_ROWS, num_rows)
        batches = [range(first, min(first + ENCODE_BATCH, stop)) for first in range(start, stop, ENCODE_BATCH)]
        rows = [row for batch in batches for row in _encode(codec, mixture, batch, fingerprint)]
        write_shard(rows, path, ShardReport(len(rows)))


def write_shard(rows: Sequence[Mapping[str, Any]], path: Path, report: ShardReport) -> None:
    """Write rows, whose missing columns are null, and the report into one file at once."""
    columns = {name: [row.get(name) for row in rows] for name in FEATURES}
    table = Dataset.from_dict(columns, features=FEATURES).data.table
    metadata = {**(table.schema.metadata or {}), REPORT_KEY: json.dumps(asdict(report)).encode()}
    with atomic_write(path) as temporary:
        write_table(table.replace_schema_metadata(metadata), temporary)


def read_report(path: Path) -> ShardReport:
    """The report in a shard."""
    return ShardReport(**json.loads(read_metadata(path).metadata[REPORT_KEY]))


def read_rows(folder: Path, codec: VisualCodecModel) -> Dataset:
    """The rows of a folder.

    Raises:
        ValueError: no rows, some that are still missing, or rows of another codec.
    """
    files = sorted(str(path) for path in folder.glob("rows-*.parquet") if read_metadata(path).num_rows)
    if not files:
        raise ValueError(
            f"{folder} holds no rows; write them first (unimm tokenize, or a pretrain stage that names worlds)."
        )
    _check_whole(folder)
    rows = load_dataset("parquet", data_files=files, split="train")
    found, wanted = rows.unique("fingerprint"), codec.fingerprint()
    if found != [wanted]:
        raise ValueError(
            f"The rows in {folder} were made by codec {', '.join(map(str, found))}, this one is {wanted}; their codes "
            "mean other pictures. Delete the folder and tokenize again."
        )
    return rows


def row_pictures(row: Mapping[str, Any], *, copied: bool = False) -> list[VisualCodes]:
    """The picture of a row, or none.

    Args:
        row: of a shard.
        copied: take the codes of the picture's copy where the row has them.

    Raises:
        ValueError: another number of codes than its height and width have cells.
    """
    if not row["codes"]:
        return []
    shown = (copied and row.get("copy_codes")) or row["codes"]
    return [VisualCodes.from_record({"codes": shown, "height": row["height"], "width": row["width"]})]


def sent_around(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as it is, or saved as JPEG."""
    if rng.random() >= JPEG_SHARE:
        return picture
    file = BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(*JPEG_QUALITIES)))
    return Image.open(file).convert("RGB")


def check_manifest(made_from: Mapping[str, Any], folder: Path) -> None:
    """Name what a folder's shards are made from, or check it.

    Raises:
        ValueError: `folder` holds rows made from something else.
    """
    path = folder / "manifest.json"
    if path.exists():
        if json.loads(path.read_text()) != made_from:
            raise ValueError(
                f"{folder} holds rows of another recipe or codec, or of another source; delete it, or name another."
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(made_from, indent=2) + "\n")


def row_texts(row: Mapping[str, Any]) -> PictureTexts:
    """What is said about the picture of a row; without a description of its own, the first caption is one."""
    captions = row["captions"] or []
    description = row["description"] or next(iter(captions), "")
    return PictureTexts(description, captions, [(question, answer) for question, answer in row["questions"] or []])


def _check_whole(folder: Path) -> None:
    """Raise `ValueError` where parts of a source have no last shard yet, which is the one that is not full."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else {}
    if "units" not in manifest:
        return
    ended = {
        shard.name.split("-")[1]
        for shard in folder.glob("rows-*.parquet")
        if read_report(shard).seen < manifest["shard_rows"]
    }
    if len(ended) < manifest["units"]:
        raise ValueError(
            f"{folder} has {len(ended)} of {manifest['units']} parts of {manifest['source']['path']}; run unimm "
            "tokenize again, which goes on with what is missing."
        )


def _copy_codes(
    codec: VisualCodecModel, codes: VisualCodes, rngs: Sequence[np.random.Generator]
) -> list[list[list[int]]]:
    """Codes `[B][N][K]` of the pictures that the codec makes of codes; empty where it makes none."""
    if not codec.config.draws_pixels:
        return [[] for _ in rngs]
    pictures = to_pictures(codec.pictures(codes))
    copies = [np.asarray(sent_around(picture, rng)) for picture, rng in zip(pictures, rngs, strict=True)]
    again = codec.encode(to_pixel_values(np.stack(copies)).to(codec.device))
    return [again.record(index)["codes"] for index in range(len(again))]


def _encode(codec: VisualCodecModel, mixture: Mixture, indices: Sequence[int], fingerprint: str) -> list[dict]:
    examples = [mixture.example(index) for index in indices]
    pixels = to_pixel_values(np.stack([np.asarray(example.image) for _, example in examples]))
    codes = codec.encode(pixels.to(codec.device))
    copies = _copy_codes(codec, codes, [np.random.default_rng([mixture.seed, 1, index]) for index in indices])
    return [
        {
            **codes.record(position),
            "copy_codes": copies[position],
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
