"""The unified model: one causal language model over text rows and code rows, over any Hugging Face backbone.

In: `input_ids`, or pixels behind placeholders. Out: logits, losses, generated ids. Never knows file formats or
datasets.
"""

from unimm.unified.composition import config_for, processor_for
from unimm.unified.compression import compress, four_bits
from unimm.unified.configuration import UniMMConfig
from unimm.unified.losses import FactoredLoss, factored_cross_entropy
from unimm.unified.modeling import UniMMForConditionalGeneration, UniMMModel, UniMMOutput
from unimm.unified.registration import register_auto_classes

register_auto_classes()

__all__ = [
    "FactoredLoss",
    "UniMMConfig",
    "UniMMForConditionalGeneration",
    "UniMMModel",
    "UniMMOutput",
    "compress",
    "config_for",
    "factored_cross_entropy",
    "four_bits",
    "processor_for",
]
