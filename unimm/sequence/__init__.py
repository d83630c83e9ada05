"""How a picture becomes words: one vocabulary, the grammar of picture spans, messages to ids and back.

In: messages, `VisualCodes`. Out: `input_ids`, spans, parts of an answer. Never knows networks or pixels.
"""

from unimm.sequence.grammar import ImageSpan, SpanGrammar, SpanShape, TextSpan
from unimm.sequence.processing import EncodedMessages, ImagePart, TextPart, UniMMProcessor
from unimm.sequence.text_vocabulary import train_text_tokenizer
from unimm.sequence.vocabulary import VisualVocabulary

__all__ = [
    "EncodedMessages",
    "ImagePart",
    "ImageSpan",
    "SpanGrammar",
    "SpanShape",
    "TextPart",
    "TextSpan",
    "UniMMProcessor",
    "VisualVocabulary",
    "train_text_tokenizer",
]
