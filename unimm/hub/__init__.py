"""A saved model as a Hub repository: weights in their shipped precision, shims, model card.

In: a trained model with its report, or a run directory. Out: a folder that is the repository. Never knows how to train.
"""

from unimm.hub.card import write_card
from unimm.hub.push import push_run, write_run_repository
from unimm.hub.repository import write_repository

__all__ = ["push_run", "write_card", "write_repository", "write_run_repository"]
