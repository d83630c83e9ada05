"""Every value of the encoder, resampler and decoder sockets: kind -> (config, class). A new value is one line here."""

from __future__ import annotations

from torch import nn

from unimm.codec.branches import BranchEncoder, BranchEncoderConfig
from unimm.codec.cell_flow import CellFlowConfig, CellFlowDecoder
from unimm.codec.decoders import (
    ConvDecoder,
    ConvDecoderConfig,
    ViTDecoder,
    ViTDecoderConfig,
)
from unimm.codec.dual import AttentionDualConfig, AttentionDualDecoder, DualDecoder, DualDecoderConfig
from unimm.codec.encoders import (
    ConvEncoder,
    ConvEncoderConfig,
    FormAndPaletteConfig,
    FormAndPaletteEncoder,
    GivenConfig,
    GivenEncoder,
    LocalEncoder,
    LocalEncoderConfig,
    PatchEncoder,
    PatchEncoderConfig,
    ViTEncoder,
    ViTEncoderConfig,
)
from unimm.codec.feature_decoder import (
    EmbeddingDecoder,
    EmbeddingDecoderConfig,
    FeatureDecoder,
    FeatureDecoderConfig,
    FeatureViT,
    FeatureViTConfig,
    NoDecoder,
    NoDecoderConfig,
    PromptDecoder,
    PromptDecoderConfig,
)
from unimm.codec.flow import FlowDecoder, FlowDecoderConfig
from unimm.codec.frame import FrameDecoder, FrameDecoderConfig, FrameEncoder, FrameEncoderConfig
from unimm.codec.halting import (
    HaltingResampler,
    HaltingResamplerConfig,
    KeptViTConfig,
    KeptViTDecoder,
    PatchesAndCodesConfig,
    PatchesAndCodesEncoder,
)
from unimm.codec.joint import JointDecoder, JointDecoderConfig, JointEncoder, JointEncoderConfig
from unimm.codec.latents import LatentResampler, LatentResamplerConfig, MaskViTDecoder, MaskViTDecoderConfig
from unimm.codec.merging import LevelViTConfig, LevelViTDecoder, MergingResampler, MergingResamplerConfig
from unimm.codec.message import (
    CropsConfig,
    CropsEncoder,
    MessageFlow,
    MessageFlowConfig,
    MessageResampler,
    MessageResamplerConfig,
)
from unimm.codec.pair import PairEncoder, PairEncoderConfig
from unimm.codec.pyramid import PyramidDecoder, PyramidDecoderConfig, PyramidEncoder, PyramidEncoderConfig
from unimm.codec.qformer import QFormerResampler, QFormerResamplerConfig
from unimm.codec.queries import QueryDecoder, QueryDecoderConfig, QueryResampler, QueryResamplerConfig
from unimm.codec.registers import RegisterResampler, RegisterResamplerConfig
from unimm.codec.resamplers import (
    AttentionResampler,
    AttentionResamplerConfig,
    GridResampler,
    GridResamplerConfig,
    Resampler,
)
from unimm.codec.rotary_latents import (
    RotaryLatentsConfig,
    RotaryLatentsResampler,
    RotaryMaskConfig,
    RotaryMaskDecoder,
)
from unimm.codec.scales import ScaleCausalConfig, ScaleCausalResampler
from unimm.codec.selection import CrossViTConfig, CrossViTDecoder, SelectResampler, SelectResamplerConfig
from unimm.codec.streams import StreamsDecoder, StreamsDecoderConfig, StreamsEncoder, StreamsEncoderConfig
from unimm.codec.taps import TapEncoder, TapEncoderConfig
from unimm.codec.tower import TowerEncoder, TowerEncoderConfig
from unimm.codec.unfolding import ClosingViT, ClosingViTConfig, UnfoldingDecoder, UnfoldingDecoderConfig
from unimm.codec.vitamin import VitaminDecoder, VitaminDecoderConfig, VitaminEncoder, VitaminEncoderConfig

