"""unimm: one causal language model that reads and draws.

Importing it makes the Auto classes of transformers load its models, codecs and processors.
"""

from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel
from unimm.codes import CodeSpec, VisualCodes
from unimm.pipelines import load
from unimm.sequence import ImagePart, TextPart, UniMMProcessor
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration, register_auto_classes

register_auto_classes()

__version__ = "0.1.0"
__all__ = [
    "CodeSpec",
    "ImagePart",
    "TextPart",
    "UniMMConfig",
    "UniMMForConditionalGeneration",
    "UniMMProcessor",
    "VisualCodecConfig",
    "VisualCodecImageProcessor",
    "VisualCodecModel",
    "VisualCodes",
    "load",
]
