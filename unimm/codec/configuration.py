"""The codec's configuration: one typed group of keys per socket, `kind` naming the value, the rest its options."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from unimm.codec.flow import FlowOptions
from unimm.codec.length import LENGTH_POLICIES, LengthPolicy
from unimm.codec.message import MessageFlowConfig, check_one_network
from unimm.codec.quantizers import QUANTIZERS
from unimm.codec.sockets import DECODERS, ENCODERS, RESAMPLERS
from unimm.codec.tower import around_tower
from unimm.codec.vae import VaeConfig, around_vae
from unimm.config import did_you_mean, from_dict

SOCKETS: dict[str, dict[str, type]] = {
    "encoder": {kind: config for kind, (config, _) in ENCODERS.items()},
    "resampler": {kind: config for kind, (config, _) in RESAMPLERS.items()},
    "quantizer": {kind: config for kind, (config, _) in QUANTIZERS.items()},
    "length": dict(LENGTH_POLICIES),
    "decoder": {kind: config for kind, (config, _) in DECODERS.items()},
}

# Values of sockets that do one thing together: decide how many codes a picture has, or read and draw by one network.
# None of a set goes without the others.
TOGETHER: tuple[dict[str, str], ...] = (
    {"resampler": "select", "length": "kept"},
    {"resampler": "halting", "length": "halted", "decoder": "kept_vit"},
    {"encoder": "crops", "resampler": "message", "decoder": "message_flow"},
)


def socket_config(socket: str, options: dict[str, Any]) -> Any:
    """The typed config of one socket, from `{"kind": ..., **options}`.

    Raises:
        ValueError: unknown kind or option.
    """
    kinds = SOCKETS[socket]
    kind = options.get("kind")
    if kind not in kinds:
        hint = did_you_mean(str(kind), kinds, n=1)
        raise ValueError(f"{socket}.kind is {kind!r}; it must be one of {', '.join(kinds)}.{hint}")
    return from_dict(kinds[kind], {key: value for key, value in options.items() if key != "kind"}, where=socket)


def described(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a codec's configuration with what `encoder.tower` and `vae` say where these name a folder or Hub model.

    Raises:
        ValueError: they are no models that a codec can lie around or within, or fields do not fit them.
    """
    tower, vae = fields.get("encoder", {}).get("tower"), fields.get("vae")
    if isinstance(tower, str):
        fields = around_tower(tower, fields)
    return around_vae(vae, fields) if isinstance(vae, str) else fields


