"""Constrained, guided generation on the stock loop.

In: scores and ids. Out: scores and ids, legal and guided. Never knows where ids come from or what codes look like.
"""

from unimm.generation.engine import Decoder, Engine
from unimm.generation.mixin import UniMMGenerateOutput, UniMMGenerationMixin
from unimm.generation.processors import EVERYWHERE, ClassifierFreeGuidance, GrammarLogitsProcessor, check_interval
from unimm.generation.streaming import AnswerStreamer, PictureRows, TextPiece

__all__ = [
    "EVERYWHERE",
    "AnswerStreamer",
    "ClassifierFreeGuidance",
    "Decoder",
    "Engine",
    "GrammarLogitsProcessor",
    "PictureRows",
    "TextPiece",
    "UniMMGenerateOutput",
    "UniMMGenerationMixin",
    "check_interval",
]
