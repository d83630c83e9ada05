"""A saved model as a Hub repository: weights in their shipped precision, shims, model card.

In: a trained model and its report. Out: a folder that is the repository. Never knows how training went.
"""

from unimm.hub.card import write_card
from unimm.hub.repository import write_repository

__all__ = ["write_card", "write_repository"]
