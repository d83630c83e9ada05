"""Judges a codec by its copies: fidelity, what its codes carry, JPEG and WebP at equal bytes, text that survives.

Photographs are cut, not resized, into squares of the codec's own size and scored at it; rendered worlds are resized to
it first, pictures of a source are cut to their middle and resized, and nothing is afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unimm.codec import VisualCodecImageProcessor
from unimm.data.photographs import photograph_squares
from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.data.sources import Source, read_pictures
from unimm.data.worlds import WORLDS
from unimm.evaluation.classical import FORMATS, Rate, at_equal_bytes, curve
from unimm.evaluation.fidelity import (
    Extractor,
    Thumbnails,
    TooFewPicturesError,
    code_statistics,
    features,
    frechet,
    lpips_distances,
    rfid,
    ssim,
)
from unimm.evaluation.legibility import Reader, text_survival
from unimm.evaluation.subjects import BATCH, Subject
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
        value: the number; None where it could not be measured.
        trials: over how many pictures, words or codes.
        beside: what it should be read against: a floor, a ceiling.
        note: what `beside` is, or what else there is to say.
    """

    pictures: str
    name: str
    value: float | None
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
            value, beside = ("" if number is None else f"{number:.4g}" for number in (measure.value, measure.beside))
            lines.append(
                f"| {measure.pictures} | {measure.name} | {value} | {beside} | {measure.trials} | {measure.note} |"
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
    """Held-out pictures of rendered worlds, photographs, and those of a source, uint8 `[N, side, side, 3]` by name.

    Args:
        names: of worlds, `photographs`, or what `Source` reads: a folder, a file or a Hub name with a slash.

    Raises:
        ValueError: an unknown name, two sources whose names end alike, or a source without readable pictures.
    """
    known = (*WORLDS, PHOTOGRAPHS)
    if unknown := [name for name in names if name not in known and "/" not in name and not Path(name).exists()]:
        raise ValueError(f"There are no pictures {', '.join(unknown)}; there are {', '.join(known)}, and folders.")
    if len({Path(name).name for name in names}) < len(names):
        raise ValueError(f"The pictures {', '.join(names)} end in one name twice, and reports go by it; rename one.")
    sets = {}
    for name in names:
        if name == PHOTOGRAPHS:
            sets[name] = photograph_squares(side, limit)
        elif name in WORLDS:
            world = WORLDS[name](split="held_out", seed=0)
            drawn = [world.example(index).image.convert("RGB") for index in range(limit)]
            sets[name] = np.stack([np.asarray(p if p.width == side else p.resize((side, side))) for p in drawn])
        else:
            sets[Path(name).name] = _source_squares(name, side, limit)
    return sets


def _source_squares(path: str, side: int, limit: int) -> np.ndarray:
    """At most `limit` pictures of a source, on disk as long as they are used: 50,000 are more than memory holds."""
    processor = VisualCodecImageProcessor(size={"height": side, "width": side})
    found, file = 0, TemporaryFile()  # noqa: SIM115, it goes with the array that maps it
    for picture, _ in tqdm(read_pictures(Source(path, streaming=True), processor, limit=limit), path, total=limit):
        file.write(np.ascontiguousarray(picture).tobytes())
        found += 1
    if not found:
        raise ValueError(f"{path} has no readable picture.")
    file.flush()
    return np.memmap(file, np.uint8, "r", shape=(found, side, side, 3))


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
        ids: list[torch.Tensor] = []
        bits, fidelity, shown = 0.0, Fidelity(extractor or Thumbnails(), lpips), list[torch.Tensor]()
        for batch in in_batches(pictures, name):
            copies = subject.copy(batch)
            fidelity.add(batch, copies.pixels)
            shown = shown or [copies.pixels[:SHOWN]]
            if copies.bits is not None and copies.ids is not None:
                bits += copies.bits
                ids.append(copies.ids)
        measures += fidelity.measures(name)
        if ids:
            measures += code_measures(name, subject, pictures, bits, torch.cat(ids))
            curves[name] = {kind: curve(kind, pictures) for kind in FORMATS}
            own = Rate(bits / 8 / len(pictures), float(np.concatenate(fidelity.figures["PSNR, dB"]).mean()))
            curves[name]["codes"] = code_curve(subject, pictures, own)
            measures += byte_measures(name, curves[name], len(pictures))
        if folder is not None:
            _sheet(pictures, shown[0], folder / f"copies_{name}.png")
    if reader is not None:
        measures += [
            Measure("words", f"read at {s.height} px", s.read, s.trials, s.ceiling, "beside: of the originals")
            for s in text_survival(subject, reader)
        ]
    report = CodecReport(subject.name, tuple(measures), curves)
    if folder is not None:
        report.save(folder)
    return report


def in_batches(pictures: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Of uint8 `[N, H, W, 3]`, with a bar."""
    for start in tqdm(range(0, len(pictures), BATCH), desc=name, unit="batch"):
        yield pictures[start : start + BATCH]


class Fidelity:
    """Copies beside their pictures, a batch at a time; none is kept.

    Args:
        extractor: of the Fréchet distance.
        lpips: without it no LPIPS is measured.
    """

    def __init__(self, extractor: Extractor, lpips: Lpips | None) -> None:
        self.extractor, self.lpips = extractor, lpips
        names = ("PSNR, dB", "SSIM") if lpips is None else ("PSNR, dB", "SSIM", "LPIPS")
        self.figures: dict[str, list[np.ndarray]] = {figure: [] for figure in names}
        self.real: list[np.ndarray] = []
        self.copied: list[np.ndarray] = []

    def add(self, pictures: np.ndarray, copied: torch.Tensor) -> None:
        """uint8 `[B, H, W, 3]`, and float32 `[B, 3, H, W]` in [-1, 1], which is rounded to 8 bits first."""
        rounded = np.stack([np.asarray(picture) for picture in to_pictures(copied)])
        reference, shown = to_pixel_values(pictures), to_pixel_values(rounded)
        self.figures["PSNR, dB"].append(psnr(shown, reference).numpy())
        self.figures["SSIM"].append(ssim(rounded, pictures))
        if self.lpips is not None:
            self.figures["LPIPS"].append(lpips_distances(self.lpips, shown, reference).numpy())
        self.real.append(features(self.extractor, reference))
        self.copied.append(features(self.extractor, shown))

    def measures(self, name: str) -> list[Measure]:
        """Of the set of that name; the distance is left out where pictures are too few."""
        found = []
        for figure, parts in self.figures.items():
            note = f"by {self.lpips.name}" if self.lpips is not None and figure == "LPIPS" else ""
            values = np.concatenate(parts)
            found.append(Measure(name, figure, float(values.mean()), len(values), note=note))
        return [*found, _set_distance(name, np.concatenate(self.real), np.concatenate(self.copied), self.extractor)]


def compare(
    name: str, pairs: Iterable[tuple[np.ndarray, torch.Tensor]], extractor: Extractor, lpips: Lpips | None = None
) -> list[Measure]:
    """Fidelity of copies that come in batches beside their pictures, as `Fidelity` takes them."""
    fidelity = Fidelity(extractor, lpips)
    for pictures, copied in pairs:
        fidelity.add(pictures, copied)
    return fidelity.measures(name)


def _set_distance(name: str, real: np.ndarray, copied: np.ndarray, extractor: Extractor) -> Measure:
    number = len(real)
    label, note = "FD", "beside: held-out floor"
    try:
        if isinstance(extractor, Inception):
            label, note = "rFID", f"by {extractor.name}"
            distance = rfid(real, copied)
        else:
            distance = frechet(extractor.name, real, copied)
    except TooFewPicturesError as error:
        return Measure(name, label, None, number, note=f"not measured: {error}")
    notes = [note, distance.warning]
    return Measure(name, distance.name, distance.value, number, distance.floor, "; ".join(filter(None, notes)))


def code_measures(name: str, subject: Subject, pictures: np.ndarray, bits: float, ids: torch.Tensor) -> list[Measure]:
    """Rate, usage and entropy of the codes `[M, K]`, of so many bits together."""
    assert subject.spec is not None
    found, codes = code_statistics(ids, subject.spec), len(ids)
    return [
        Measure(name, "bits per pixel", bits / pictures[..., 0].size, len(pictures)),
        Measure(
            name, "codes used, share", found.usage, codes, min(1.0, codes / min(subject.spec.sizes)), "beside: at most"
        ),
        Measure(name, "entropy of a code, bits", found.entropy, codes, found.ceiling, "beside: all equally likely"),
    ]


def code_curve(subject: Subject, pictures: np.ndarray, own: Rate) -> list[Rate]:
    """A point for each length that the codec can give a picture, of which its own is known."""
    points = [own]
    for length in subject.lengths:
        if length is None:
            continue
        ratios, bits = [], 0.0
        for batch in in_batches(pictures, f"{length} codes"):
            copies = subject.copy(batch, length)
            assert copies.bits is not None
            bits += copies.bits
            ratios.append(psnr(copies.pixels, to_pixel_values(batch)))
        points.append(Rate(bits / 8 / len(pictures), float(torch.cat(ratios).mean())))
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
