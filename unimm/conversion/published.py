"""The published systems at their published sizes, without weights: what they weigh before anything is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, FluxTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from unimm.conversion.maps import xomni_lm
from unimm.conversion.presets import load_published
from unimm.conversion.upstream import UpstreamConfig
from unimm.conversion.whole import padded_rows
from unimm.detokenizer import FeatureCondition
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration

QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
}
QWEN_1_5B = QWEN_7B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
XOMNI = QWEN_7B | {
    "num_hidden_layers": 36,
    "vocab_size": 152064,
    "image_vocab_size": 16384,
    "mm_vocab_size": 16448,
    "num_mm_adap_layers": 4,
    "num_mm_head_layers": 4,
}
TAR_TEXT_ROWS = 151665  # tokens of Qwen2.5, after which the codes begin


@dataclass(frozen=True)
class Published:
    """A system.

    Args:
        model: its language model with the codec inside.
        denoiser: what draws the pixels, by part.
    """

    model: Callable[[], UniMMForConditionalGeneration]
    denoiser: Callable[[], dict[str, nn.Module]]


def _whole(text: dict[str, Any], codec: Any, offset: int, size: int, **options: Any) -> UniMMForConditionalGeneration:
    rows = padded_rows(offset + size + 8)
    fields = {
        "text_config": {**text, "vocab_size": rows},
        "codec_config": codec.to_dict(),
        "image_token_offset": offset,
        "codebook_sizes": [size],
        "num_special_rows": 8,
    }
    return UniMMForConditionalGeneration(UniMMConfig(**fields | options))


def xomni_model() -> UniMMForConditionalGeneration:
    """X-Omni over Qwen2.5-7B, with four layers for pictures on each side."""
    fields = xomni_lm.language_fields(UpstreamConfig(XOMNI))
    codec = load_published("xomni").config
    return UniMMForConditionalGeneration(UniMMConfig(**fields | {"codec_config": codec.to_dict()}))


def flux_parts() -> dict[str, nn.Module]:
    """FLUX.1-dev with X-Omni's condition."""
    t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "condition": FeatureCondition(),
        "text encoders": nn.ModuleList(
            [
                T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
                CLIPTextModel(
                    CLIPTextConfig(
                        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
                    )
                ),
            ]
        ),
        "vae": _vae(16),
    }


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def _unclip_parts() -> dict[str, nn.Module]:
    unet = UNet2DConditionModel(
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2048,
    )
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    return {"unet": unet, "text encoder": CLIPTextModel(CLIPTextConfig(**text)), "vae": _vae(4)}


def _sana_parts() -> dict[str, nn.Module]:
    transformer = SanaTransformer2DModel(
        num_layers=28,
        num_attention_heads=36,
        attention_head_dim=32,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=1152,
    )
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((),) * 3 + ((5,),) * 3
    vae = AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    return {"transformer": transformer, "vae": vae}


def _seed(text: dict[str, Any]) -> UniMMForConditionalGeneration:
    return _whole({"model_type": "llama", **text}, load_published("seed").config, 32000, 8192)


def _tar(text: dict[str, Any]) -> UniMMForConditionalGeneration:
    return _whole({"model_type": "qwen2", **text}, load_published("ta_tok").config, TAR_TEXT_ROWS, 65536)


def _lavit() -> UniMMForConditionalGeneration:
    codec = load_published("lavit").config
    return _whole({"model_type": "llama", **LLAMA_7B}, codec, 32002, 16384, reads_features=True)


PUBLISHED: dict[str, Published] = {
    "xomni": Published(xomni_model, flux_parts),
    "seed_llama_8b": Published(lambda: _seed(LLAMA_7B), _unclip_parts),
    "seed_llama_14b": Published(lambda: _seed(LLAMA_13B), _unclip_parts),
    "lavit": Published(
        _lavit,
        lambda: {"unet": UNet2DConditionModel(attention_head_dim=8, cross_attention_dim=768), "vae": _vae(4)},
    ),
    "tar_1.5b": Published(lambda: _tar(QWEN_1_5B), _sana_parts),
    "tar_7b": Published(lambda: _tar(QWEN_7B), _sana_parts),
}


@dataclass(frozen=True)
class Weight:
    """What a part weighs.

    Args:
        part: its name.
        numbers: weights.
        linear: those of them in linear layers that quantisation takes.
        exact: whether it stays in float32.
    """

    part: str
    numbers: int
    linear: int = 0
    exact: bool = False

    def bytes(self, bits: int) -> float:
        """In memory, with linear layers of so many bits and the rest in bfloat16."""
        if self.exact:
            return 4 * self.numbers
        return 2 * (self.numbers - self.linear) + bits / 8 * self.linear


def weights_of(name: str) -> list[Weight]:
    """Parts of a published system.

    Raises:
        ValueError: none of that name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"No system {name!r} has published sizes here; there are {', '.join(PUBLISHED)}.")
    with torch.device("meta"):
        model, denoiser = PUBLISHED[name].model(), PUBLISHED[name].denoiser()
    visual = _count(model.codec)
    body = model.model.language_model
    return [
        Weight("language model", _count(model) - visual, _linear(body)),
        Weight("codec", visual, exact=True),
        *(Weight(f"detokenizer: {part}", _count(module), _linear(module)) for part, module in denoiser.items()),
    ]


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _linear(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
