"""Judges a codec by its copies: fidelity, what its codes carry, JPEG and WebP at equal bytes, text that survives.

Photographs are cut, not resized, into squares of the codec's own size and scored at it; rendered worlds are resized to
it first, and nothing is afterwards.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from unimm.data.photographs import photograph_squares
from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.data.worlds import WORLDS
from unimm.evaluation.classical import FORMATS, Rate, at_equal_bytes, curve
from unimm.evaluation.fidelity import (
    Extractor,
    Thumbnails,
    TooFewPicturesError,
    code_statistics,
    frechet,
    lpips_distances,
    rfid,
    ssim,
)
from unimm.evaluation.legibility import Reader, text_survival
from unimm.evaluation.subjects import Copies, Subject
from unimm.files import atomic_write
from unimm.nn.scripted import Inception, Lpips
from unimm.scorers.reconstruction import psnr

PHOTOGRAPHS = "photographs"
SHOWN = 8  # pictures of the sheet


@dataclass(frozen=True)
class Measure:
    """One number.

    Args:
        pictures: the set.
        name: what was measured.
        value: the number.
        trials: over how many pictures, words or codes.
        beside: what it should be read against: a floor, a ceiling.
        note: what `beside` is, or what else there is to say.
    """

    pictures: str
    name: str
    value: float
    trials: int
    beside: float | None = None
    note: str = ""


@dataclass(frozen=True)
class CodecReport:
    """All measures of a subject, and the points of its curves by set and name."""

    subject: str
    measures: tuple[Measure, ...]
    curves: dict[str, dict[str, list[Rate]]]

    def to_markdown(self) -> str:
        """A table."""
        lines = ["| pictures | measure | value | beside | trials | |", "|---|---|---|---|---|---|"]
        for measure in self.measures:
            beside = "" if measure.beside is None else f"{measure.beside:.4g}"
            lines.append(
                f"| {measure.pictures} | {measure.name} | {measure.value:.4g} | {beside} | {measure.trials} | "
                f"{measure.note} |"
            )
        return "\n".join([f"Copies by `{self.subject}`.", "", *lines])

    def save(self, folder: Path) -> None:
        """Write `report.md`, `report.json` and `rate_distortion.png`."""
        with atomic_write(folder / "report.md") as path:
            path.write_text(self.to_markdown() + "\n", encoding="utf-8")
        with atomic_write(folder / "report.json") as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        if self.curves:
            with atomic_write(folder / "rate_distortion.png") as path:
                self._plot(path)

    def _plot(self, path: Path) -> None:
        figure, axes = plt.subplots(1, len(self.curves), figsize=(5 * len(self.curves), 4), squeeze=False)
        for axis, (pictures, curves) in zip(axes[0], self.curves.items(), strict=True):
            for name, points in curves.items():
                axis.plot([point.size for point in points], [point.psnr for point in points], "o-", label=name)
            axis.set(xscale="log", xlabel="bytes per picture", ylabel="PSNR, dB", title=pictures)
            axis.legend()
        figure.tight_layout()
        figure.savefig(path, format="png", dpi=120)
        plt.close(figure)


def picture_sets(names: tuple[str, ...], side: int, limit: int) -> dict[str, np.ndarray]:
    """Held-out pictures of rendered worlds, and photographs, uint8 `[N, side, side, 3]` by name.

    Raises:
        ValueError: an unknown name.
    """
    known = (*WORLDS, PHOTOGRAPHS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"There are no pictures {', '.join(unknown)}; there are {', '.join(known)}.")
    sets = {}
    for name in names:
        if name == PHOTOGRAPHS:
            sets[name] = photograph_squares(side, limit)
            continue
        world = WORLDS[name](split="held_out", seed=0)
        drawn = [world.example(index).image.convert("RGB") for index in range(limit)]
        sets[name] = np.stack([np.asarray(p if p.width == side else p.resize((side, side))) for p in drawn])
    return sets


def evaluate_codec(
    subject: Subject,
    sets: dict[str, np.ndarray],
    *,
    folder: Path | None = None,
    extractor: Extractor | None = None,
    lpips: Lpips | None = None,
    reader: Reader | None = None,
) -> CodecReport:
    """Measure a subject on sets of pictures.

    Args:
        sets: uint8 `[N, side, side, 3]` by name.
        folder: where the report, the plot and a sheet of copies go.
        extractor: of the Fréchet distance, which is rFID by Inception; by default thumbnails, which need no weights.
        lpips: without it no LPIPS is measured.
        reader: an OCR; without one no text is measured.
    """
    measures: list[Measure] = []
    curves: dict[str, dict[str, list[Rate]]] = {}
    for name, pictures in sets.items():
        copies = subject.copy(pictures)
        measures += compare(name, pictures, copies.pixels, extractor or Thumbnails(), lpips)
        if copies.bits is not None:
            measures += code_measures(name, subject, pictures, copies)
            curves[name] = {kind: curve(kind, pictures) for kind in FORMATS}
            curves[name]["codes"] = code_curve(subject, pictures, copies)
            measures += byte_measures(name, curves[name], len(pictures))
        if folder is not None:
            _sheet(pictures, copies.pixels, folder / f"copies_{name}.png")
    if reader is not None:
        measures += [
            Measure("words", f"read at {s.height} px", s.read, s.trials, s.ceiling, "beside: of the originals")
            for s in text_survival(subject, reader)
        ]
    report = CodecReport(subject.name, tuple(measures), curves)
    if folder is not None:
        report.save(folder)
    return report


def compare(
    name: str, pictures: np.ndarray, copied: torch.Tensor, extractor: Extractor, lpips: Lpips | None = None
) -> list[Measure]:
    """Fidelity of copies, float32 `[N, 3, H, W]` in [-1, 1]; the distance is left out where pictures are too few."""
    number = len(pictures)
    reference = to_pixel_values(pictures)
    shown = np.stack([np.asarray(picture) for picture in to_pictures(copied)])
    measures = [
        Measure(name, "PSNR, dB", float(psnr(to_pixel_values(shown), reference).mean()), number),
        Measure(name, "SSIM", float(ssim(shown, pictures).mean()), number),
    ]
    if lpips is not None:
        distances = lpips_distances(lpips, to_pixel_values(shown), reference)
        measures.append(Measure(name, "LPIPS", float(distances.mean()), number, note=f"by {lpips.name}"))
    return [*measures, _set_distance(name, reference, to_pixel_values(shown), extractor)]


def _set_distance(name: str, reference: torch.Tensor, shown: torch.Tensor, extractor: Extractor) -> Measure:
    number = len(reference)
    label, note = "FD", "beside: held-out floor"
    try:
        if isinstance(extractor, Inception):
            label, note = "rFID", f"by {extractor.name}"
            distance = rfid(extractor, reference, shown)
        else:
            distance = frechet(extractor, reference, shown)
    except TooFewPicturesError as error:
        return Measure(name, label, float("nan"), number, note=f"not measured: {error}")
    notes = [note, distance.warning]
    return Measure(name, distance.name, distance.value, number, distance.floor, "; ".join(filter(None, notes)))


def code_measures(name: str, subject: Subject, pictures: np.ndarray, copies: Copies) -> list[Measure]:
    """Rate, usage and entropy of the codes."""
    assert copies.bits is not None
    assert copies.ids is not None
    assert subject.spec is not None
    found, pixels = code_statistics(copies.ids, subject.spec), pictures[..., 0].size
    codes = len(copies.ids)
    return [
        Measure(name, "bits per pixel", copies.bits / pixels, len(pictures)),
        Measure(
            name, "codes used, share", found.usage, codes, min(1.0, codes / min(subject.spec.sizes)), "beside: at most"
        ),
        Measure(name, "entropy of a code, bits", found.entropy, codes, found.ceiling, "beside: all equally likely"),
    ]


def code_curve(subject: Subject, pictures: np.ndarray, copies: Copies) -> list[Rate]:
    """A point for each length that the codec can give a picture."""
    points = []
    for length in subject.lengths:
        found = copies if length is None else subject.copy(pictures, length)
        assert found.bits is not None
        quality = float(psnr(found.pixels, to_pixel_values(pictures)).mean())
        points.append(Rate(found.bits / 8 / len(pictures), quality))
    return sorted(points, key=lambda point: point.size)


def byte_measures(name: str, curves: dict[str, list[Rate]], number: int) -> list[Measure]:
    """What the classical formats reach with the bytes of the codes."""
    own = curves["codes"][-1]
    measures = []
    for kind in FORMATS:
        point = at_equal_bytes(curves[kind], own.size)
        if point is None:
            smallest = curves[kind][0]
            note = f"at its smallest, {smallest.size:.0f} bytes, where the codes are {own.size:.0f}"
            point = smallest
        else:
            note = f"with {point.size:.0f} bytes, where the codes are {own.size:.0f}"
        measures.append(Measure(name, f"{kind} PSNR, dB", point.psnr, number, own.psnr, f"{note}; beside: the codes"))
    return measures


def _sheet(pictures: np.ndarray, copied: torch.Tensor, path: Path) -> None:
    """Originals above their copies."""
    shown = min(SHOWN, len(pictures))
    copies = [np.asarray(picture) for picture in to_pictures(copied[:shown])]
    rows = [np.concatenate(list(row), axis=1) for row in (pictures[:shown], copies)]
    with atomic_write(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")
