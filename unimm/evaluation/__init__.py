"""Measures a checkpoint and reports.

In: a loaded model. Out: a table of figures with their number of trials. Never knows how the model was trained.
"""

from unimm.evaluation.report import Figure, Report
from unimm.evaluation.tiny import evaluate_tiny

__all__ = ["Figure", "Report", "evaluate_tiny"]
