"""The visual tokenizer: pixels to codes and back.

In: `pixel_values` `[B, 3, H, W]` in [-1, 1]. Out: `VisualCodes`, and pixels again. Never knows token ids or the
language model. (Names say "codec", since the Hub takes a class with "Tokenizer" in its name for a text tokenizer.)
"""

from unimm.codec.configuration import VisualCodecConfig, socket_config
from unimm.codec.image_processing import VisualCodecImageProcessor
from unimm.codec.modeling import CodecOutput, VisualCodecModel
from unimm.codec.presets import load_preset, preset_names
from unimm.codec.selection import Merger

__all__ = [
    "CodecOutput",
    "Merger",
    "VisualCodecConfig",
    "VisualCodecImageProcessor",
    "VisualCodecModel",
    "load_preset",
    "preset_names",
    "socket_config",
]
