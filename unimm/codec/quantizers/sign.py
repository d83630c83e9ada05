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
        slots: channels of each of several codes, in order, as (6, 12) of Open-MAGVIT2's 18 for a language model, or 128
            times 1 (UniWeTok, 2602.14178); empty for one code of all.
        bounded: whether channels are first held within 1 and -1 by a tanh of half of them (UniWeTok), so that neither
            the commitment nor the entropy drives them away.
        spherical: whether vectors and signs are scaled to length 1 (BSQ, 2406.07548).
        lowest_first: whether channel 0 is the lowest bit of the id (Open-MAGVIT2) or the highest.
        commitment: weight of the pull of the channels towards their signs.
        entropy: weight of the gap between the entropy of each bit and that of all pictures' bits together.
        entropy_temperature: of the chance of a bit, as if both of its values were rows of a codebook.
    """

    lowest_first: bool = True
    slots: tuple[int, ...] = ()
    bounded: bool = False
    spherical: bool = False
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_temperature: float = 1.0


class SignQuantizer(Quantizer):
    """A code of `2 ** channels` per slot; there is no table.

    Raises:
        ValueError: more channels than an id has bits, or slots that do not add up to the channels.
    """

    def __init__(self, config: SignConfig, *, dim: int) -> None:
        super().__init__()
        slots = config.slots or (dim,)
        if min(slots) < 1 or max(slots) > MAX_BITS:
            raise ValueError(f"Slots of {', '.join(map(str, slots))} channels; one id holds 1 to {MAX_BITS} bits.")
        if sum(slots) != dim:
            raise ValueError(f"slots are {slots}, {sum(slots)} channels, and vectors have {dim}; make them equal.")
        self.config = config
        self.sizes = tuple(2**channels for channels in slots)
        self.scale = dim**-0.5 if config.spherical else 1.0
        self.slots = tuple(slot for slot, channels in enumerate(slots) for _ in range(channels))  # of each channel
        rising = (range(channels) for channels in slots)
        self.places = tuple(place for places in rising for place in (places if config.lowest_first else places[::-1]))

    def quantize(self, vectors: torch.Tensor) -> Quantized:
        if self.config.bounded:
            vectors = (vectors / 2).tanh()
        if self.config.spherical:
            vectors = F.normalize(vectors, dim=-1)
        bits = vectors > 0
        slots, places = (torch.tensor(values, device=vectors.device) for values in (self.slots, self.places))
        ids = bits.new_zeros(*bits.shape[:2], len(self.sizes), dtype=torch.int64)
        ids.index_add_(2, slots, bits.long() << places)
        signs = self._signs(bits)
        loss = self.config.commitment * (vectors - signs).square().mean()
        if self.config.entropy:  # the squared distances to both signs differ by four times the channel and the sign
            chances = (4 * self.scale * vectors / self.config.entropy_temperature).sigmoid().flatten(0, 1)
            loss = loss + self.config.entropy * bit_entropy_gap(chances)
        return Quantized(ids, straight_through(vectors, signs), loss)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        slots, places = (torch.tensor(values, device=ids.device) for values in (self.slots, self.places))
        return self._signs((ids[..., slots] >> places) & 1)

    @torch.no_grad()
    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        channels = torch.bincount(torch.tensor(self.slots)).tolist()
        ids = torch.arange(max(self.sizes))[:, None].expand(-1, len(self.sizes))
        vectors = self.lookup(ids[None])[0].split(channels, dim=-1)  # behind a slot's own ids they begin again
        return tuple(part[:size] for part, size in zip(vectors, self.sizes, strict=True))

    def _signs(self, bits: torch.Tensor) -> torch.Tensor:
        return (bits.float() * 2 - 1) * self.scale
