"""How far copies are from pictures: per picture, as distributions, and what the codes of a codec carry.

Traps of published scorers are avoided: nothing is resized before it is scored, ranges are stated, a Fréchet distance
names its extractor, is refused where there are too few pictures for its dimension, and says where they are few.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel

from unimm.codes import CodeSpec
from unimm.data.pictures import to_pictures
from unimm.nn.scripted import Lpips

BATCH = 16
LPIPS_BATCH = 4  # vectors of 256 pixels a side are 32 MB each
ENOUGH = 10  # pictures per dimension, below which a Fréchet distance is said to be biased
THUMBNAIL = 4  # side


def ssim(copies: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Structural similarity of each of uint8 `[B, H, W, 3]`, `[B]`, with the Gaussian window of the paper (Wang 2004).

    Raises:
        ImportError: scikit-image is not there, which only judges of codecs need.
    """
    from skimage.metrics import structural_similarity

    options = {"channel_axis": 2, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    pairs = zip(copies, references, strict=True)
    scores = [structural_similarity(a, b, use_sample_covariance=False, **options) for a, b in pairs]
    return np.array(scores)


@torch.no_grad()
def lpips_distances(lpips: Lpips, copies: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """LPIPS of each pair of float32 `[N, 3, H, W]` in [-1, 1], `[N]`."""
    pairs = zip(copies.split(LPIPS_BATCH), references.split(LPIPS_BATCH), strict=True)
    return torch.cat([(lpips(a) - lpips(b)).square().sum(dim=1).cpu() for a, b in pairs])


class Extractor(Protocol):
    """Pictures to features for a Fréchet distance."""

    @property
    def name(self) -> str: ...

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 `[B, 3, H, W]` in [-1, 1] to float `[B, D]`."""


class Thumbnails:
    """Every picture averaged to 4 x 4 colours: needs no weights, and sees colour and layout only."""

    name = f"thumbnail{THUMBNAIL}"

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pixels, THUMBNAIL).flatten(1)


class ModelExtractor:
    """The mean over positions of the last hidden state of any vision model that `AutoModel` loads.

    Args:
        path: of the model and its image processor; the name carries a digest of the weights.
        device: where it runs.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self.model = AutoModel.from_pretrained(path).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(path)
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + weight.float().cpu().contiguous().numpy().tobytes())
        self.name = f"{Path(path).name}@{digest.hexdigest()[:8]}"

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        inputs = self.processor(images=to_pictures(pixels), return_tensors="pt")
        hidden = self.model(pixel_values=inputs["pixel_values"].to(self.model.device)).last_hidden_state
        return (hidden.flatten(2).mean(dim=2) if hidden.ndim == 4 else hidden.mean(dim=1)).float().cpu()


class TooFewPicturesError(ValueError):
    """There are no more of them than the features have dimensions, so that their covariance says nothing."""


@dataclass(frozen=True)
class FrechetDistance:
    """Between the features of two sets of pictures.

    Args:
        name: says its dimensions d and pictures n; FID means one extractor, so that of others is `FD[extractor,...]`.
        value: the distance.
        floor: what a perfect copy would get, where it is not 0.
        warning: why not to believe it; empty for nothing.
    """

    name: str
    value: float
    floor: float | None
    warning: str


def features(extract: Extractor, pixels: torch.Tensor) -> np.ndarray:
    """Of float32 `[N, 3, H, W]` in [-1, 1], float32 `[N, D]`."""
    return torch.cat([extract(batch) for batch in pixels.split(BATCH)]).float().numpy()


def rfid(real: np.ndarray, copied: np.ndarray) -> FrechetDistance:
    """Of all pictures to their copies, as published, where there are 50,000; features `[N, D]` by `Inception`.

    Raises:
        TooFewPicturesError: N is no more than the features have dimensions.
    """
    number, dim = real.shape
    if number <= dim:
        raise TooFewPicturesError(
            f"rFID over features of {dim} dimensions needs more than {dim} pictures, there are {number}; take more, or "
            "leave out the file of Inception."
        )
    return FrechetDistance(f"rFID[d={dim},n={number}]", _distance(real, copied), None, _warning(number, dim))


def frechet(extractor: str, real: np.ndarray, copied: np.ndarray) -> FrechetDistance:
    """First half of the pictures to the copies of the second (1706.08500), and to the second; features `[N, D]`.

    Args:
        extractor: its name.

    Raises:
        TooFewPicturesError: half of the pictures are no more than the features have dimensions.
    """
    half, dim = len(real) // 2, real.shape[1]
    if half <= dim:
        raise TooFewPicturesError(
            f"{len(real)} pictures make two halves of {half}, and features of {dim} dimensions need more than {dim} in "
            f"each; take more than {2 * dim + 1} pictures, or a smaller extractor."
        )
    first = real[:half]
    name = f"FD[{extractor},d={dim},n={half}]"
    value, floor = _distance(first, copied[half:]), _distance(first, real[half:])
    return FrechetDistance(name, value, floor, _warning(half, dim))


def _warning(number: int, dim: int) -> str:
    if number >= ENOUGH * dim:
        return ""
    return f"biased: {number} pictures are fewer than {ENOUGH} for each of {dim} dimensions"


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    spread, other_spread = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # The eigenvalues of a product of two covariances are real and not negative, up to rounding.
    shared = np.sqrt(np.clip(np.linalg.eigvals(spread @ other_spread).real, 0, None)).sum()
    moved = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    return float(max(0.0, moved + np.trace(spread) + np.trace(other_spread) - 2 * shared))


@dataclass(frozen=True)
class CodeStatistics:
    """What codes carry.

    Args:
        usage: share of all codes that occur.
        entropy: of a code, in bits, averaged over slots; of the counts, so never more than `ceiling`.
        ceiling: bits of a slot if all codes were equally likely.
    """

    usage: float
    entropy: float
    ceiling: float


def code_statistics(ids: torch.Tensor, spec: CodeSpec) -> CodeStatistics:
    """Of ids `[M, K]`, padding left out.

    Raises:
        ValueError: no codes.
    """
    if not len(ids):
        raise ValueError("There are no codes to count.")
    entropies = []
    for slot in ids.unbind(dim=1):
        shares = slot.unique(return_counts=True)[1].double() / len(slot)
        entropies.append(float(-(shares * shares.log2()).sum()))
    return CodeStatistics(spec.share_used(ids), float(np.mean(entropies)), float(np.log2(spec.sizes).mean()))