@strict
class VisualCodecConfig(PreTrainedConfig):
    """Encoder -> Resampler -> Quantizer -> LengthPolicy -> Decoder, each `{"kind": name, **options}`.

    Args:
        image_size: side in pixels that the image processor resizes to; in latents, of a codec that reads them and has
            no `vae`.
        pixel_range: lowest and highest value of a pixel, black and white, on both sides of the codec.
        pixel_mean, pixel_std: of each channel, by which pictures in [0, 1] are normalised for a codec around a vision
            tower; `pixel_range` then follows from them. None where all channels have that range.
        resize: whether pictures of other sizes are stretched to the square of `image_size` rather than refused.
        encoder, resampler, quantizer, length, decoder: the sockets; see the module of each for kinds and options.
            An empty `length` is fixed at `image_size`.
        vae: fields of the `diffusers.AutoencoderKL` whose latents the encoder reads and the decoder draws, where they
            have `latent_channels`; the codec then takes and gives pixels. None where it takes and gives the latents.

    Raises:
        ValueError: unknown kinds or options, or sockets that do not fit each other.
    """

    model_type = "unimm_codec"

    image_size: int = 128
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    pixel_mean: list[float] | None = None
    pixel_std: list[float] | None = None
    resize: bool = False
    encoder: dict[str, Any] = field(default_factory=lambda: {"kind": "conv"})
    resampler: dict[str, Any] = field(default_factory=lambda: {"kind": "grid"})
    quantizer: dict[str, Any] = field(default_factory=lambda: {"kind": "fsq"})
    length: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=lambda: {"kind": "conv"})
    vae: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pixel_mean is not None or self.pixel_std is not None:
            black, white = self._normalised_bounds()
            self.pixel_range = (min(black), max(white))
        self.pixel_range = (float(self.pixel_range[0]), float(self.pixel_range[1]))
        if not self.length:
            side = self.image_size // self.downsample
            self.length = {"kind": "fixed", "rows": side, "columns": side}
        self._check_sockets()
        super().__post_init__(**kwargs)

    def _check_sockets(self) -> None:
        """Check every socket's options, and that a decoder of grids undoes the encoder's downsampling."""
        for socket in SOCKETS:
            socket_config(socket, getattr(self, socket))
        if self.pixel_range[0] >= self.pixel_range[1]:
            raise ValueError(f"pixel_range is {self.pixel_range}; name the lowest value, then the highest.")
        decoder = socket_config("decoder", self.decoder)
        keeps_grid = self.length_policy.layout == "grid" and decoder.makes_pixels and decoder.mirrors_encoder
        if keeps_grid and decoder.upsample != self.downsample:
            raise ValueError(
                f"The encoder divides sizes by {self.downsample}, the decoder multiplies by {decoder.upsample}."
            )
        if self.vae is not None:
            self._check_vae(VaeConfig(self.vae))
        for together in TOGETHER:
            kinds = {socket: getattr(self, socket)["kind"] for socket in together}
            if kinds != together and any(kinds[socket] == kind for socket, kind in together.items()):
                shown = " and ".join(f"{socket}.kind is {kind!r}" for socket, kind in kinds.items())
                raise ValueError(f"{shown}; {', '.join(map(repr, together.values()))} go together.")
        if isinstance(decoder, MessageFlowConfig):
            encoder, resampler = socket_config("encoder", self.encoder), socket_config("resampler", self.resampler)
            check_one_network(encoder, resampler, self.length_policy, decoder)
        self.grid(self.image_size, self.image_size)

    def _check_vae(self, vae: VaeConfig) -> None:
        """Check that something reads or draws latents, those of this VAE and as many as a picture has."""
        decoder = socket_config("decoder", self.decoder)
        channels = {"encoder": socket_config("encoder", self.encoder).latents, "decoder": decoder.latents}
        if not any(channels.values()):
            raise ValueError(
                f"vae is set, and neither the encoder {self.encoder['kind']!r} nor the decoder "
                f"{self.decoder['kind']!r} works in latents; give latent_channels to one that can, or leave vae out."
            )
        for socket, count in channels.items():
            if count not in (0, vae.channels):
                raise ValueError(
                    f"{socket}.latent_channels is {count} and the VAE's latents have {vae.channels}; make them equal."
                )
        if isinstance(decoder, FlowOptions) and decoder.latents:
            drawn = tuple(side * decoder.patch * vae.factor for side in (decoder.rows, decoder.columns))
            if drawn != (self.image_size, self.image_size):
                raise ValueError(
                    f"The decoder draws {drawn[0]} x {drawn[1]} pixels, patches of {decoder.patch} latents of "
                    f"{vae.factor} pixels, and image_size is {self.image_size}; make them equal."
                )

    def _normalised_bounds(self) -> tuple[list[float], list[float]]:
        mean, std = self.pixel_mean, self.pixel_std
        if mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"pixel_mean is {mean} and pixel_std {std}; name three of each, the second above 0.")
        pairs = list(zip(mean, std, strict=True))
        return [-centre / spread for centre, spread in pairs], [(1 - centre) / spread for centre, spread in pairs]

    @property
    def pixel_bounds(self) -> tuple[list[float], list[float]]:
        """Black and white of the three channels."""
        if self.pixel_mean is None:
            return [self.pixel_range[0]] * 3, [self.pixel_range[1]] * 3
        return self._normalised_bounds()

    @property
    def downsample(self) -> int:
        """Pixels per grid cell, on each side; latents, where those are read and there is no VAE."""
        encoder = socket_config("encoder", self.encoder)
        return encoder.downsample * (VaeConfig(self.vae).factor if self.vae is not None and encoder.latents else 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The encoder's grid of a picture of `height` x `width` pixels.

        Raises:
            ValueError: the codec cannot take this size.
        """
        if socket_config("encoder", self.encoder).drops_margin:
            height, width = height - height % self.downsample, width - width % self.downsample
        return self.length_policy.grid(height, width, self.downsample)

    @property
    def reads_pixels(self) -> bool:
        """Whether the codec reads pictures, rather than the latents of another autoencoder."""
        return self.vae is not None or not socket_config("encoder", self.encoder).latents

    @property
    def draws_pixels(self) -> bool:
        """Whether the codec draws pictures, rather than features or the latents of another autoencoder."""
        decoder = socket_config("decoder", self.decoder)
        return decoder.makes_pixels or (self.vae is not None and decoder.latents > 0)

    @property
    def in_channels(self) -> int:
        """Channels of what the codec reads."""
        return 3 if self.reads_pixels else socket_config("encoder", self.encoder).in_channels

    @property
    def length_policy(self) -> LengthPolicy:
        return socket_config("length", self.length)
