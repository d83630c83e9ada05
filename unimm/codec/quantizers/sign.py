"""Look-up free quantisation (LFQ, 2310.05737): every channel becomes its sign, and the signs are the bits of the id."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from unimm.codec.quantizers.base import Quantized, Quantizer, straight_through
from unimm.codec.quantizers.estimators import bit_entropy_gap

MAX_BITS = 62  # of an id in int64


@dataclass(frozen=True)
class SignConfig:
    """One bit per channel.

    Args:
        spherical: whether vectors and signs are scaled to length 1 (BSQ, 2406.07548).
        lowest_first: whether channel 0 is the lowest bit of the id (Open-MAGVIT2) or the highest.
        commitment: weight of the pull of the channels towards their signs.
        entropy: weight of the gap between the entropy of each bit and that of all pictures' bits together.
        entropy_temperature: of the chance of a bit, as if both of its values were rows of a codebook.
    """

    lowest_first: bool = True
    spherical: bool = False
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_temperature: float = 1.0


class SignQuantizer(Quantizer):
    """One code of `2 ** dim` per position; there is no table.

    Raises:
        ValueError: more channels than an id has bits.
    """

    def __init__(self, config: SignConfig, *, dim: int) -> None:
        super().__init__()
        if not 1 <= dim <= MAX_BITS:
            raise ValueError(f"{dim} channels would be {dim} bits; one id holds 1 to {MAX_BITS}.")
        self.config = config
        self.sizes = (2**dim,)
        self.scale = dim**-0.5 if config.spherical else 1.0
        self.places = tuple(range(dim)) if config.lowest_first else tuple(reversed(range(dim)))

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        if self.config.spherical:
            vectors = F.normalize(vectors, dim=-1)
        bits = vectors > 0
        places = torch.tensor(self.places, device=vectors.device)
        ids = (bits.long() << places).sum(dim=-1, keepdim=True)
        signs = self._signs(bits)
        loss = self.config.commitment * (vectors - signs).square().mean()
        if self.config.entropy:  # the squared distances to both signs differ by four times the channel and the sign
            chances = (4 * self.scale * vectors / self.config.entropy_temperature).sigmoid().flatten(0, 1)
            loss = loss + self.config.entropy * bit_entropy_gap(chances)
        return Quantized(ids, straight_through(vectors, signs), loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.tensor(self.places, device=ids.device)
        return self._signs((ids >> places) & 1)

    def _signs(self, bits: torch.Tensor) -> torch.Tensor:
        return (bits.float() * 2 - 1) * self.scale

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        return (self.lookup(torch.arange(self.sizes[0]).view(1, -1, 1))[0],)
