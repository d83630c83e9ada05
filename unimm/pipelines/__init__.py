"""The short way in: load a model, draw, understand, chat.

In: prompts, pictures, messages. Out: replies of ordered parts. Never knows how a model was trained.
"""

from unimm.pipelines.images import open_image
from unimm.pipelines.load import load
from unimm.pipelines.unimm import Picture, Reply, UniMM

__all__ = ["Picture", "Reply", "UniMM", "load", "open_image"]
