"""Pictures read as features (LaVIT, 2309.04669) or as the vectors of their codes (ETT, 2505.10562), not as ids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unimm.codec import Merger, VisualCodecModel, socket_config


class FeatureReader(nn.Module):
    """A merger of its own over the cells that the codec keeps, and a map to the language model's width.

    Args:
        codec: that selects cells.
        width: of the language model.

    Raises:
        ValueError: a codec that selects no cells.
    """

    def __init__(self, codec: VisualCodecModel, width: int) -> None:
        super().__init__()
        if codec.config.resampler["kind"] != "select":
            raise ValueError(
                f"reads_features is set and the codec's resampler is {codec.config.resampler['kind']!r}; only codecs "
                "that select cells ('select') are read as features."
            )
        cells = socket_config("encoder", codec.config.encoder).width
        self.merger = Merger(cells, socket_config("resampler", codec.config.resampler))
        self.project = nn.Linear(cells, width)

    def forward(self, cells: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Cells `[B, N, C]` of which `keep` `[B, N]` counts, to `[B, N, width]`; dropped ones stand for nothing."""
        dtype = self.project.weight.dtype
        return self.project(self.merger(cells.to(dtype), keep.to(dtype)))


class VectorReader(nn.Module):
    """The vectors of codes, mapped to the language model's width, so that what is said of a picture can teach its codec
    (ETT, 2505.10562): rows of an embedding have no gradient for what chose them.

    Args:
        dim: width of the vectors.
        width: of the language model.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, width)
        self.down = nn.Linear(width, width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[B, N, dim]` to `[B, N, width]`."""
        return self.down(F.gelu(self.up(vectors.to(self.up.weight.dtype))))
