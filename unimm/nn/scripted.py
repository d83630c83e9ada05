"""The two networks that papers compare pictures by, from the TorchScript files that NVIDIA publishes with StyleGAN.

A file brings its weights and its own code, which TorchScript runs without Python: take it from where it is published.
Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch


class ScriptedNetwork:
    """A frozen network of a TorchScript file, pictures to vectors.

    Args:
        path: of the file.
        flags: what it is called with beside the pictures.
        published: name of the file that has these flags, for errors.
        device: where it runs; None for where the pictures are.

    Raises:
        ValueError: no such file, one that is not TorchScript, or one that takes no such flags.
    """

    def __init__(
        self, path: str | Path, flags: dict[str, bool], published: str, device: str | torch.device | None
    ) -> None:
        self.path, self.flags, self.published, self.device = Path(path), flags, published, device
        if not self.path.is_file():
            raise ValueError(f"There is no file {path}; download NVIDIA's {published} and name it.")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is not a TorchScript file; take NVIDIA's {published}.") from error
        for weight in self.network.parameters():
            weight.requires_grad_(False)
        taken = [argument.name for argument in self.network.forward.schema.arguments]
        if missing := [flag for flag in flags if flag not in taken]:
            raise ValueError(
                f"The network in {path} takes {', '.join(taken[1:])}, and not {', '.join(missing)}; take NVIDIA's "
                f"{published}."
            )

    @property
    def name(self) -> str:
        """Of the file, with a digest of its bytes."""
        return f"{self.path.name}@{hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]}"

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` in [0, 255] to float32 `[B, D]`, where it runs.

        Raises:
            ValueError: the network makes something else.
        """
        device = self.device or pictures.device
        made = self.network.to(device)(pictures.to(device), **self.flags)
        if not isinstance(made, torch.Tensor) or made.ndim != 2 or len(made) != len(pictures):
            seen = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise ValueError(
                f"The network in {self.path} makes {seen} of {len(pictures)} pictures, which should be as many rows of "
                f"numbers; take NVIDIA's {self.published}."
            )
        return made.float()


class Inception:
    """Features of the network that FID is defined by (1706.08500), which resizes pictures by itself, as in StyleGAN.

    Args:
        path: NVIDIA's `inception-2015-12-05.pt`.
        device: where it runs; None for where the pixels are.

    Raises:
        ValueError: another file.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None) -> None:
        self.network = ScriptedNetwork(path, {"return_features": True}, "inception-2015-12-05.pt", device)
        self.name = self.network.name

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float `[B, 3, H, W]` in [-1, 1] to float32 `[B, 2048]` on the CPU."""
        levels = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
        return self.network(levels).cpu()


class Lpips:
    """LPIPS over VGG-16 (1801.03924), as vectors whose squared distance it is; gradients reach the pixels.

    Args:
        path: NVIDIA's `vgg16.pt`.
        device: where it runs; None for where the pixels are.

    Raises:
        ValueError: another file.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None) -> None:
        flags = {"resize_images": False, "return_lpips": True}
        self.network = ScriptedNetwork(path, flags, "vgg16.pt", device)
        self.name = self.network.name

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """float `[B, 3, H, W]` in [-1, 1], of 16 pixels a side or more, to float32 `[B, D]` where it runs."""
        return self.network((pixels + 1) * 127.5)
