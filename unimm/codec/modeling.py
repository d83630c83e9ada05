"""The visual codec: pixels to codes and back, five sockets in reading order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from unimm.codec.checks import check_condition, check_pixels
from unimm.codec.configuration import VisualCodecConfig, described, socket_config
from unimm.codec.decoders import DecoderOptions
from unimm.codec.dual import TwoSidedDecoder
from unimm.codec.flow import Flow
from unimm.codec.halting import HaltingResampler, KeptViTDecoder, encode_unhalted, learn_to_halt, places_of
from unimm.codec.latents import LatentResampler
from unimm.codec.length import Arrangement
from unimm.codec.message import CropsEncoder, MessageFlow, MessageResampler, Written, offset_of, write_message
from unimm.codec.quantizers import QUANTIZERS, Quantized, Quantizer
from unimm.codec.resamplers import Resampler, SequenceResampler
from unimm.codec.selection import SelectResampler, padded
from unimm.codec.sockets import DECODERS, ENCODERS, RESAMPLERS
from unimm.codec.tower import TowerEncoder
from unimm.codec.vae import Vae, VaeConfig
from unimm.codes import CodeSpec, VisualCodes


@dataclass
class CodecOutput(ModelOutput):
    """What a training step needs.

    Args:
        reconstruction: `[B, 3, H, W]`, about [-1, 1], not clamped; of a codec without pixels, its features; of one
            that draws the latents of another autoencoder, those, which `pixels_of` takes to pixels where that lies
            around it.
        ids: int64 `[B, N, K]`, zeros on the right of pictures with fewer codes.
        quantizer_loss: scalar.
        features: of a codec that rebuilds features beside pixels.
        velocity_loss: scalar, of a codec that draws by a flow; its reconstruction is then what one prediction makes of
            the noisy picture.
        vectors: float32 `[B, N, D]`, what all codes of a picture stand for, with those that `num_tokens` leaves out;
            None where pictures of one size differ in their number.
        halting_loss: scalar, of a codec whose latents halt: whether those halted that the copy did without.
        cells: `[B, D, rows, columns]`, the encoder's features; None where pictures of one size differ in their number
            of codes.
    """

    reconstruction: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    quantizer_loss: torch.Tensor | None = None
    features: torch.Tensor | None = None
    velocity_loss: torch.Tensor | None = None
    vectors: torch.Tensor | None = None
    halting_loss: torch.Tensor | None = None
    cells: torch.Tensor | None = None


class VisualCodecModel(PreTrainedModel):
    """A visual tokenizer: Encoder -> Resampler -> Quantizer -> LengthPolicy -> Decoder.

    Pixels are float `[B, 3, H, W]` in `config.pixel_range`, [-1, 1] unless a published codec has another. All weights
    stay in float32 under a half-precision load, since rounding the encoder flips codes. A codec of latents takes and
    gives pixels where `config.vae` says of which autoencoder, which is frozen.
    """

    config_class = VisualCodecConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _keep_in_fp32_modules_strict = ["encoder", "resampler", "quantizer", "decoder", "absent", "vae"]

    config: VisualCodecConfig
    quantizer: Quantizer
    resampler: Resampler

    def __init__(self, config: VisualCodecConfig) -> None:
        super().__init__(config)
        encoder, resampler = socket_config("encoder", config.encoder), socket_config("resampler", config.resampler)
        decoder = socket_config("decoder", config.decoder)
        self.encoder = ENCODERS[config.encoder["kind"]][1](encoder)
        self.resampler = RESAMPLERS[config.resampler["kind"]][1](
            resampler, encoder_width=encoder.width, decoder_width=decoder.in_width
        )
        quantizer_class = QUANTIZERS[config.quantizer["kind"]][1]
        self.quantizer = quantizer_class(socket_config("quantizer", config.quantizer), dim=resampler.dim)
        self.length = config.length_policy
        self.decoder = DECODERS[config.decoder["kind"]][1](decoder)
        self.decoder_options: DecoderOptions = decoder
        self._reads_latents = encoder.latents > 0
        self.dim = self.quantizer.out_dim(resampler.dim)
        self._check_widths(decoder.in_width, decoder.condition_size)
        self.absent = nn.Parameter(torch.zeros(self.dim)) if self.length.filled else None
        self.vae = Vae(VaeConfig(config.vae)) if config.vae is not None else None
        self._frozen = [name for name, weight in self.named_parameters() if not weight.requires_grad]
        self.post_init()

    def train(self, mode: bool = True) -> VisualCodecModel:
        """Weights that do not learn by the configuration stay so; loading has made them trainable."""
        super().train(mode)
        for name in self._frozen:
            self.get_parameter(name).requires_grad_(False)
        return self

    def _check_widths(self, in_width: int, drawing: tuple[int, int] | None) -> None:
        """Check that codes are as wide as what reads them, and that one text serves both sides."""
        if isinstance(self.resampler, SequenceResampler) and in_width != self.dim:
            raise ValueError(
                f"Codes stand for vectors of {self.dim} channels, by resampler.dim, and the decoder reads {in_width}; "
                "make them equal."
            )
        reading = self.resampler.condition_size
        if reading is not None and drawing is not None and reading != drawing:
            raise ValueError(
                f"The resampler reads {reading[0]} text features of {reading[1]} channels, the decoder {drawing[0]} of "
                f"{drawing[1]}; one text serves both: make them equal."
            )

    @classmethod
    def begin(cls, **fields: Any) -> VisualCodecModel:
        """A codec with fresh weights, apart from those of the saved models that its configuration names.

        Args:
            fields: of the configuration. `encoder.tower` may be the folder or Hub name of a vision model, and `vae`
                that of an autoencoder of diffusers.

        Raises:
            ValueError: other kinds of models, or fields that do not fit them.
        """
        codec = cls(VisualCodecConfig(**described(fields)))
        tower, vae = fields.get("encoder", {}).get("tower"), fields.get("vae")
        if isinstance(tower, str):
            assert isinstance(codec.encoder, TowerEncoder)
            codec.encoder.load(tower)
        if isinstance(vae, str):
            assert codec.vae is not None
            codec.vae.load(vae)
        return codec

    @classmethod
    def from_tower(cls, tower: str | Path, **fields: Any) -> VisualCodecModel:
        """A codec around a saved vision model, the other sockets with fresh weights.

        Args:
            tower: folder or Hub name of a model as of `TowerEncoderConfig`, with its image processor.
            fields: of the configuration; `encoder` may hold `layers` and `learns`.

        Raises:
            ValueError: another kind of model, or fields that do not fit it.
        """
        return cls.begin(**fields | {"encoder": fields.get("encoder", {}) | {"kind": "tower", "tower": str(tower)}})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VisualCodecModel:
        """Moves it, and leaves its precision: `.to(torch.bfloat16)` of a model around it would flip codes."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        return super()._apply(moved, recurse)

    def encode(
        self,
        pixel_values: torch.Tensor,
        *,
        condition: torch.Tensor | None = None,
        num_tokens: int | None = None,
        allowed_error: float | None = None,
        generator: torch.Generator | None = None,
    ) -> VisualCodes:
        """Codes of a batch of pictures; of a codec without a codebook, latents as `side_info["latents"]`, `[B, N, D]`.

        Args:
            pixel_values: float `[B, 3, H, W]` in `config.pixel_range`, or latents `[B, C, H, W]` where the codec reads
                those of another autoencoder that does not lie around it.
            condition: float `[B, L, D]` text features, for codecs that read under a text.
            num_tokens: the number of positions wanted; by default as many as the codec makes of this size. Of a codec
                whose latents halt it is that of latents, of which the codes of `side_info["places"]`, int64 `[B, N]`,
                are kept.
            allowed_error: what such a codec is asked for, a mean absolute difference between pixels as a share of
                their range; by default its own.
            generator: of the choice of positions, for a codec that selects them by chance in its release; without one
                the same picture always has the same codes.

        Raises:
            ValueError: wrong shape or range, a size the codec cannot take, a `num_tokens` it cannot make of it, an
                `allowed_error` that it cannot be asked for, or a condition that is missing or not wanted.
        """
        pixel_values = self._fit(pixel_values)
        arrangement = self.length.arrange(check_pixels(self.config, pixel_values), num_tokens)
        check_condition(condition, len(pixel_values), self.resampler.condition_size, "encodes")
        if allowed_error is not None and not isinstance(self.resampler, HaltingResampler):
            raise ValueError(f"allowed_error is {allowed_error}; this codec makes as many codes whatever the error.")
        with torch.no_grad():
            if isinstance(self.resampler, SelectResampler):
                quantized, mask = self._quantize_kept(self.resampler, pixel_values, generator)
                return VisualCodes(quantized.ids, mask)
            if isinstance(self.resampler, HaltingResampler):
                features = self.encoder(self._read(pixel_values))
                return encode_unhalted(self.resampler, self.quantizer, features, arrangement.length, allowed_error)
            written = None
            if isinstance(self.resampler, MessageResampler):
                written = self._written(pixel_values)
                quantized = written.quantized
            else:
                cells = self.encoder(self._read(pixel_values))
                quantized = self.quantizer(self._positions(_averaged(cells, arrangement), arrangement.pool, condition))
        ids = quantized.ids[:, : arrangement.length]
        if self.length.layout == "grid":
            codes = VisualCodes.from_grid(ids.unflatten(1, (arrangement.rows, arrangement.columns)))
        else:
            codes = VisualCodes(ids, torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device))
        codes.side_info |= self._sizes(pixel_values)
        if written is not None:
            codes.side_info["offset"] = written.offset
        if not self.quantizer.sizes:
            codes.side_info["latents"] = quantized.vectors[:, : arrangement.length]
        return codes

    def kept_cells(
        self, pixel_values: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `[B, N, C]` of every cell, before they are merged, and which are kept, `[B, N]` of zeros and ones.

        Raises:
            ValueError: as `encode`, or a codec that selects no cells.
        """
        if not isinstance(self.resampler, SelectResampler):
            raise ValueError("This codec keeps every cell; only one that selects them tells which.")
        pixel_values = self._fit(pixel_values)
        check_pixels(self.config, pixel_values)
        with torch.no_grad():
            features = self.encoder(self._read(pixel_values))
            return features.flatten(2).transpose(1, 2), self.resampler.select(features, generator)

    def lookup(self, codes: VisualCodes) -> torch.Tensor:
        """The vectors that the codes stand for, float32 `[B, N, D]`.

        Raises:
            ValueError: ids out of range, or a codec without ids and codes without latents.
        """
        codes.validate(self.spec_without_fingerprint)
        if not self.quantizer.sizes:
            return self._latents(codes)
        return self.quantizer.lookup(codes.ids.masked_fill(~codes.mask[..., None], 0))

    def _filled(self, vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors `[B, N, D]`, of a codec whose decoder sees all positions as `[B, tokens, D]`."""
        if self.absent is None:
            return vectors
        missing = self.length.max_learned - vectors.shape[1]
        vectors, mask = F.pad(vectors, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        return torch.where(mask[..., None], vectors, self.absent)

    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        """What each code of each slot stands for, K times float32 `[size, D of the slot]`."""
        return self.quantizer.code_vectors()

    def decode(
        self,
        codes: VisualCodes,
        *,
        condition: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Pictures `[B, 3, H, W]`, about `config.pixel_range` and not clamped; of a codec without pixels, its features,
        or the latents of another autoencoder `[B, C, H, W]` that does not lie around it.

        Args:
            codes: of `encode`, or ids of the same shape. Where they leave the size of the picture open it is
                `side_info["size"]`, int64 `[B, 2]` of height and width, and without that `config.image_size` squared.
                Where they are those of some latents, `side_info["places"]` says of which; without it, of the first. Of
                a message, `side_info["offset"]` says where the crop lay that was read last; without it, in the corner
                where raster order ends.
            condition: float `[B, L, D]` text features, for decoders that draw under a text.
            generator: of the noise that a flow draws from; without one the same codes always give the same picture.

        Raises:
            ValueError: ids out of range, codes of several sizes, or a condition that is missing or not wanted.
        """
        grid = self._check_codes(codes)
        check_condition(condition, len(codes), self.decoder_options.condition_size, "decodes")
        with torch.no_grad():
            if isinstance(self.decoder, KeptViTDecoder):
                return self.decoder(self.lookup(codes), codes.mask, places_of(codes, self.length.max_length))
            if isinstance(self.decoder, MessageFlow):
                offset = offset_of(codes, self._crop_offsets[-1])
                return self.pixels_of(self.decoder(self.lookup(codes), offset, generator))
            vectors = self._filled(self.lookup(codes), codes.mask)
            if self.length.ragged:
                return self.decoder(self.resampler.restore(vectors, grid), codes.mask)
            if isinstance(self.decoder, Flow):
                return self.pixels_of(self.decoder(self.resampler.restore(vectors, grid), generator))
            return self._draw(vectors, grid, condition, self._drawn_size(codes))

    def pixels_of(self, drawn: torch.Tensor) -> torch.Tensor:
        """What the decoder drew, as pixels where it drew the latents of the autoencoder around the codec."""
        if self.vae is None or not self.decoder_options.latents:
            return drawn
        return self.from_shown(self.vae.decode(drawn))

    def features(self, codes: VisualCodes) -> torch.Tensor:
        """What the codes mean rather than show: features `[B, M, D]` that the codec rebuilds of a vision tower.

        Raises:
            ValueError: as `decode`, or a codec that rebuilds pixels alone.
        """
        if not self.decoder_options.makes_features:
            raise ValueError(
                "This codec rebuilds pixels and no features; lookup(codes) gives the vectors of its codes."
            )
        if not self.decoder_options.makes_pixels:
            return self.decode(codes)
        grid = self._check_codes(codes)
        with torch.no_grad():
            return self._features(self.lookup(codes), grid, self._drawn_size(codes))

    def pictures(self, codes: VisualCodes, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """What to show: pictures `[B, 3, H, W]` in [-1, 1], whatever the codec's own range of pixels.

        Raises:
            ValueError: as `decode`, or a codec that decodes to features and needs a detokenizer to draw.
        """
        if not self.config.draws_pixels and self.decoder_options.latents:
            raise ValueError(
                "This codec draws the latents of another autoencoder; give decode(codes) to its decoder, or a codec "
                "with config.vae that autoencoder."
            )
        if not self.config.draws_pixels:
            raise ValueError("This codec decodes to features, not to pixels; draw its codes with a detokenizer.")
        return self.to_shown(self.decode(codes, condition=condition)).clamp(-1, 1)

    def to_shown(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of the codec's own range as pixels in [-1, 1]."""
        if self.shows_as_it_reads:
            return pixels
        black, white = (pixels.new_tensor(bound)[:, None, None] for bound in self.config.pixel_bounds)
        return (pixels - black) * (2 / (white - black)) - 1

    def from_shown(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] as pixels of the codec's own range."""
        if self.shows_as_it_reads:
            return pixels
        black, white = (pixels.new_tensor(bound)[:, None, None] for bound in self.config.pixel_bounds)
        return (pixels + 1) * ((white - black) / 2) + black

    @property
    def shows_as_it_reads(self) -> bool:
        """Whether its own range of pixels is [-1, 1], that of every picture here."""
        return self.config.pixel_mean is None and self.config.pixel_range == (-1.0, 1.0)

    def reconstruct(self, pixel_values: torch.Tensor, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """One trip through the codes: `decode(encode(pixel_values))`."""
        reading, drawing = self.conditions(condition)
        return self.decode(self.encode(pixel_values, condition=reading), condition=drawing)

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        condition: torch.Tensor | None = None,
        num_tokens: int | torch.Tensor | None = None,
    ) -> CodecOutput:
        """A differentiable trip through the quantizer, for training.

        Args:
            pixel_values, condition: as for `encode` and `decode`.
            num_tokens: as for `encode`, or int64 `[B]`, a number for each picture, where `length.filled` is set; up to
                `length.max_learned`.

        Raises:
            ValueError: as both, or numbers for each picture of a codec that cannot draw them together.
        """
        pixel_values = self._fit(pixel_values)
        most = num_tokens if not isinstance(num_tokens, torch.Tensor) else int(num_tokens.max())
        if isinstance(num_tokens, torch.Tensor) and (self.absent is None or int(num_tokens.min()) < 1):
            raise ValueError(
                f"num_tokens are {num_tokens.tolist()}; numbers for each picture, of 1 or more, need a codec of "
                "length.filled: true."
            )
        arrangement: Arrangement = self.length.arrange_learned(check_pixels(self.config, pixel_values), most)
        check_condition(condition, len(pixel_values), self.condition_size, "learns")
        reading, drawing = self.conditions(condition)
        if isinstance(self.resampler, SelectResampler):
            kept, mask = self._quantize_kept(self.resampler, pixel_values, None)
            return CodecOutput(self.decoder(kept.vectors, mask), kept.ids, kept.loss)
        if isinstance(self.resampler, HaltingResampler):
            assert isinstance(self.decoder, KeptViTDecoder)
            black, white = self.config.pixel_range
            step = learn_to_halt(
                self.resampler,
                self.quantizer,
                self.decoder,
                self.encoder(self._read(pixel_values)),
                pixel_values,
                span=white - black,
                tokens=arrangement.length,
            )
            return CodecOutput(step.drawn, step.quantized.ids, step.quantized.loss, halting_loss=step.loss)
        if isinstance(self.decoder, MessageFlow):
            written = self._written(pixel_values)
            ids, message = written.quantized.ids, written.quantized.vectors
            picture = self._wanted(pixel_values, self._read(pixel_values)).to(message.dtype)
            denoised = self.decoder.denoise(message, written.offset, picture)
            return CodecOutput(
                denoised.picture, ids, written.quantized.loss, velocity_loss=denoised.loss, vectors=message
            )
        read = self._read(pixel_values)
        cells = self.encoder(read)
        quantized = self.quantizer(self._positions(_averaged(cells, arrangement), arrangement.pool, reading))
        grid, vectors = (arrangement.rows, arrangement.columns), quantized.vectors
        if not arrangement.codes:  # the first of a sequence, all of a grid
            vectors = vectors[:, : arrangement.length]
        ids, held = quantized.ids[:, : arrangement.length], quantized.vectors[:, : self.length.max_length]
        if self.absent is not None:
            wanted = torch.as_tensor(arrangement.length if num_tokens is None else num_tokens, device=ids.device)
            places = torch.arange(arrangement.length, device=ids.device)
            mask = (places < wanted.view(-1, 1)).expand(ids.shape[:2])
            grid, vectors = self.length.drawn_grid(self.length.max_learned), self._filled(vectors, mask)
            ids = ids.masked_fill(~mask[..., None], 0)
        if isinstance(self.decoder, Flow):
            denoised = self.decoder.denoise(
                self.resampler.restore(vectors, grid), self._wanted(pixel_values, read).to(vectors.dtype)
            )
            return CodecOutput(
                denoised.picture, ids, quantized.loss, velocity_loss=denoised.loss, vectors=held, cells=cells
            )
        size = (pixel_values.shape[2], pixel_values.shape[3])
        drawn = self._draw(vectors, grid, drawing, size)
        output = CodecOutput(drawn, ids, quantized.loss, vectors=held, cells=cells)
        if self.decoder_options.makes_features and self.decoder_options.makes_pixels:
            output.features = self._features(vectors, grid, size)
        return output

    @property
    def spec(self) -> CodeSpec:
        """The code space, with the fingerprint of the weights that give the codes their meaning."""
        spec = self.spec_without_fingerprint
        return CodeSpec(spec.sizes, spec.layout, spec.max_length, spec.dim, spec.flatten, self.fingerprint())

    @property
    def spec_without_fingerprint(self) -> CodeSpec:
        return CodeSpec(self.quantizer.sizes, self.length.layout, self.length.max_length, self.dim)

    def fingerprint(self) -> str:
        """Digest of the weights, the same for equal weights on any device or machine."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def condition_size(self) -> tuple[int, int] | None:
        """(tokens, width) of the text features that the codec reads or draws under, if it does."""
        return self.decoder_options.condition_size or self.resampler.condition_size

    def conditions(self, condition: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Text features for `encode` and for `decode`, of which one may not want any."""
        drawing = self.decoder_options.condition_size
        return (
            None if self.resampler.condition_size is None and drawing is not None else condition,
            None if drawing is None and self.resampler.condition_size is not None else condition,
        )

    def _positions(self, cells: torch.Tensor, pool: int = 1, condition: torch.Tensor | None = None) -> torch.Tensor:
        if condition is None:
            return self.resampler.sample(cells, pool)
        assert isinstance(self.resampler, LatentResampler)
        return self.resampler.sample(cells, pool, condition.to(cells.dtype))

    def _read(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the encoder reads of them."""
        return self._vae_latents(pixel_values) if self._reads_latents else pixel_values.to(self.dtype)

    def _wanted(self, pixel_values: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """What the decoder should draw of pixels of which the encoder has `read`."""
        if not self.decoder_options.latents:
            return pixel_values
        return read if self._reads_latents else self._vae_latents(pixel_values)

    def _vae_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Of the autoencoder around the codec; without one they are what was given."""
        pixel_values = pixel_values.to(self.dtype)
        return pixel_values if self.vae is None else self.vae.encode(self.to_shown(pixel_values))

    def _written(self, pixel_values: torch.Tensor) -> Written:
        """The message about each picture; under an autoencoder, each crop has latents of its own."""
        assert isinstance(self.encoder, CropsEncoder)
        assert isinstance(self.resampler, MessageResampler)
        assert isinstance(self.decoder, MessageFlow)
        crops = self.encoder(pixel_values, self.config.downsample)
        latents = self._read(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        offsets = self._crop_offsets
        return write_message(latents, offsets, self.encoder, self.resampler, self.quantizer, self.decoder)

    @property
    def _crop_offsets(self) -> torch.Tensor:
        """Where the crops of a picture lie, `[S, 2]`."""
        assert isinstance(self.encoder, CropsEncoder)
        return self.encoder.offsets(*self.length.grids()[0]).to(self.device)

    def _quantize_kept(
        self, resampler: SelectResampler, pixel_values: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[Quantized, torch.Tensor]:
        """The kept positions of each picture, padded on the right, and their mask."""
        features = self.encoder(self._read(pixel_values))
        keep = resampler.select(features, generator)
        positions = resampler.merge(features, keep)[keep.bool()]
        quantized = self.quantizer(positions[None])  # all pictures in a row, [1, M, D]: no loss on padding
        ids, mask = padded(quantized.ids[0], keep.bool())
        return Quantized(ids, padded(quantized.vectors[0], keep.bool())[0], quantized.loss), mask

    def _latents(self, codes: VisualCodes) -> torch.Tensor:
        wanted = (*codes.ids.shape[:2], self.dim)
        latents = codes.side_info.get("latents")
        if latents is None or latents.shape != wanted:
            seen = "missing" if latents is None else str(tuple(latents.shape))
            raise ValueError(
                f"This codec has continuous latents and no ids, and side_info['latents'] is {seen}; "
                f"give floats {wanted}, as encode does."
            )
        return latents.float()

    def _sizes(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Height and width of each picture, where its codes need them to be drawn."""
        if not self.decoder_options.draws_any_size:
            return {}
        return {"size": torch.tensor([pixel_values.shape[2:]] * len(pixel_values), device=pixel_values.device)}

    def _drawn_size(self, codes: VisualCodes) -> tuple[int, int]:
        """(height, width) to draw at."""
        sizes = codes.side_info.get("size")
        if sizes is None:
            return self.config.image_size, self.config.image_size
        if not bool((sizes == sizes[:1]).all()):
            raise ValueError(f"Codes are of pictures of {sizes.tolist()}; decode pictures of one (height, width).")
        height, width = sizes[0].tolist()
        self.config.grid(height, width)
        return height, width

    def _draw(
        self, vectors: torch.Tensor, grid: tuple[int, int], condition: torch.Tensor | None, size: tuple[int, int]
    ) -> torch.Tensor:
        restored = self.resampler.restore(vectors, grid)
        if self.decoder_options.draws_any_size:
            return self.decoder(restored, size)
        return self.decoder(restored) if condition is None else self.decoder(restored, condition.to(restored.dtype))

    def _features(self, vectors: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        assert isinstance(self.decoder, TwoSidedDecoder)
        restored = self.resampler.restore(vectors, grid)
        return self.decoder.features(restored, *([size] if self.decoder_options.draws_any_size else []))

    def _check_codes(self, codes: VisualCodes) -> tuple[int, int]:
        if self.length.layout != "grid":
            if not self.length.ragged and self.absent is None and not bool(codes.mask.all()):
                raise ValueError(f"Codes have lengths {codes.lengths.tolist()}; decode one length at a time.")
            self.length.check_length(codes.ids.shape[1])
            return self.length.drawn_grid(codes.ids.shape[1] if self.absent is None else self.length.max_learned)
        if codes.grid is None or len(set(codes.grid)) != 1:
            raise ValueError(f"Codes have grids {codes.grid}; decode pictures of one (rows, columns) at a time.")
        self.length.check_grid(codes.grid[0])
        return codes.grid[0]

    def _fit(self, pixel_values: torch.Tensor) -> torch.Tensor:
        side = self.config.image_size
        if not self.config.resize or pixel_values.ndim != 4 or pixel_values.shape[2:] == (side, side):
            return pixel_values
        return F.interpolate(pixel_values, (side, side), mode="bilinear", align_corners=False, antialias=True)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)


def _averaged(cells: torch.Tensor, arrangement: Arrangement) -> torch.Tensor:
    """Features `[B, D, rows, columns]`, on a grid of its own where the arrangement has one."""
    if not arrangement.adaptive:
        return cells
    return F.adaptive_avg_pool2d(cells, (arrangement.rows, arrangement.columns))
