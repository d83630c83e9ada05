"""Makes the Auto classes of transformers know ours; done once, when `unimm.unified` is imported."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel
from unimm.sequence import UniMMProcessor
from unimm.unified.configuration import UniMMConfig
from unimm.unified.modeling import UniMMForConditionalGeneration, UniMMModel


def register_auto_classes() -> None:
    """Register configurations, models and processors."""
    for config in (VisualCodecConfig, UniMMConfig):  # `import unimm` announced their names
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(VisualCodecConfig, VisualCodecModel)
    AutoModel.register(UniMMConfig, UniMMModel)
    for auto_class in (AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForImageTextToText):
        auto_class.register(UniMMConfig, UniMMForConditionalGeneration)
    for config in (VisualCodecConfig, UniMMConfig):
        AutoImageProcessor.register(config, image_processor_classes={"pil": VisualCodecImageProcessor})
    AutoProcessor.register(UniMMConfig, UniMMProcessor)
