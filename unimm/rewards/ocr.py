"""Reward of written words in any face: what Tesseract reads, held against the word that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image

from unimm.rewards.base import Drawing, Reward
from unimm.rewards.word import edit_distance, has_word

MIN_CONFIDENCE = 60  # of 100; Tesseract reads letters into noise too, and is less sure of them


def text_marks(words: Sequence[tuple[str, int]], wanted: str) -> float:
    """Mean of word F1 and 1 - normalised edit distance, in [0, 1].

    Both fall with every word too many, so that a picture full of words does not earn what the one word does.

    Args:
        words: in reading order, each with its confidence from 0 to 100; those below `MIN_CONFIDENCE` are left out.
        wanted: the text to be read; case and white space do not count.
    """
    read = " ".join(text for text, confidence in words if confidence >= MIN_CONFIDENCE).upper().split()
    asked = wanted.upper().split()
    if not read or not asked:
        return 0.0
    f1 = 2 * sum((Counter(read) & Counter(asked)).values()) / (len(read) + len(asked))
    one, other = " ".join(read), " ".join(asked)
    return (f1 + 1 - edit_distance(one, other) / max(len(one), len(other))) / 2


def _read(images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
    from tesserocr import PSM, PyTessBaseAPI

    marks = []
    with PyTessBaseAPI(psm=PSM.SPARSE_TEXT) as engine:
        for image, drawing in zip(images, drawings, strict=True):
            engine.SetImage(image.convert("RGB"))
            engine.Recognize()
            marks.append(text_marks(engine.MapWordConfidences(), drawing.facts.word or ""))
    return marks


def load_ocr() -> Reward:
    """The reward `ocr`, in [0, 1].

    Raises:
        ValueError: tesserocr or its English data is not installed.
    """
    try:
        from tesserocr import PyTessBaseAPI
    except ImportError as error:
        raise ValueError("Reward 'ocr' reads with tesserocr, which is missing; pip install tesserocr.") from error
    try:
        PyTessBaseAPI().End()
    except RuntimeError as error:
        raise ValueError(
            f"Reward 'ocr' finds no data of Tesseract ({error}); install tesseract-ocr-eng, and name the folder of "
            "eng.traineddata in TESSDATA_PREFIX if it lies elsewhere."
        ) from error
    return Reward("ocr", 0.0, 1.0, has_word, _read)
