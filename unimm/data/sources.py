"""Pictures of any source that `datasets` reads, turned into rows by a codec.

The work is cut into units that depend on the source only, and a unit into shards of a fixed number of examples, each
written at once. So any number of processes can share the work, and a restart with another number of them goes on with
what is missing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image as ImageFeature
from datasets import IterableDataset, load_dataset
from PIL.Image import DecompressionBombError
from tqdm import tqdm
from transformers import AutoConfig

from unimm.codec import VisualCodecImageProcessor, VisualCodecModel
from unimm.config import did_you_mean
from unimm.data.conversations import Message
from unimm.data.rows import ENCODE_BATCH, SHARD_ROWS, ShardReport, check_manifest, read_report, write_shard
from unimm.sequence import UniMMProcessor
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration

MAX_UNITS = 4_096  # a folder of pictures streams as one shard per picture
UNREADABLE = (OSError, SyntaxError, ValueError, DecompressionBombError)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Source:
    """Pictures with their words.

    Args:
        path: a name on the Hub; a folder of pictures, of parquet files or of WebDataset tars; or one such file.
        config, split: of the data set.
        image: column of the pictures.
        text: column of captions; `json.caption` is a field of a column.
        messages: column of chat messages, with one image part where there is a picture; beside it no column of pictures
            is needed.
        streaming: read in order, without a copy in the cache of `datasets`.
    """

    path: str
    config: str | None = None
    split: str = "train"
    image: str = "image"
    text: str | None = None
    messages: str | None = None
    streaming: bool = False


@dataclass(frozen=True)
class _Job:
    source: Source
    codec: str
    folder: Path
    device: str | None


class _Skipped(Exception):
    """An example that becomes no row, with the reason."""


def tokenize_source(
    source: Source,
    codec: str | Path,
    folder: Path,
    *,
    device: str | None = None,
    num_proc: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> ShardReport:
    """Write this process's share of a source into `folder` as rows; what is there already is kept.

    Args:
        codec: folder or Hub name of a codec, or of a unified model with one.
        device: where the codec runs; None for each process's accelerator where there is one.
        num_proc: processes to start here.
        rank, world_size: this process among those that share the work, on any machines with a common `folder`.

    Returns:
        What all shards in `folder` were made from, those of other processes included.

    Raises:
        ValueError: an empty source, a column that it does not have, a folder of other rows, no process, or no readable
            picture.
    """
    if num_proc < 1:
        raise ValueError(f"--num-proc is {num_proc}; start one process or more.")
    if source.text and source.messages:
        raise ValueError(f"Both text ({source.text!r}) and messages ({source.messages!r}) are named; a row has one.")
    job = _Job(source, str(codec), folder, device)
    num_units = len_units(open_source(source))
    made_from = {"source": asdict(source), "units": num_units, "shard_rows": SHARD_ROWS}
    check_manifest({**made_from, "fingerprint": load_codec(job.codec, job.device)[0].fingerprint()}, folder)
    units = range(rank, num_units, world_size)
    work = partial(_tokenize_unit, job)
    if num_proc == 1:
        for unit in tqdm(units, desc="tokenizing", unit="part"):
            work(unit)
    else:
        with ProcessPoolExecutor(num_proc, get_context("spawn"), _end_with, (os.getpid(),)) as pool:
            list(tqdm(pool.map(work, units), total=len(units), desc="tokenizing", unit="part"))
    total = ShardReport.total(read_report(path) for path in folder.glob("rows-*.parquet"))
    if total.seen and total.num_skipped == total.seen and world_size == 1:
        raise ValueError(f"{source.path} has {total.seen} examples, none of which became a row: {total.skipped}.")
    return total


@cache
def open_source(source: Source) -> IterableDataset:
    """The examples of a source in order, pictures undecoded.

    Raises:
        ValueError: no example, a column that is not there, or one of pictures that holds none.
    """
    path = Path(source.path)
    single = {"data_files": path.name} if path.is_file() else {}
    name = str(path.parent.resolve()) if path.is_file() else source.path
    nothing = f"{source.path} holds no example in split {source.split!r}; name another source or split."
    try:
        dataset = load_dataset(name, source.config, split=source.split, streaming=source.streaming, **single)
    except ValueError as error:
        raise ValueError(f"{nothing} ({error})") from error
    if not isinstance(dataset, IterableDataset):
        dataset = dataset.to_iterable_dataset(num_shards=len(dataset) // SHARD_ROWS + 1)
    first = next(iter(dataset.decode(False).take(1)), None)
    if first is None:
        raise ValueError(nothing)
    pictured = source.image in first or source.messages is None or source.image != Source.image
    named = {"image": source.image if pictured else None, "text": source.text, "messages": source.messages}
    for role, column in named.items():
        if column is not None:
            _check_column(source.path, role, column, first)
    if not pictured:
        return dataset
    if isinstance(first[source.image], (int, float)):
        raise ValueError(
            f"The column {source.image!r} of {source.path} holds {first[source.image]!r}, which is no picture; name "
            "another as --image."
        )
    return dataset.cast_column(source.image, ImageFeature(decode=False))


def len_units(dataset: IterableDataset) -> int:
    """Parts that the work is cut into."""
    return min(dataset.num_shards, MAX_UNITS)


def read_pictures(
    source: Source, image_processor: VisualCodecImageProcessor, *, limit: int
) -> Iterator[tuple[np.ndarray, str]]:
    """At most `limit` readable pictures of a source in order, uint8 `[H, W, 3]` of the codec's size, with captions.

    Without a column of captions all are empty; with one, pictures that have none are left out.
    """
    for example in open_source(source):
        caption = "" if source.text is None else _field(example, source.text)
        if source.text is not None and not caption:
            continue
        try:
            picture = ImageFeature().decode_example(example[source.image])
            pixels = image_processor.process_image(picture).transpose(1, 2, 0)
        except UNREADABLE:
            continue
        yield pixels, caption
        limit -= 1
        if not limit:
            return


@cache
def load_codec(path: str, device: str | None = None) -> tuple[VisualCodecModel, VisualCodecImageProcessor]:
    """A codec, on this process's accelerator where there is one and no other is named, and what feeds it pictures."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        device = "cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"
    if isinstance(AutoConfig.from_pretrained(path), UniMMConfig):
        codec = UniMMForConditionalGeneration.from_pretrained(path).codec
        return codec.to(device).eval(), UniMMProcessor.from_pretrained(path).image_processor
    codec = VisualCodecModel.from_pretrained(path).to(device).eval()
    return codec, VisualCodecImageProcessor.from_pretrained(path)


