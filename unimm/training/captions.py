"""Features of captions, under which a conditioned codec reads or draws (TA-TiTok, 2501.07730; TexTok, 2412.05796)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    Siglip2TextModel,
    SiglipTextModel,
    T5EncoderModel,
)

from unimm.codec import VisualCodecConfig, socket_config
from unimm.codec.latents import LatentResamplerConfig
from unimm.training.loop import ON_CPU

TEXT_MODELS: dict[str, type[PreTrainedModel]] = {
    "clip": CLIPTextModel,
    "clip_text_model": CLIPTextModel,
    "siglip": SiglipTextModel,
    "siglip_text_model": SiglipTextModel,
    "siglip2": Siglip2TextModel,
    "siglip2_text_model": Siglip2TextModel,
    "t5": T5EncoderModel,
}


@dataclass(frozen=True)
class TextConfig:
    """A frozen model of texts, whose last hidden states of a caption are what a conditioned codec knows of it.

    Args:
        model: folder or Hub name of a CLIP, a SigLIP or a T5, with the tokenizer; empty for none.
    """

    model: str = ""


def check_text(text: TextConfig, has_captions: bool, codec: VisualCodecConfig) -> None:
    """Check what a recipe says of texts, before anything is loaded or made.

    Raises:
        ValueError: a codec under a text and no model of texts or no captions, a model of texts and a codec without, or
            features of another width than the codec's.
    """
    size, reading = socket_config("decoder", codec.decoder).condition_size, socket_config("resampler", codec.resampler)
    if size is None and isinstance(reading, LatentResamplerConfig) and reading.condition_width:
        size = (reading.condition_tokens, reading.condition_width)
    if (size is None) == bool(text.model):
        wanted = "reads or draws under no text; leave it out" if size is None else "does so under a text; name a model"
        raise ValueError(f"text.model is {text.model!r}, and this codec {wanted}.")
    if size is None:
        return
    if not has_captions:
        raise ValueError("This codec learns under texts, and its pictures have none; name their column in data.text.")
    width = text_model(text.model)[1]
    if width != size[1]:
        raise ValueError(f"text.model is {text.model}, of width {width}; condition_width of the codec is {size[1]}.")


def text_model(name: str) -> tuple[type[PreTrainedModel], int]:
    """The class of a saved model of texts, and the width of its features.

    Raises:
        ValueError: another kind of model.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in TEXT_MODELS:
        raise ValueError(
            f"text.model is {name}, of model_type {config.model_type!r}; take one of {', '.join(TEXT_MODELS)}."
        )
    return TEXT_MODELS[config.model_type], config.get_text_config().hidden_size


class CaptionFeatures:
    """Captions to features of `tokens` tokens each, longer ones cut and shorter ones padded.

    Raises:
        ValueError: as `text_model`.
    """

    def __init__(self, config: TextConfig, tokens: int) -> None:
        kind, _ = text_model(config.model)
        self.model = kind.from_pretrained(config.model).to(PartialState(cpu=ON_CPU).device).eval()
        self.model.requires_grad_(False)
        self.tokenizer, self.tokens = AutoTokenizer.from_pretrained(config.model), tokens

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """float32 `[len(captions), tokens, W]`."""
        inputs = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.model.device)
        # CLIP looks back only and SigLIP was trained to see its padding; T5 was not.
        mask = {"attention_mask": inputs["attention_mask"]} if isinstance(self.model, T5EncoderModel) else {}
        return self.model(input_ids=inputs["input_ids"], **mask).last_hidden_state.float()
