"""Pictures to code files and back, and data sets to rows."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from unimm.codes import VisualCodes
from unimm.data.sources import Source, tokenize_source
from unimm.files import atomic_write
from unimm.pipelines import UniMM, open_image
from unimm.pipelines.load import SHIPPED


def picture_to_codes(model: UniMM, source: str, target: str) -> None:
    """Write a picture's codes, its grid and the codec's fingerprint as JSON."""
    pixels = model.processor.image_processor(open_image(source), return_tensors="pt")["pixel_values"]
    codec = model.model.codec
    record = codec.encode(pixels.to(model.device)).record(0) | {"fingerprint": codec.fingerprint()}
    with atomic_write(target) as path:
        path.write_text(json.dumps(record) + "\n")


def codes_to_picture(model: UniMM, source: str, target: str) -> None:
    """Decode a file of codes into a picture.

    Raises:
        ValueError: not such a file, or codes of another codec.
    """
    try:
        record = json.loads(Path(source).read_text())
        codes, fingerprint = VisualCodes.from_record(record), record["fingerprint"]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{source} is no file of codes; make one with: unimm tokenize PICTURE -o CODES.json"
        ) from error
    if fingerprint != model.model.codec.fingerprint():
        raise ValueError(f"{source} was made by codec {fingerprint}, this one is {model.model.codec.fingerprint()}.")
    with atomic_write(target) as path:
        model.decode([codes])[0].image.save(path)


def source_to_rows(arguments: argparse.Namespace) -> str:
    """Write this process's share of a data set into a folder of rows, and say what became of its examples.

    Raises:
        ValueError: as `tokenize_source`.
    """
    fields = ("config", "split", "image", "text", "messages", "streaming")
    source = Source(arguments.source, **{name: getattr(arguments, name) for name in fields})
    report = tokenize_source(
        source,
        arguments.model or SHIPPED,
        Path(arguments.output),
        device=arguments.device,
        num_proc=arguments.num_proc,
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )
    reasons = "".join(f"; {number:,} {reason}" for reason, number in report.skipped.items())
    num_rows = report.seen - report.num_skipped
    return f"{num_rows:,} rows of {report.seen:,} examples, {report.num_skipped:,} skipped{reasons}"
