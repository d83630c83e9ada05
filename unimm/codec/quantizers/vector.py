"""Vector quantisation (1711.00937): the id is the nearest row of a learned codebook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from unimm.codec.quantizers.base import Quantized, Quantizer
from unimm.codec.quantizers.estimators import ESTIMATORS, entropy_gap

SEARCH_SCORES = 2**26  # scores held at once, 256 MiB
METRICS = ("l2", "dot")
# Rows nearer than this share of a row's norm cannot be told apart by dot products in float32.
DUPLICATE = 4e-3
SHARE_DECAY = 0.99  # of the moving average of how often a row is chosen


@dataclass(frozen=True)
class VQConfig:
    """Nearest-row quantizer.

    Args:
        size: rows of the codebook.
        dim: width of a row; vectors are projected to it, which keeps the search cheap (2110.04627).
        normalize: L2-normalise vectors and rows, so that the nearest row is the one of largest cosine.
        ema_decay: rows follow a moving average of the vectors they stand for (1906.00446); None trains them by
            gradient.
        commitment: weight of the pull of the vectors towards their rows.
        project: whether linear maps lead to the rows and back; without them the vectors must be `dim` wide.
        metric: nearest by distance (`l2`) or by dot product (`dot`, IBQ, 2412.02692); the same once normalised.
        raw_lookup: codes stand for the stored rows even where the search normalises them (X-Omni, 2507.22058).
        raw_rows: only the vectors are normalised; rows are compared and read as they are stored (LaVIT, 2309.04669).
        map_rows: the rows are a linear map of the stored table, which stays as it was drawn (SimVQ, 2411.02038).
        map_bias: whether that map has a bias.
        parts: widths of the parts of a vector that are normalised apart, so that one code is the nearest in each of
            them (TokenFlow, 2412.03069); empty to normalise it as a whole.
        estimator: how gradients pass the choice, one of `ESTIMATORS`: `copied` straight through, `rotated`, or
            `weighed` over all rows (IBQ).
        entropy: weight of the gap between the entropy of each choice and that of all of them.
        entropy_temperature: of the softmax behind it.
        sample_temperature: in training, rows are drawn by softmax of their scores over this (SQ-VAE, 2205.07547);
            0 always takes the nearest.
        reanchor: in training, rows that are hardly used move towards the vector nearest to them (CVQ, 2307.15139).
        restart_below: a row that an EMA codebook used less than this (average count per step) moves to a random
            vector of the batch; 0 never restarts.
        kmeans_steps: of Lloyd's algorithm over the first batch of training, whose means the rows start from
            (SoundStream, 2107.03312); 0 starts from rows as they are drawn.
        channel_weights: distances count a difference along each principal axis of the vectors by their variance there
            (DINO-Tok, 2511.20565), which `weigh_channels` measures; until then all alike. Codes stand for the rows as
            they are.

    What a batch does to rows directly (an EMA, restarts, re-anchoring, the start) the batches of all processes do.
    """

    size: int = 1024
    dim: int = 8
    normalize: bool = True
    ema_decay: float | None = None
    commitment: float = 0.25
    restart_below: float = 0.0
    project: bool = True
    metric: str = "l2"
    raw_lookup: bool = False
    raw_rows: bool = False
    map_rows: bool = False
    map_bias: bool = True
    parts: tuple[int, ...] = ()
    estimator: str = "copied"
    entropy: float = 0.0
    entropy_temperature: float = 0.01
    sample_temperature: float = 0.0
    reanchor: bool = False
    kmeans_steps: int = 0
    channel_weights: bool = False


class VQ(Quantizer):
    """One code per position.

    Raises:
        ValueError: fewer than two rows, a restart threshold without EMA counts, an unknown metric, vectors of another
            width than the rows without projection, mapped rows that would follow an EMA, parts that are not a row, or
            channels that weigh in what is no distance.
    """

    usage: torch.Tensor
    sums: torch.Tensor
    shares: torch.Tensor
    started: torch.Tensor
    channel_map: torch.Tensor

    def __init__(self, config: VQConfig, *, dim: int) -> None:
        super().__init__()
        if config.size < 2:
            raise ValueError(f"size is {config.size}; a codebook needs at least 2 rows.")
        if config.ema_decay is not None and not 0 <= config.ema_decay < 1:
            raise ValueError(f"ema_decay is {config.ema_decay:g}; give 0 or more and less than 1, for example 0.99.")
        if config.restart_below and config.ema_decay is None:
            raise ValueError("restart_below counts usage by EMA; set ema_decay (for example 0.99) or restart_below: 0.")
        if config.metric not in METRICS:
            raise ValueError(f"metric is {config.metric!r}; it must be one of {', '.join(METRICS)}.")
        if not config.project and dim != config.dim:
            raise ValueError(f"Vectors are {dim} wide and rows {config.dim}; make them equal, or set project: true.")
        if config.map_rows and config.ema_decay is not None:
            raise ValueError("map_rows trains the map alone; set ema_decay: null, or map_rows: false.")
        if config.estimator not in ESTIMATORS:
            raise ValueError(f"estimator is {config.estimator!r}; it must be one of {', '.join(ESTIMATORS)}.")
        if (config.reanchor or config.estimator == "weighed") and (config.ema_decay is not None or config.map_rows):
            raise ValueError(
                "Rows that an EMA or a map moves are neither re-anchored nor weighed; leave one of them out."
            )
        if config.estimator == "weighed" and config.metric == "l2" and not config.normalize:
            raise ValueError("estimator 'weighed' learns by dot products; choose by them too: metric: dot.")
        if config.kmeans_steps and config.map_rows:
            raise ValueError(
                "kmeans_steps moves rows, and map_rows leaves them as they were drawn; set one of the two."
            )
        if config.parts and (sum(config.parts) != config.dim or not config.normalize):
            raise ValueError(f"parts are {config.parts}; they must add up to dim {config.dim}, under normalize: true.")
        if config.channel_weights and config.metric != "l2":
            raise ValueError(f"channel_weights weigh distances and metric is {config.metric!r}; take metric: l2.")
        self.config = config
        self.sizes = (config.size,)
        self.to_rows = nn.Linear(dim, config.dim) if config.project else nn.Identity()
        self.to_vectors = nn.Linear(config.dim, dim) if config.project else nn.Identity()
        self.row_map = nn.Linear(config.dim, config.dim, bias=config.map_bias) if config.map_rows else nn.Identity()
        trains_rows = config.ema_decay is None and not config.map_rows
        self.codebook = nn.Parameter(torch.randn(config.size, config.dim), requires_grad=trains_rows)
        if config.ema_decay is not None:
            self.register_buffer("usage", torch.ones(config.size))
            self.register_buffer("sums", self.codebook.detach().clone())
        if config.reanchor:
            self.register_buffer("shares", torch.zeros(config.size))
        if config.kmeans_steps:
            self.register_buffer("started", torch.tensor(False))
        if config.channel_weights:
            self.register_buffer("channel_map", torch.eye(config.dim))

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        latents = self._normalized(self.to_rows(vectors))
        if self.config.kmeans_steps and self.training and not bool(self.started):
            self._start(latents.detach().flatten(0, 1))
        if self.config.reanchor and self.training:
            self._reanchor(latents.detach().flatten(0, 1))
        rows = self.rows()
        ids = self._choose(latents.detach().flatten(0, 1), rows.detach()).view(latents.shape[:2])
        chosen = F.embedding(ids, rows)
        loss = self.config.commitment * F.mse_loss(latents, chosen.detach())
        if self.config.ema_decay is None:
            loss = loss + F.mse_loss(chosen, latents.detach())
        elif self.training:
            self._follow(latents.detach().flatten(0, 1), ids.flatten(), self.config.ema_decay)
        if self.config.entropy:
            scores = self._scores(latents.flatten(0, 1), rows) / self.config.entropy_temperature
            loss = loss + self.config.entropy * entropy_gap(scores)
        read = ESTIMATORS[self.config.estimator](latents, ids, self._rows_of_codes())
        return Quantized(ids[..., None], self.to_vectors(read), loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.to_vectors(F.embedding(ids[..., 0], self._rows_of_codes()))

    @torch.no_grad()
    def retire_duplicates(self, counts: torch.Tensor) -> int:
        """Take rows out of the search that can hardly be told from a row that occurs more often, and say how many.

        Restarts leave such copies where most vectors lie. The rounding of a batch decides between a row and its copy,
        so that the same picture would have other codes alone than among others. A retired row decodes as the row that
        stays.

        Args:
            counts: `[size]`, how often each code occurs in pictures.

        Raises:
            ValueError: a codebook without EMA counts, which has no restarts.
        """
        if self.config.ema_decay is None:
            raise ValueError("Only EMA codebooks restart rows and keep counts; this one has no duplicates to retire.")
        rows = self._weighed(self.codebook)
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        rank = counts.argsort(descending=True).argsort()
        outranked = (distances < DUPLICATE * rows.norm(dim=1).mean()) & (rank < rank[:, None])
        retired = outranked.any(dim=1)
        stays = torch.where(outranked, rank, len(rank)).argmin(dim=1)
        self.codebook[retired] = self.codebook[stays[retired]]
        self.usage[retired] = 0.0
        return int(retired.sum())

    @torch.no_grad()
    def weigh_channels(self, vectors: torch.Tensor) -> None:
        """Measure what each principal axis counts, its variance over the mean of all, in vectors `[M, D]` as they are
        given to be quantised.

        Raises:
            ValueError: a quantizer without `channel_weights`, or vectors that do not differ.
        """
        if not self.config.channel_weights:
            raise ValueError("This codebook has no weights of channels; set channel_weights: true.")
        latents = self._normalized(self.to_rows(vectors.float()))
        variances, axes = torch.linalg.eigh(torch.cov(latents.double().T))  # columns of `axes`
        if not variances[-1] > 0:
            raise ValueError(f"{len(latents)} vectors do not differ and have no principal axes; give other pictures.")
        self.channel_map.copy_(axes * (variances.clamp_min(0) / variances.mean()).sqrt())

    def _weighed(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors or rows `[M, D]` whose plain distances are the weighed ones."""
        return vectors @ self.channel_map if self.config.channel_weights else vectors

    def _search(self, vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Ids `[M]` of vectors `[M, D]`; rows that were never used, or retired, are no choice."""
        search = best_rows if self.config.metric == "dot" else nearest_rows
        vectors, rows = self._weighed(vectors), self._weighed(rows)
        if self.config.ema_decay is None or self.training or bool((self.usage > 0).all()):
            return search(vectors, rows)
        alive = (self.usage > 0).nonzero().squeeze(1)
        return alive[search(vectors, rows[alive])]

    def _choose(self, vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Ids `[M]`: the best rows, or rows by chance in training where asked."""
        if not (self.training and self.config.sample_temperature):
            return self._search(vectors, rows)
        chances = (self._scores(vectors, rows) / self.config.sample_temperature).softmax(dim=1)
        return torch.multinomial(chances, 1)[:, 0]

    def _scores(self, vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """How well each row fits, `[M, S]`: the dot product, or minus the squared distance."""
        vectors, rows = self._weighed(vectors), self._weighed(rows)
        products = vectors @ rows.T
        if self.config.metric == "dot":
            return products
        return 2 * products - rows.square().sum(dim=1) - vectors.square().sum(dim=1, keepdim=True)

    @torch.no_grad()
    def _start(self, latents: torch.Tensor) -> None:
        """Move the rows to the means of `[M, D]` vectors; one that is nearest to none stays a vector."""
        enough = self.config.size <= len(latents)
        picks = torch.randperm(len(latents)) if enough else torch.randint(len(latents), (self.config.size,))
        rows = shared(latents[picks[: self.config.size].to(latents.device)])
        rows = lloyd(latents, rows, self.config.kmeans_steps, self._normalized)
        self.codebook.copy_(rows)
        if self.config.ema_decay is not None:
            self.sums.copy_(rows)
        self.started.fill_(True)

    @torch.no_grad()
    def _reanchor(self, latents: torch.Tensor) -> None:
        """Move each row the further towards the nearest of `[M, D]` vectors the rarer it has been."""
        weight = torch.exp(-10 * self.config.size * self.shares / (1 - SHARE_DECAY) - 1e-3)[:, None]
        rows = self.rows()
        self.codebook.lerp_(shared(latents[self._scores(latents, rows).argmax(dim=0)]), weight)
        counts = summed(torch.bincount(self._search(latents, self.rows()), minlength=self.config.size))
        self.shares.lerp_(counts / counts.sum(), 1 - SHARE_DECAY)

    def rows(self) -> torch.Tensor:
        """What vectors are compared with, `[size, dim]`; a gradient reaches what the rows are made of."""
        rows = self.row_map(self.codebook)
        return rows if self.config.raw_rows else self._normalized(rows)

    def _rows_of_codes(self) -> torch.Tensor:
        return self.row_map(self.codebook) if self.config.raw_lookup else self.rows()

    def _normalized(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.config.normalize:
            return rows
        parts = rows.split(self.config.parts or self.config.dim, dim=-1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)

    @torch.no_grad()
    def _follow(self, latents: torch.Tensor, ids: torch.Tensor, decay: float) -> None:
        counts = summed(torch.bincount(ids, minlength=self.config.size).to(latents.dtype))
        batch_sums = summed(torch.zeros_like(self.sums).index_add_(0, ids, latents))
        self.usage.lerp_(counts, 1 - decay)
        self.sums.lerp_(batch_sums, 1 - decay)
        self.codebook.copy_(self.sums / self.usage.clamp_min(1e-5)[:, None])
        dead = (self.usage < self.config.restart_below).nonzero().flatten()
        if dead.numel():
            picks = shared(latents[torch.randint(len(latents), (dead.numel(),), device=latents.device)])
            self.codebook[dead], self.sums[dead], self.usage[dead] = picks, picks, 1.0


def summed(values: torch.Tensor) -> torch.Tensor:
    """`values`, in place, as the sum over all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def shared(values: torch.Tensor) -> torch.Tensor:
    """`values`, in place, as the first process has them."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(values, src=0)
    return values


def lloyd(
    vectors: torch.Tensor, rows: torch.Tensor, steps: int, normalized: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Rows `[S, D]` moved so many times to the means of the vectors `[M, D]`, of all processes, nearest to each.

    Args:
        normalized: what is done to the means.
    """
    for _ in range(steps):
        ids = nearest_rows(vectors, rows)
        counts = summed(torch.bincount(ids, minlength=len(rows)).to(rows.dtype))[:, None]
        sums = summed(torch.zeros_like(rows).index_add_(0, ids, vectors))
        rows = normalized(torch.where(counts > 0, sums / counts.clamp_min(1), rows))
    return rows


def nearest_rows(vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Index of the row of smallest Euclidean distance, int64 `[M]`, for `[M, D]` vectors and `[S, D]` rows."""
    half_norms = rows.square().sum(dim=1) / 2
    scores = (torch.addmm(half_norms, chunk, rows.T, beta=-1) for chunk in vectors.split(_chunk(rows)))
    return torch.cat([chunk.argmax(dim=1) for chunk in scores])


def best_rows(vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Index of the row of largest dot product, shapes as in `nearest_rows`."""
    return torch.cat([(chunk @ rows.T).argmax(dim=1) for chunk in vectors.split(_chunk(rows))])


def _chunk(rows: torch.Tensor) -> int:
    return max(1, SEARCH_SCORES // len(rows))
