"""How a picture becomes words: one vocabulary, the grammar of picture spans, messages to ids and back.

In: messages, `VisualCodes`. Out: `input_ids`, spans, parts of an answer. Never knows networks or pixels.
"""

from unimm.sequence.grammar import ImageSpan, SpanGrammar, TextSpan
from unimm.sequence.levels import Levels
from unimm.sequence.processing import IGNORED_LABEL, EncodedMessages, ImagePart, TextPart, UniMMProcessor
from unimm.sequence.shapes import SpanShape, SpelledSizes, read_shapes, shape_fields
from unimm.sequence.text_vocabulary import train_text_tokenizer
from unimm.sequence.vocabulary import VisualVocabulary

__all__ = [
    "IGNORED_LABEL",
    "EncodedMessages",
    "ImagePart",
    "ImageSpan",
    "Levels",
    "SpanGrammar",
    "SpanShape",
    "SpelledSizes",
    "TextPart",
    "TextSpan",
    "UniMMProcessor",
    "VisualVocabulary",
    "read_shapes",
    "shape_fields",
    "train_text_tokenizer",
]
