"""Codes that know their captions: pooled vectors of a picture beside the embedding of its text (UniTok, 2502.20321).

The loss is the sigmoid one of SigLIP (2303.15343) rather than a softmax over the batch. Each pair is judged alone, so
that a small batch, or the one of each of several processes, is no other task than a large one; and two pictures that
share a caption, as rendered ones often do, can both be right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    Siglip2Model,
    Siglip2TextModel,
    SiglipModel,
    SiglipTextModel,
)

from unimm.files import atomic_write
from unimm.training.loop import ON_CPU

TEXT_TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPModel,
    "clip_text_model": CLIPTextModelWithProjection,
    "siglip": SiglipModel,
    "siglip_text_model": SiglipTextModel,
    "siglip2": Siglip2Model,
    "siglip2_text_model": Siglip2TextModel,
}
TEXTS_AT_ONCE = 64
SCALE = math.log(10)  # as SigLIP begins


@dataclass(frozen=True)
class ContrastConfig:
    """A frozen text tower that pictures are to be told apart by.

    Args:
        model: folder or Hub name of a CLIP or SigLIP, or of its text model alone, with the tokenizer; empty for none.
        weight: of the loss.
    """

    model: str = ""
    weight: float = 1.0


def text_tower(name: str) -> type[PreTrainedModel]:
    """The class of a saved model of texts.

    Raises:
        ValueError: another kind of model.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in TEXT_TOWERS:
        raise ValueError(
            f"contrast.model is {name}, of model_type {config.model_type!r}; take one of {', '.join(TEXT_TOWERS)}."
        )
    if CLIPTextModel.__name__ in (config.architectures or ()):
        return CLIPTextModel  # it was saved without a projection
    return TEXT_TOWERS[config.model_type]


class TextTower:
    """Captions to unit embeddings.

    Raises:
        ValueError: as `text_tower`.
    """

    def __init__(self, name: str) -> None:
        tower = text_tower(name)
        self.model = tower.from_pretrained(name).to(PartialState(cpu=ON_CPU).device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        # Each as it was trained.
        self.padding = "max_length" if self.model.config.model_type.startswith("siglip") else "longest"

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """float32 `[len(captions), W]`."""
        length = self.model.config.get_text_config().max_position_embeddings
        inputs = self.tokenizer(
            list(captions), padding=self.padding, truncation=True, max_length=length, return_tensors="pt"
        )
        # Neither needs a mask: CLIP looks back only, and SigLIP was trained to see the padding.
        ids = inputs["input_ids"].to(self.model.device)
        if isinstance(self.model, CLIPTextModelWithProjection):
            pooled = self.model(ids).text_embeds
        elif isinstance(self.model, CLIPModel | SiglipModel | Siglip2Model):
            pooled = self.model.get_text_features(ids).pooler_output
        else:
            pooled = self.model(ids).pooler_output
        return F.normalize(pooled.float(), dim=-1)


class CaptionEmbeddings:
    """Embeddings of the captions of a pool, made once and kept in `path`.

    Raises:
        ValueError: as `TextTower`.
    """

    def __init__(self, config: ContrastConfig, captions: Sequence[str], path: Path) -> None:
        distinct, self.which = np.unique(np.asarray(captions), return_inverse=True)
        if not path.exists():
            tower = TextTower(config.model)
            starts = tqdm(range(0, len(distinct), TEXTS_AT_ONCE), desc="captions")
            rows = torch.cat([tower(distinct[start : start + TEXTS_AT_ONCE].tolist()) for start in starts])
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, rows.cpu().numpy())
        self.rows = torch.from_numpy(np.load(path))  # [number of distinct ones, W]

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def __getitem__(self, picked: np.ndarray) -> torch.Tensor:
        """Of pictures by their numbers in the pool, float32 `[B, W]`."""
        return self.rows[self.which[picked]]


class ContrastHead(nn.Module):
    """A linear map of pooled vectors to the width of the texts, and the scale and bias of their cosines.

    The bias begins at the odds of a pair in a batch, which are the -10 of SigLIP in its batches of 32k.
    """

    def __init__(self, dim: int, width: int, *, batch_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.scale = nn.Parameter(torch.tensor(SCALE))
        self.bias = nn.Parameter(torch.tensor(-math.log(batch_size)))

    def forward(self, vectors: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Mean over the pictures of what all pairs cost, of `[B, N, D]` and their unit texts `[B, W]`."""
        pictures = F.normalize(self.project(vectors.mean(dim=1)).float(), dim=-1)
        with torch.autocast(texts.device.type, enabled=False):
            logits = self.scale.exp() * pictures @ texts.T + self.bias
        number = torch.unique(texts, dim=0, return_inverse=True)[1]
        sign = torch.where(number[:, None] == number, 1.0, -1.0)  # equal captions belong to each other's pictures
        return -F.logsigmoid(sign * logits).sum() / len(pictures)
