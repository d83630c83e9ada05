"""What a codec can be trained towards besides its pixels: features of frozen models, and the judgement of a critic.

All live outside the codec, which knows nothing of them. Those with heads of their own are in `heads` and `contrast`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from unimm.codec.tower import channel_statistics, vision_config
from unimm.nn.scripted import Lpips

EPS = 1e-4
LARGEST_WEIGHT = 1e4  # of the adaptive weight


@dataclass(frozen=True)
class FeatureConfig:
    """A frozen vision model, by anything that `AutoModel` loads.

    Args:
        model: its folder or Hub name, with its image processor; of a model of pictures and texts, the part that sees is
            taken. Empty for none.
        weight: of the loss.
        layers: of its hidden states that are compared; where features are rebuilt, the last one named.
    """

    model: str = ""
    weight: float = 1.0
    layers: tuple[int, ...] = (-1,)


@dataclass(frozen=True)
class PerceptualConfig(FeatureConfig):
    """A frozen vision model, or LPIPS where its weights are at hand.

    Args:
        lpips: NVIDIA's `vgg16.pt`, in place of a model; empty for none.

    Raises:
        ValueError: both.
    """

    lpips: str = ""

    def __post_init__(self) -> None:
        if self.model and self.lpips:
            raise ValueError(f"perceptual.model is {self.model} and perceptual.lpips {self.lpips}; name one of them.")


@dataclass(frozen=True)
class CriticConfig:
    """A critic of patches (PatchGAN, 1611.07004), trained by a hinge.

    Args:
        weight: of its judgement, beside the adaptive one; 0 for no critic.
        start: the step at which it begins to judge; it learns from then on too.
        channels: of its first layer.
        layers: of its strided convolutions; each sees twice as far.
        adaptive: whether the weight is scaled so that at the decoder's last layer its gradient is as long as that of
            the other losses (VQGAN, 2012.09841).
    """

    weight: float = 0.0
    start: int = 0
    channels: int = 64
    layers: int = 3
    adaptive: bool = True


class Features(Protocol):
    """What a frozen network sees."""

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """float `[B, 3, H, W]` in [-1, 1] to vectors `[B, ..., D]` of each layer that is compared."""


@dataclass(frozen=True)
class VisionTower:
    """What is known of a saved vision model before its weights are read.

    Args:
        config: of the part that sees.
        mean, std: of the three channels, of pixels in [0, 1], as the model knows them.
    """

    config: PreTrainedConfig
    mean: list[float]
    std: list[float]

    @property
    def side(self) -> int:
        """Pixels of its pictures."""
        return self.config.image_size


def vision_tower(model: str) -> VisionTower:
    """A vision model, or that part of a model of pictures and texts, by folder or Hub name.

    Raises:
        ValueError: a model that names no size of its pictures, or has no image processor, which knows their range.
    """
    config = vision_config(model)
    if not isinstance(config.to_dict().get("image_size"), int):
        raise ValueError(f"{model} names no image_size; take a vision model that does.")
    return VisionTower(config, *channel_statistics(model))


def patch_tower(model: str) -> VisionTower:
    """The same, of a transformer that reads squares of pixels.

    Raises:
        ValueError: as `vision_tower`, or a model of another form.
    """
    tower = vision_tower(model)
    fields = tower.config.to_dict()
    if missing := [name for name in ("patch_size", "hidden_size") if not isinstance(fields.get(name), int)]:
        raise ValueError(f"{model} has no {' or '.join(missing)}; take a vision transformer over square patches.")
    return tower


class FrozenFeatures:
    """Hidden states of a frozen model, of pixels in [-1, 1] brought to its own size and range.

    Raises:
        ValueError: as `vision_tower`.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.layers = config.layers
        tower = vision_tower(config.model)
        self.side = tower.side
        self.mean, self.std = (torch.tensor(of)[:, None, None] for of in (tower.mean, tower.std))
        self.model: PreTrainedModel = AutoModel.from_pretrained(config.model, config=tower.config)
        self.model.eval().requires_grad_(False)

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """float `[B, 3, H, W]` to the hidden states `[B, N, D]`, of unit length at every position."""
        self.model.to(pixels.device)
        resized = F.interpolate(pixels, (self.side, self.side), mode="bicubic", align_corners=False, antialias=True)
        normal = ((resized + 1) / 2 - self.mean.to(pixels)) / self.std.to(pixels)
        states = self.model(pixel_values=normal, output_hidden_states=True).hidden_states
        return [F.normalize(states[layer].float(), dim=-1) for layer in self.layers]


