"""The visual codec: pixels to codes and back, five sockets in reading order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from unimm.codec.configuration import VisualCodecConfig, socket_config
from unimm.codec.decoders import DECODERS
from unimm.codec.encoders import ENCODERS
from unimm.codec.quantizers import QUANTIZERS, Quantizer
from unimm.codec.resamplers import RESAMPLERS, GridResampler
from unimm.codes import CodeSpec, VisualCodes
from unimm.nn.blocks import TransformerBlock
from unimm.nn.conv import LocalBlock, ResidualBlock


@dataclass
class CodecOutput(ModelOutput):
    """What a training step needs.

    Args:
        reconstruction: `[B, 3, H, W]`, about [-1, 1], not clamped.
        ids: int64 `[B, N, K]`.
        quantizer_loss: scalar.
    """

    reconstruction: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    quantizer_loss: torch.Tensor | None = None


class VisualCodecModel(PreTrainedModel):
    """A visual tokenizer: Encoder -> Resampler -> Quantizer -> LengthPolicy -> Decoder.

    Pixels are float `[B, 3, H, W]` in [-1, 1]. All weights stay in float32 under a half-precision load, since rounding
    the encoder flips codes.
    """

    config_class = VisualCodecConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _keep_in_fp32_modules_strict = ["encoder", "resampler", "quantizer", "decoder"]

    config: VisualCodecConfig
    quantizer: Quantizer
    resampler: GridResampler

    def __init__(self, config: VisualCodecConfig) -> None:
        super().__init__(config)
        encoder, resampler = socket_config("encoder", config.encoder), socket_config("resampler", config.resampler)
        decoder = socket_config("decoder", config.decoder)
        self.encoder = ENCODERS[config.encoder["kind"]][1](encoder)
        self.resampler = RESAMPLERS[config.resampler["kind"]][1](
            resampler, encoder_width=encoder.width, decoder_width=decoder.width
        )
        quantizer_class = QUANTIZERS[config.quantizer["kind"]][1]
        self.quantizer = quantizer_class(socket_config("quantizer", config.quantizer), dim=resampler.dim)
        self.length = config.length_policy
        self.decoder = DECODERS[config.decoder["kind"]][1](decoder)
        self.dim = resampler.dim
        self.post_init()

    def encode(self, pixel_values: torch.Tensor, *, num_tokens: int | None = None) -> VisualCodes:
        """Codes of a batch of pictures.

        Args:
            pixel_values: float `[B, 3, H, W]` in [-1, 1].
            num_tokens: the number of positions wanted; this codec's is fixed by the size of the picture.

        Raises:
            ValueError: wrong shape or range, a size the codec cannot take, or another `num_tokens` than the size gives.
        """
        grid = self._check_pixels(pixel_values)
        if num_tokens is not None and num_tokens != grid[0] * grid[1]:
            raise ValueError(
                f"num_tokens is {num_tokens}; this codec always makes {grid[0] * grid[1]} of such a picture."
            )
        with torch.no_grad():
            ids = self.quantizer(self._positions(pixel_values)).ids
        return VisualCodes.from_grid(ids.unflatten(1, grid))

    def lookup(self, codes: VisualCodes) -> torch.Tensor:
        """The vectors that the codes stand for, float32 `[B, N, D]`."""
        codes.validate(self.spec_without_fingerprint)
        return self.quantizer.lookup(codes.ids)

    def code_vectors(self) -> tuple[torch.Tensor, ...]:
        """What each code of each slot stands for, K times float32 `[size, D of the slot]`."""
        return self.quantizer.code_vectors()

    def decode(self, codes: VisualCodes) -> torch.Tensor:
        """Pictures `[B, 3, H, W]` in [-1, 1].

        Raises:
            ValueError: ids out of range, or grids that differ within the batch.
        """
        if codes.grid is None or len(set(codes.grid)) != 1:
            raise ValueError(f"Codes have grids {codes.grid}; decode pictures of one (rows, columns) at a time.")
        with torch.no_grad():
            return self._pixels(self.lookup(codes), codes.grid[0]).clamp(-1, 1)

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """One trip through the codes: `decode(encode(pixel_values))`."""
        return self.decode(self.encode(pixel_values))

    def forward(self, pixel_values: torch.Tensor) -> CodecOutput:
        """A differentiable trip through the quantizer, for training."""
        grid = self._check_pixels(pixel_values)
        quantized = self.quantizer(self._positions(pixel_values))
        return CodecOutput(
            reconstruction=self._pixels(quantized.vectors, grid),
            ids=quantized.ids,
            quantizer_loss=quantized.loss,
        )

    @property
    def spec(self) -> CodeSpec:
        """The code space, with the fingerprint of the weights that give the codes their meaning."""
        spec = self.spec_without_fingerprint
        return CodeSpec(spec.sizes, spec.layout, spec.max_length, spec.dim, spec.flatten, self.fingerprint())

    @property
    def spec_without_fingerprint(self) -> CodeSpec:
        return CodeSpec(self.quantizer.sizes, "grid", self.length.max_length, self.dim)

    def fingerprint(self) -> str:
        """Digest of the weights, the same for equal weights on any device or machine."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _positions(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.resampler.sample(self.encoder(pixel_values.to(self.dtype)))

    def _pixels(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.decoder(self.resampler.restore(vectors, grid))

    def _check_pixels(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {tuple(pixel_values.shape)}; they must be floats [B, 3, H, W]. "
                "Use the codec's image processor."
            )
        low, high = pixel_values.aminmax()
        if not -1.01 <= float(low) <= float(high) <= 1.01:
            raise ValueError(
                f"pixel_values range over [{float(low):.2f}, {float(high):.2f}]; the codec takes [-1, 1]. "
                "Use the codec's image processor, or scale by 2 * x / 255 - 1."
            )
        return self.length.grid(pixel_values.shape[2], pixel_values.shape[3], self.config.downsample)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        if isinstance(module, (LocalBlock, ResidualBlock)):
            init.zeros_(module.conv_out.weight)
        if isinstance(module, TransformerBlock):
            init.zeros_(module.attention.out.weight)
            init.zeros_(module.mlp.down.weight)