def _check_column(path: str, role: str, column: str, example: Mapping[str, Any]) -> None:
    """Raise `ValueError` where an example has no such column, or a column of fields has no such field."""
    value: Any = example
    for name in column.split("."):
        if not isinstance(value, Mapping):
            return
        if name not in value:
            hint = did_you_mean(name, list(value), cutoff=0.4)
            raise ValueError(f"{path} has no column {column!r} for --{role}.{hint} It has {', '.join(value)}.")
        value = value[name]


def _end_with(parent: int) -> None:
    """End this process with its parent, which a kill leaves no time to tell it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _tokenize_unit(job: _Job, unit: int) -> None:
    """Write the missing shards of one unit; the last one has fewer examples than the others, none at the least."""
    shard = 0
    while (path := job.folder / f"rows-{unit:05d}-{shard:05d}.parquet").exists():
        if read_report(path).seen < SHARD_ROWS:
            return
        shard += 1
    dataset = open_source(job.source)
    examples = iter(dataset.shard(num_shards=len_units(dataset), index=unit).skip(shard * SHARD_ROWS))
    while True:
        rows, report = _make_rows(job, islice(examples, SHARD_ROWS))
        write_shard(rows, job.folder / f"rows-{unit:05d}-{shard:05d}.parquet", report)
        if report.seen < SHARD_ROWS:
            return
        shard += 1


def _make_rows(job: _Job, examples: Iterator[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], ShardReport]:
    codec, image_processor = load_codec(job.codec, job.device)
    fingerprint = codec.fingerprint()
    rows: list[dict[str, Any]] = []
    seen, skipped = 0, Counter[str]()
    while batch := list(islice(examples, ENCODE_BATCH)):
        seen += len(batch)
        made: list[dict[str, Any]] = []
        by_size: dict[torch.Size, list[tuple[dict[str, Any], torch.Tensor]]] = {}
        for example in batch:
            try:
                row, pixels = _read_example(job.source, example, image_processor)
            except _Skipped as reason:
                skipped[str(reason)] += 1
                continue
            made.append(row | {"fingerprint": fingerprint})
            if pixels is not None:
                by_size.setdefault(pixels.shape, []).append((made[-1], pixels))
        for pairs in by_size.values():
            codes = codec.encode(torch.stack([pixels for _, pixels in pairs]).to(codec.device))
            for index, (row, _) in enumerate(pairs):
                row |= codes.record(index)
        rows += made
    return rows, ShardReport(seen, dict(skipped))


def _read_example(
    source: Source, example: Mapping[str, Any], image_processor: VisualCodecImageProcessor
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Words of an example, and pixels `[3, H, W]` where it has a picture."""
    undecoded = example.get(source.image)
    row: dict[str, Any] = {"codes": [], "height": 0, "width": 0}
    if source.messages is not None:
        messages = _field(example, source.messages)
        row["messages"] = _plain_messages(messages)
        parts = sum(part["type"] == "image" for message in row["messages"] for part in message["content"])
        if parts != (undecoded is not None):
            raise _Skipped(f"{parts} image parts for {int(undecoded is not None)} pictures")
    elif source.text is not None:
        text = _field(example, source.text)
        row["captions"] = [text] if text else []
    if undecoded is None:
        if source.messages is None:
            raise _Skipped("no picture")
        return row, None
    try:
        image = ImageFeature().decode_example(undecoded)
        return row, image_processor(image, return_tensors="pt")["pixel_values"][0]
    except UNREADABLE as error:
        raise _Skipped(f"unreadable or unfit picture ({type(error).__name__})") from error


def _field(example: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field of one, None where it is missing."""
    value: Any = example
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _plain_messages(messages: Any) -> list[Message]:
    """Messages, or JSON of such, whose content is a list of text and image parts."""
    try:
        messages = json.loads(messages) if isinstance(messages, str) else messages
        plain = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            pairs = [{"type": part["type"], "text": part.get("text")} for part in parts]
            plain.append({"role": message["role"], "content": pairs})
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise _Skipped("messages of another form than role and content") from error
    good = all(
        message["role"] in ROLES
        and all(
            part["type"] == "image" or (part["type"] == "text" and part["text"] is not None)
            for part in message["content"]
        )
        for message in plain
    )
    if not good or not plain:
        raise _Skipped("messages of another form than role and content")
    return plain