ENCODERS: dict[str, tuple[type, type[nn.Module]]] = {
    "conv": (ConvEncoderConfig, ConvEncoder),
    "local": (LocalEncoderConfig, LocalEncoder),
    "form_and_palette": (FormAndPaletteConfig, FormAndPaletteEncoder),
    "vit": (ViTEncoderConfig, ViTEncoder),
    "joint": (JointEncoderConfig, JointEncoder),
    "frame": (FrameEncoderConfig, FrameEncoder),
    "patches": (PatchEncoderConfig, PatchEncoder),
    "patches_and_codes": (PatchesAndCodesConfig, PatchesAndCodesEncoder),
    "pyramid": (PyramidEncoderConfig, PyramidEncoder),
    "vitamin": (VitaminEncoderConfig, VitaminEncoder),
    "branches": (BranchEncoderConfig, BranchEncoder),
    "pair": (PairEncoderConfig, PairEncoder),
    "tower": (TowerEncoderConfig, TowerEncoder),
    "taps": (TapEncoderConfig, TapEncoder),
    "closing_vit": (ClosingViTConfig, ClosingViT),
    "given": (GivenConfig, GivenEncoder),
    "crops": (CropsConfig, CropsEncoder),
    "streams": (StreamsEncoderConfig, StreamsEncoder),
}
RESAMPLERS: dict[str, tuple[type, type[Resampler]]] = {
    "grid": (GridResamplerConfig, GridResampler),
    "attention": (AttentionResamplerConfig, AttentionResampler),
    "latent": (LatentResamplerConfig, LatentResampler),
    "qformer": (QFormerResamplerConfig, QFormerResampler),
    "registers": (RegisterResamplerConfig, RegisterResampler),
    "merging": (MergingResamplerConfig, MergingResampler),
    "rotary_latents": (RotaryLatentsConfig, RotaryLatentsResampler),
    "queries": (QueryResamplerConfig, QueryResampler),
    "select": (SelectResamplerConfig, SelectResampler),
    "scale_causal": (ScaleCausalConfig, ScaleCausalResampler),
    "halting": (HaltingResamplerConfig, HaltingResampler),
    "message": (MessageResamplerConfig, MessageResampler),
}
DECODERS: dict[str, tuple[type, type[nn.Module]]] = {
    "conv": (ConvDecoderConfig, ConvDecoder),
    "vit": (ViTDecoderConfig, ViTDecoder),
    "joint": (JointDecoderConfig, JointDecoder),
    "frame": (FrameDecoderConfig, FrameDecoder),
    "pyramid": (PyramidDecoderConfig, PyramidDecoder),
    "vitamin": (VitaminDecoderConfig, VitaminDecoder),
    "mask_vit": (MaskViTDecoderConfig, MaskViTDecoder),
    "level_vit": (LevelViTConfig, LevelViTDecoder),
    "rotary_mask": (RotaryMaskConfig, RotaryMaskDecoder),
    "features": (FeatureDecoderConfig, FeatureDecoder),
    "feature_vit": (FeatureViTConfig, FeatureViT),
    "embedding": (EmbeddingDecoderConfig, EmbeddingDecoder),
    "dual": (DualDecoderConfig, DualDecoder),
    "unfolding": (UnfoldingDecoderConfig, UnfoldingDecoder),
    "attention_dual": (AttentionDualConfig, AttentionDualDecoder),
    "query_vit": (QueryDecoderConfig, QueryDecoder),
    "cross_vit": (CrossViTConfig, CrossViTDecoder),
    "kept_vit": (KeptViTConfig, KeptViTDecoder),
    "flow": (FlowDecoderConfig, FlowDecoder),
    "message_flow": (MessageFlowConfig, MessageFlow),
    "cell_flow": (CellFlowConfig, CellFlowDecoder),
    "streams": (StreamsDecoderConfig, StreamsDecoder),
    "prompt": (PromptDecoderConfig, PromptDecoder),
    "none": (NoDecoderConfig, NoDecoder),
}
