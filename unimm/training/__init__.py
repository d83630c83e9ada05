"""Turns rows and a recipe into a checkpoint.

In: a recipe (YAML), worlds or rows. Out: a saved model in a run directory with its metrics, plots and sample sheets.
Never knows which benchmark will judge.
"""
