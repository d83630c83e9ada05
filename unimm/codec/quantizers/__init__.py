"""Quantizers behind one protocol: `quantize` (vectors to ids and vectors) and `lookup` (ids to vectors)."""

from unimm.codec.quantizers.base import Quantized, Quantizer
from unimm.codec.quantizers.bits import BitQuantizer, BitsConfig
from unimm.codec.quantizers.continuous import Continuous, ContinuousConfig, Gaussian, GaussianConfig
from unimm.codec.quantizers.estimators import ESTIMATORS
from unimm.codec.quantizers.product import ProductVQ, ProductVQConfig
from unimm.codec.quantizers.residual import ResidualVQ, ResidualVQConfig, TwinRVQ, TwinRVQConfig
from unimm.codec.quantizers.scalar import FSQ, FSQConfig
from unimm.codec.quantizers.scales import ScaleVQ, ScaleVQConfig
from unimm.codec.quantizers.sign import SignConfig, SignQuantizer
from unimm.codec.quantizers.streams import StreamsVQ, StreamsVQConfig
from unimm.codec.quantizers.vector import VQ, VQConfig

QUANTIZERS: dict[str, tuple[type, type[Quantizer]]] = {
    "vq": (VQConfig, VQ),
    "fsq": (FSQConfig, FSQ),
    "product": (ProductVQConfig, ProductVQ),
    "residual": (ResidualVQConfig, ResidualVQ),
    "twin": (TwinRVQConfig, TwinRVQ),
    "scales": (ScaleVQConfig, ScaleVQ),
    "sign": (SignConfig, SignQuantizer),
    "bits": (BitsConfig, BitQuantizer),
    "continuous": (ContinuousConfig, Continuous),
    "gaussian": (GaussianConfig, Gaussian),
    "streams": (StreamsVQConfig, StreamsVQ),
}

__all__ = [
    "ESTIMATORS",
    "FSQ",
    "QUANTIZERS",
    "VQ",
    "BitQuantizer",
    "BitsConfig",
    "Continuous",
    "ContinuousConfig",
    "FSQConfig",
    "Gaussian",
    "GaussianConfig",
    "ProductVQ",
    "ProductVQConfig",
    "Quantized",
    "Quantizer",
    "ResidualVQ",
    "ResidualVQConfig",
    "ScaleVQ",
    "ScaleVQConfig",
    "SignConfig",
    "SignQuantizer",
    "StreamsVQ",
    "StreamsVQConfig",
    "TwinRVQ",
    "TwinRVQConfig",
    "VQConfig",
]
