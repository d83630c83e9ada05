"""A second way from codes to pictures: a diffusion model that draws what the codes leave open.

In: `VisualCodes` of one grid, noise. Out: pictures. Never knows pixels' own codec, token ids or the language model.
"""

from unimm.detokenizer.pipeline import CodesToImagePipeline
from unimm.detokenizer.transformer import CodesToImageTransformer2DModel

__all__ = ["CodesToImagePipeline", "CodesToImageTransformer2DModel"]
