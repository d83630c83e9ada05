"""TorchScript files with the calls of NVIDIA's, over networks of a few weights."""

from pathlib import Path

import torch
from torch import nn


class TinyInception(nn.Module):
    """Twelve features: the mean colours of the quarters of a picture."""

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        features = nn.functional.adaptive_avg_pool2d(img.float() / 255, 2).flatten(1)
        return features if return_features else features.softmax(dim=1)


class TinyVgg(nn.Module):
    """A convolution, where LPIPS is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        seen = self.conv(img / 255)
        return seen.flatten(1) if return_lpips and not resize_images else seen


class FlatVgg(TinyVgg):
    """The flags of LPIPS without its vectors."""

    def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        return self.conv(img / 255)


def save_scripted(network: nn.Module, path: Path) -> Path:
    """The file `path`."""
    torch.manual_seed(0)
    torch.jit.script(network).save(path)
    return path
