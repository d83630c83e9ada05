"""Constrained, guided generation on the stock loop.

In: scores and ids. Out: scores and ids, legal and guided. Never knows where ids come from or what codes look like.
"""

from unimm.generation.engine import Decoder, Engine
from unimm.generation.mixin import UniMMGenerationMixin
from unimm.generation.processors import ClassifierFreeGuidance, GrammarLogitsProcessor
from unimm.generation.streaming import AnswerStreamer, PictureRows, TextPiece

__all__ = [
    "AnswerStreamer",
    "ClassifierFreeGuidance",
    "Decoder",
    "Engine",
    "GrammarLogitsProcessor",
    "PictureRows",
    "TextPiece",
    "UniMMGenerationMixin",
]
