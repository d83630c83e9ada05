"""Where examples come from: rendered worlds, and pre-tokenised rows on disk.

In: seeds, sources. Out: pictures with exact facts, conversations, rows of codes and text. Never knows losses.
"""
