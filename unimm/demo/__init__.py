"""What `make demo` shows: eight drawings, two descriptions, one answer of text and picture.

In: a loaded model. Out: files in a folder. Never knows training or the emoji font.
"""

from unimm.demo.tour import tour

__all__ = ["tour"]
