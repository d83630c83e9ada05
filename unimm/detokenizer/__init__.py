"""A second way from codes to pictures: a diffusion model that draws what the codes leave open.

In: `VisualCodes`, or what their codec decodes them to, and noise. Out: pictures. Never knows token ids or the language
model.
"""

from unimm.detokenizer.drawers import DRAWERS, Drawer, load_drawer
from unimm.detokenizer.flux import FeatureCondition, FeaturesToFluxPipeline
from unimm.detokenizer.pipeline import CodesToImagePipeline
from unimm.detokenizer.transformer import CodesToImageTransformer2DModel

__all__ = [
    "DRAWERS",
    "CodesToImagePipeline",
    "CodesToImageTransformer2DModel",
    "Drawer",
    "FeatureCondition",
    "FeaturesToFluxPipeline",
    "load_drawer",
]