class CellFeatures:
    """What a frozen vision transformer sees in each square of a picture; class and register tokens fall out.

    Raises:
        ValueError: as `patch_tower`.
    """

    def __init__(self, config: FeatureConfig) -> None:
        tower = patch_tower(config.model).config
        self.num_cells, self.width = (tower.image_size // tower.patch_size) ** 2, tower.hidden_size
        self.features = FrozenFeatures(config)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float `[B, 3, H, W]` to the last of the layers, `[B, num_cells, width]`, of unit length in every cell."""
        return self.features(pixels)[-1][:, -self.num_cells :]


class LpipsFeatures:
    """The vectors of LPIPS, as one layer with one position, so that their squared distance is LPIPS itself.

    Raises:
        ValueError: a file that is not that of LPIPS.
    """

    def __init__(self, path: str) -> None:
        self.lpips = Lpips(path)

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """float `[B, 3, H, W]` to `[B, D]`."""
        return [self.lpips(pixels)]


def perceptual_features(config: PerceptualConfig) -> Features | None:
    """What the recipe names, if anything."""
    if config.lpips:
        return LpipsFeatures(config.lpips)
    return FrozenFeatures(config) if config.model else None


def perceptual_loss(features: Features, drawn: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Squared distance of features, averaged over layers and positions: LPIPS, or after it (1801.03924)."""
    with torch.no_grad():
        wanted = features(pixels)
    pairs = zip(features(drawn), wanted, strict=True)
    return torch.stack([(one - other).square().sum(dim=-1).mean() for one, other in pairs]).mean()


def distillation_loss(features: CellFeatures, rebuilt: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """One minus the mean cosine between rebuilt features `[B, M, D]` and the frozen ones.

    Raises:
        ValueError: their shapes differ.
    """
    wanted = features(pixels)
    if wanted.shape != rebuilt.shape:
        raise ValueError(
            f"The codec rebuilds features {tuple(rebuilt.shape[1:])}, the frozen model has {tuple(wanted.shape[1:])}; "
            "make the decoder's width and grid those of the model."
        )
    return cosine_loss(rebuilt, wanted)


def cosine_loss(features: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """One minus the mean cosine between features and unit ones, both `[B, M, D]`."""
    return 1 - (F.normalize(features.float(), dim=-1) * wanted).sum(dim=-1).mean()


class PatchCritic(nn.Module):
    """Pixels `[B, 3, H, W]` to a judgement of each patch, `[B, 1, h, w]`."""

    def __init__(self, config: CriticConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, config.channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = config.channels
        for layer in range(1, config.layers):
            wider = config.channels * min(2**layer, 8)
            layers += [nn.Conv2d(width, wider, 4, stride=2, padding=1), nn.GroupNorm(1, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


class PixelCritic:
    """A patch critic and what it needs to remember between the model's step and its own."""

    def __init__(self, config: CriticConfig) -> None:
        self.config = config
        self.network: nn.Module = PatchCritic(config)
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def judgement(
        self, drawn: torch.Tensor, pixels: torch.Tensor, others: torch.Tensor, last: torch.Tensor, step: int
    ) -> torch.Tensor:
        """What the model loses by what the critic thinks of `drawn`; zero before `start`.

        Args:
            others: the weighted sum of the other losses.
            last: weight of the decoder's last layer.
        """
        self.seen = (drawn.detach(), pixels)
        if step < self.config.start:
            return drawn.new_zeros(())
        self.network.to(drawn.device)
        fooled = -self.network(drawn).mean()
        return self.config.weight * (adaptive_weight(others, fooled, last) if self.config.adaptive else 1.0) * fooled

    def losses(self, network: nn.Module, step: int) -> dict[str, torch.Tensor] | None:
        if self.seen is None or step < self.config.start:
            return None
        drawn, pixels = self.seen
        hinge = F.relu(1 - network(pixels)).mean() + F.relu(1 + network(drawn)).mean()
        return {"critic": hinge / 2}


def adaptive_weight(others: torch.Tensor, fooled: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Ratio of the lengths of two losses' gradients at one weight; it carries no gradient itself."""
    one, other = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (others, fooled))
    return (one / (other + EPS)).clamp(0, LARGEST_WEIGHT).detach()
