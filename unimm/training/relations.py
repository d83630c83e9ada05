"""Rows of a codebook that lie to each other as the features of a frozen model do (GloTok, 2511.14184)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from unimm.codec import VisualCodecConfig, VisualCodecModel, socket_config
from unimm.codec.quantizers import VQ, VQConfig
from unimm.codec.quantizers.vector import lloyd
from unimm.data.pictures import to_pixel_values
from unimm.training.objectives import CellFeatures, FeatureConfig

SAMPLED = 1024  # rows that are compared with each other at a step
STEPS = 10  # of Lloyd's algorithm
BATCH = 32
EPS = 1e-6


@dataclass(frozen=True)
class RelationConfig(FeatureConfig):
    """A frozen vision transformer whose features say how rows should lie to each other.

    Args:
        clusters: of the features of all squares of the pictures, whose centres are compared.
        bins: of the histograms of cosines, over [-1, 1].
        pictures: that the features are of.

    Raises:
        ValueError: fewer than two clusters, bins or pictures.
    """

    weight: float = 0.01
    clusters: int = 1024
    bins: int = 40
    pictures: int = 1000

    def __post_init__(self) -> None:
        if min(self.clusters, self.bins, self.pictures) < 2:
            raise ValueError(
                f"relation has {self.clusters} clusters, {self.bins} bins and {self.pictures} pictures; it takes two "
                "or more of each."
            )


def check_relation(config: RelationConfig, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where a codec has no rows that learn by a gradient."""
    quantizer = socket_config("quantizer", codec.quantizer)
    if not isinstance(quantizer, VQConfig) or quantizer.ema_decay is not None:
        raise ValueError(
            f"relation names {config.model}, and a quantizer of kind {codec.quantizer['kind']!r} has no rows that "
            "learn by a gradient; take kind: vq or product without ema_decay."
        )


def relation_histogram(rows: torch.Tensor, bins: int) -> torch.Tensor:
    """Shares `[bins]` of the cosines between all pairs of rows `[S, D]`, each spread over its bin's neighbours by a
    Gaussian as wide as a bin.
    """
    unit = F.normalize(rows.float(), dim=-1)
    one, other = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
    cosines = (unit @ unit.T)[one, other]
    width = 2 / bins
    centres = torch.linspace(-1 + width / 2, 1 - width / 2, bins, device=rows.device)
    counts = torch.exp(-((cosines[:, None] - centres) / width).square() / 2).mean(dim=0)
    return counts / counts.sum()


class Relation:
    """The histogram of a frozen model's features, and how far that of a codebook is from it."""

    def __init__(self, config: RelationConfig, pictures: np.ndarray, seed: int) -> None:
        self.config, features = config, CellFeatures(config)
        generator = np.random.default_rng(seed)
        picked = np.sort(generator.permutation(len(pictures))[: config.pictures])
        batches = [picked[start : start + BATCH] for start in range(0, len(picked), BATCH)]
        cells = torch.cat([features(to_pixel_values(pictures[batch])).flatten(0, 1) for batch in batches])
        first = torch.from_numpy(generator.permutation(len(cells))[: config.clusters])
        centres = lloyd(cells, cells[first.to(cells.device)], STEPS, lambda rows: F.normalize(rows, dim=-1))
        self.wanted = relation_histogram(centres, config.bins)

    def loss(self, codec: VisualCodecModel) -> torch.Tensor:
        """Divergence of the wanted histogram from that of the codec's rows, averaged over its codebooks."""
        books = [part for part in codec.quantizer.modules() if isinstance(part, VQ)]
        return torch.stack([self._divergence(book.rows()) for book in books]).mean()

    def _divergence(self, rows: torch.Tensor) -> torch.Tensor:
        picked = torch.randperm(len(rows), device=rows.device)[:SAMPLED]
        found = relation_histogram(rows[picked], self.config.bins)
        wanted = self.wanted.to(rows.device)
        return (wanted * ((wanted + EPS).log() - (found + EPS).log())).sum()
