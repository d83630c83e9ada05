"""`unimm evaluate codec`: what is judged, on which pictures, by what."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoConfig

import unimm
from unimm.codec import VisualCodecModel
from unimm.data.pictures import to_pixel_values
from unimm.evaluation.codec import CodecReport, compare, evaluate_codec, picture_sets
from unimm.evaluation.fidelity import Extractor, ModelExtractor, Thumbnails
from unimm.evaluation.legibility import rapid_reader
from unimm.evaluation.subjects import CodecSubject, Subject, VaeSubject, read_pairs
from unimm.nn.scripted import Inception, Lpips

PICTURES = ("shapes", "words", "photographs")


def judge_codec(arguments: argparse.Namespace, device: str) -> CodecReport:
    """The report of a codec, of a VAE, or of a folder of copies; what is judged runs on `device`.

    Raises:
        ValueError: one folder without the other, two extractors, pictures that nothing knows, a model without a codec,
            or a file of weights that is another than it should be.
    """
    folder = Path(arguments.folder) if arguments.folder else None
    extractor = _extractor(arguments, device)
    lpips = Lpips(arguments.lpips, device) if arguments.lpips else None
    if bool(arguments.references) != bool(arguments.copies):
        raise ValueError("Copies are judged against references: name both --references and --copies.")
    if arguments.references:
        pairs = read_pairs(Path(arguments.references), Path(arguments.copies))
        pixels = ((real, to_pixel_values(copied)) for real, copied in pairs)
        measures = compare(Path(arguments.references).name, pixels, extractor, lpips)
        report = CodecReport(arguments.copies, tuple(measures), {})
        if folder is not None:
            report.save(folder)
        return report
    subject = _subject(arguments, device)
    sets = picture_sets(tuple(arguments.pictures or PICTURES), subject.side, arguments.limit)
    reader = rapid_reader() if arguments.text else None
    return evaluate_codec(subject, sets, folder=folder, extractor=extractor, lpips=lpips, reader=reader)


def _extractor(arguments: argparse.Namespace, device: str) -> Extractor:
    if arguments.extractor and arguments.inception:
        raise ValueError("One distance is reported: name --inception for rFID, or --extractor for that of another.")
    if arguments.inception:
        return Inception(arguments.inception, device)
    return ModelExtractor(arguments.extractor, device) if arguments.extractor else Thumbnails()


def _subject(arguments: argparse.Namespace, device: str) -> Subject:
    if arguments.vae:
        return VaeSubject(arguments.vae, 256 if arguments.side is None else arguments.side, device)
    path = arguments.model
    if path and (Path(path) / "config.json").is_file() and _is_codec(path):
        return CodecSubject(VisualCodecModel.from_pretrained(path).to(device), path)
    codec = unimm.load(path, device=device).model.visual
    if codec is None:
        raise ValueError(f"{path} has no codec of its own; name the folder of its codec as --model.")
    return CodecSubject(codec, path or "unimm-tiny")


def _is_codec(path: str) -> bool:
    return AutoConfig.from_pretrained(path).model_type == VisualCodecModel.config_class.model_type
