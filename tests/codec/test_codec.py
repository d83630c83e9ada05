"""Every value of every socket: codes, reloads, gradients, errors."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from unimm import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel, VisualCodes
from unimm.codec import load_preset, preset_names
from unimm.codec.cell_flow import CellFlowConfig, CellFlowDecoder
from unimm.codec.configuration import SOCKETS
from unimm.codec.encoders import LocalEncoderConfig, stretched_luminance
from unimm.codec.flow import FlowDecoder, FlowDecoderConfig, ProjectedGuidance
from unimm.codec.merging import (
    MergingResampler,
    MergingResamplerConfig,
    level_grid,
    level_sizes,
    residual_levels,
)
from unimm.codec.presets import paper_of
from unimm.codec.pyramid import PyramidEncoder, PyramidEncoderConfig
from unimm.codec.quantizers import (
    FSQ,
    VQ,
    BitQuantizer,
    BitsConfig,
    FSQConfig,
    ProductVQ,
    ProductVQConfig,
    ResidualVQ,
    ResidualVQConfig,
    ScaleVQConfig,
    VQConfig,
)
from unimm.codec.quantizers.vector import nearest_rows
from unimm.codec.resamplers import GridResamplerConfig

PYRAMID = {"channels": [32, 32, 32, 32, 32], "blocks": 1, "attention_levels": [4], "code_channels": 16}
VITAMIN = {"stages": [8, 16], "blocks": [1, 2], "width": 16, "depth": 1, "num_heads": 2}
JOINT = {"patch": 16, "tower_width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24, "table_side": 3, "dim": 16}
FRAME = {"patch": 16, "width": 16, "num_heads": 2, "head_width": 8, "mlp_width": 24, "windows": [0, 2], "moments": 1}
CELLS = {"width": 16, "depth": 1, "num_heads": 2}
SEQUENCE = {"tokens": 4, "rows": 2, "columns": 2}
TRUNK = {"tokens": 4, "depth": 2, "num_heads": 2, "mlp_width": 24, "axes": [2, 2, 4], "turns": [0]}
TINY = {
    "encoder": {
        "conv": {"kind": "conv", "patch": 8, "channels": [8, 16], "blocks": 1},
        "form_and_palette": {"kind": "form_and_palette", "patch": 16, "branch_width": 8, "blocks": 1},
        "local": {"kind": "local", "patch": 8, "channels": [8, 16], "kernels": [3, 1]},
        "vit": {
            "kind": "vit",
            "patch": 16,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "table_side": 3,
            "channel_scales": True,
        },
        "joint": {"kind": "joint", **JOINT},
        "frame": {"kind": "frame", **FRAME},
        "patches": {"kind": "patches", "patch": 16, "width": 16},
        "given": {"kind": "given"},
        "crops": {"kind": "crops", "patch": 16, "crop": 1, "stride": 1},
        "patches_and_codes": {
            "kind": "patches_and_codes",
            "patch_width": 12,
            "base": {**PYRAMID, "code_channels": 4, "stem_channels": 32},
            "base_codes": 8,
        },
        "pyramid": {"kind": "pyramid", **PYRAMID, "stem_channels": 32},
        "vitamin": {"kind": "vitamin", **VITAMIN},
        "branches": {
            "kind": "branches",
            **PYRAMID,
            "stem_channels": 32,
            "rows": 2,
            "columns": 2,
            "depth": 1,
            "num_heads": 2,
        },
        "taps": {
            "kind": "taps",
            "tower": {"patch": 16, "width": 16, "depth": 2, "num_heads": 2, "final_norm": False},
            "pixel_layer": 1,
            "shortcut_layer": 2,
            "pixel_dim": 8,
            "meaning_dim": 4,
            "pixel_heads": 2,
            "meaning_heads": 4,
        },
        "tower": {
            "kind": "tower",
            "tower": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 16,
            },
            "layers": [1],
            "learns": True,
        },
        "streams": {
            "kind": "streams",
            "dim": 4,
            "tower": {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24, "out_width": 12},
            "meaning": CELLS,
            "pyramid": {**PYRAMID, "stem_channels": 32, "folded": True},
        },
        "closing_vit": {
            "kind": "closing_vit",
            "dim": 4,
            "patch": 16,
            "tower_width": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_width": 24,
            "table_side": 3,
        },
        "pair": {
            "kind": "pair",
            "tower": {"patch": 16, "width": 16, "depth": 1, "num_heads": 2},
            "tower_dim": 12,
            "pyramid": {**PYRAMID, "stem_channels": 32},
            "pyramid_dim": 4,
        },
    },
    "decoder": {
        "conv": {"kind": "conv", "patch": 8, "channels": [16, 8], "blocks": 1},
        "vit": {"kind": "vit", "patch": 16, "width": 16, "depth": 1, "num_heads": 2},
        "joint": {"kind": "joint", **JOINT},
        "frame": {"kind": "frame", **FRAME},
        "pyramid": {"kind": "pyramid", **PYRAMID, "upsampling": "shuffle", "adaptive": True},
        "vitamin": {"kind": "vitamin", **VITAMIN},
        "dual": {
            "kind": "dual",
            "pixel_dim": 4,
            "pixels_first": False,
            "pixels": PYRAMID,
            "features": {"dim": 12, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24, "class_token": True},
            "side": 32,
        },
        "attention_dual": {
            "kind": "attention_dual",
            "pixel_dim": 4,
            "feature_dim": 12,
            "width": 32,
            "pixel_heads": 2,
            "feature_heads": 2,
            "pixels": {**PYRAMID, "code_channels": 32},
            "rows": 2,
            "columns": 2,
        },
        "unfolding": {
            "kind": "unfolding",
            "dim": 4,
            "std": 2.0,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_width": 24,
            "pixel_width": 12,
            "pixel_depth": 1,
            "pixel_heads": 2,
            "factor": 2,
            "patch": 8,
        },
        "rotary_mask": {"kind": "rotary_mask", **TRUNK, "dim": 16, "width": 16, "patch": 16},
        "features": {"kind": "features", "width": 32, "blocks": 1},
        "feature_vit": {"kind": "feature_vit", "dim": 16, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24},
        "embedding": {"kind": "embedding", "dim": 16, "tokens": 4, "width": 24, "depth": 1, "out_dim": 8},
        "cross_vit": {
            "kind": "cross_vit",
            "dim": 16,
            "tokens": 4,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_width": 24,
            "feature_width": 12,
            "out_dim": 8,
        },
        "kept_vit": {
            "kind": "kept_vit",
            "dim": 16,
            **SEQUENCE,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "table_side": 3,
            "soft_codebook": {"size": 8, "pyramid": PYRAMID},
        },
        "level_vit": {
            "kind": "level_vit",
            "dim": 16,
            **SEQUENCE,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "pixels": PYRAMID,
        },
        "query_vit": {
            "kind": "query_vit",
            "dim": 16,
            **SEQUENCE,
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "aligned_layer": 1,
            "feature_width": 12,
            "pixels": PYRAMID,
        },
        "flow": {
            "kind": "flow",
            "dim": 16,
            **SEQUENCE,
            "patch": 16,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_width": 24,
            "steps": 2,
        },
        "cell_flow": {
            "kind": "cell_flow",
            "dim": 16,
            "rows": 2,
            "columns": 2,
            "patch": 16,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "flow_depth": 1,
        },
        "streams": {
            "kind": "streams",
            "dim": 4,
            "pixels": {**PYRAMID, "upsampling": "unfold", "norm_channels": 8},
            "meaning": CELLS,
            "feature_width": 12,
        },
        "prompt": {"kind": "prompt", "dim": 16},
        "message_flow": {
            "kind": "message_flow",
            "dim": 16,
            **SEQUENCE,
            "patch": 16,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "mlp_width": 24,
            "steps": 2,
        },
        "none": {"kind": "none", "dim": 16, "drawn_by": "a flow"},
        "mask_vit": {"kind": "mask_vit", "dim": 16, **SEQUENCE, "width": 16, "depth": 1, "num_heads": 2},
    },
    "quantizer": {
        "fsq": {"kind": "fsq", "levels": [4, 4, 3]},
        "vq": {"kind": "vq", "size": 32, "dim": 4, "ema_decay": 0.9, "restart_below": 0.1},
        "product": {"kind": "product", "sizes": [12, 7], "dim": 4},
        "sign": {"kind": "sign"},
        "bits": {"kind": "bits", "bits": 5},
        "continuous": {"kind": "continuous"},
        "gaussian": {"kind": "gaussian"},
        "residual": {"kind": "residual", "size": 12, "dim": 16, "depth": 3, "project": False, "normalize": False},
        "twin": {
            "kind": "twin",
            "first": {"size": 12, "dim": 4, "depth": 2, "project": False},
            "second": {"size": 9, "dim": 12, "depth": 3, "shared": True, "project": False, "normalize": False},
        },
        "streams": {
            "kind": "streams",
            "first": {"size": 12, "dim": 4, "project": False, "normalize": False, "map_rows": True, "map_bias": False},
            "second": {"size": 7, "dim": 4, "project": False},
        },
        "scales": {"kind": "scales", "sides": [1, 2], "size": 12, "dim": 16, "parts": [12, 4], "project": False},
    },
    "resampler": {
        "grid": {"kind": "grid", "dim": 16},
        "attention": {"kind": "attention", "dim": 8, "num_heads": 2, "causal": True},
        "latent": {"kind": "latent", "dim": 16, **SEQUENCE, "depth": 1, "num_heads": 2, "scramble": True},
        "streams": {"kind": "grid", "dim": 5, "norm": False, "project": False},
        "scale_causal": {"kind": "scale_causal", "sides": [1, 2], "dim": 16, "depth": 2, "num_heads": 2},
        "registers": {"kind": "registers", "dim": 16, **SEQUENCE, "depth": 1, "num_heads": 2, "mlp_width": 24},
        "merging": {
            "kind": "merging",
            "dim": 16,
            **SEQUENCE,
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "merge_in": [0],
        },
        "queries": {"kind": "queries", "dim": 16, **SEQUENCE, "width": 16, "depth": 1, "num_heads": 2},
        "rotary_latents": {"kind": "rotary_latents", **TRUNK, "dim": 16, "nominal_side": 3},
        "halting": {"kind": "halting", "dim": 16, "tokens": 4, "depth": 1, "num_heads": 2, "table_side": 3},
        "message": {"kind": "message", "dim": 16, "tokens": 4, "adaptive": True},
        "select": {"kind": "select", "dim": 16, "depth": 1, "num_heads": 2, "mlp_width": 24},
        "qformer": {
            "kind": "qformer",
            "tokens": 4,
            "dim": 16,
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "mlp_width": 24,
        },
    },
    "length": {
        "fixed": {"kind": "fixed", "rows": 2, "columns": 2},
        "resolution": {"kind": "resolution", "min_side": 1, "max_side": 3, "max_positions": 6},
        "sequence": {"kind": "sequence", **SEQUENCE, "prefixes": True},
        "filled": {"kind": "sequence", **SEQUENCE, "prefixes": True, "filled": True},
        "closed": {"kind": "sequence", **SEQUENCE, "tokens": 5},
        "any_size": {"kind": "any_sequence", "tokens": 4, "max_side": 32},
        "whole": {"kind": "sequence", **SEQUENCE},
        "any_sequence": {"kind": "any_sequence", "tokens": 4, "step": 2, "max_side": 4},
        "kept": {"kind": "kept", "rows": 2, "columns": 2},
        "halted": {"kind": "halted", **SEQUENCE, "budget": 3},
        "levels": {"kind": "levels", "sides": [1, 2]},
        "streams": {"kind": "streams", "max_side": 3},
        "pooled": {"kind": "pooled", "rows": 2, "columns": 2, "pools": [1, 2]},
        "adaptive": {"kind": "adaptive", "rows": 2, "columns": 2},
    },
}
# What a value needs in the other sockets.
LATENT = {"resampler": "latent", "decoder": "mask_vit", "length": "sequence"}
QUERIES = {"resampler": "qformer", "decoder": "embedding", "length": "sequence"}
REGISTERS = {"resampler": "registers", "decoder": "mask_vit", "length": "sequence"}
LEVELS = {"resampler": "merging", "decoder": "level_vit", "length": "sequence"}
READERS = {"resampler": "queries", "decoder": "query_vit", "length": "sequence"}
FLOW = {"resampler": "registers", "decoder": "flow", "length": "sequence"}
CLOSED = {"encoder": "closing_vit", "decoder": "unfolding", "length": "closed"}
ROTARY = {"resampler": "rotary_latents", "decoder": "rotary_mask", "length": "any_sequence"}
SELECTION = {"resampler": "select", "decoder": "cross_vit", "length": "kept"}
HALTING = {"resampler": "halting", "decoder": "kept_vit", "length": "halted"}
ONE_NETWORK = {"encoder": "crops", "resampler": "message", "decoder": "message_flow", "length": "whole"}
SCALES = {"quantizer": "scales", "length": "levels"}
STREAMS = dict.fromkeys(SOCKETS, "streams")
COMPANIONS = dict.fromkeys(SELECTION.values(), SELECTION) | dict.fromkeys(QUERIES.values(), QUERIES)
COMPANIONS |= dict.fromkeys(REGISTERS.values(), REGISTERS)
COMPANIONS |= {"prompt": LATENT | {"decoder": "prompt"}}
COMPANIONS |= {"flow": FLOW, "merging": LEVELS, "level_vit": LEVELS}
COMPANIONS |= {"queries": READERS, "query_vit": READERS}
COMPANIONS |= dict.fromkeys(CLOSED.values(), CLOSED)
COMPANIONS |= dict.fromkeys(ROTARY.values(), ROTARY)
COMPANIONS |= dict.fromkeys(SCALES.values(), SCALES)
COMPANIONS |= dict.fromkeys(LATENT.values(), LATENT)
COMPANIONS |= dict.fromkeys(HALTING.values(), HALTING)
COMPANIONS |= {"given": QUERIES | {"length": "any_size"}}
COMPANIONS |= dict.fromkeys(ONE_NETWORK.values(), ONE_NETWORK)
COMPANIONS |= {"streams": STREAMS, "scale_causal": {"resampler": "scale_causal", "length": "levels"}}
POINTS = [(socket, kind) for socket, kinds in SOCKETS.items() for kind in kinds]


def build(**changes):
    first = {socket: next(iter(kinds.values())) for socket, kinds in TINY.items()}
    torch.manual_seed(0)
    return VisualCodecModel(VisualCodecConfig(image_size=32, **(first | changes))).eval()


def frozen_weights(codec):
    return {name for name, weight in codec.named_parameters() if not weight.requires_grad}


def pixels(batch=3, height=32, width=32):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_local_encoder_sees_its_reach_and_no_further():
    codec = build(encoder=TINY["encoder"]["local"])
    reach = LocalEncoderConfig(patch=8, channels=(8, 16), kernels=(3, 1)).reach
    assert reach == 8
    images = pixels(2, 32, 32)
    images[1, :, : 16 + reach, : 16 + reach] = images[0, :, : 16 + reach, : 16 + reach]  # cell (0, 0) and its reach
    one, other = codec.encoder(images)
    torch.testing.assert_close(one[:, 0, 0], other[:, 0, 0])
    assert not torch.allclose(one[:, 0, 1], other[:, 0, 1])
    plain = codec.encoder(torch.full((1, 3, 32, 32), 0.5))[0]
    torch.testing.assert_close(plain, plain[:, :1, :1].expand_as(plain))  # the edge of the picture leaves no trace


def painted(*, ink, form):
    """A 32 x 32 picture of one form in one ink on white, antialiased."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    distance = {"disc": (x - 14).hypot(y - 15) - 9, "square": (x - 14).abs().maximum((y - 15).abs()) - 8}[form]
    coverage = (0.5 - distance).clamp(0, 1)
    return torch.ones(3, 32, 32).lerp(torch.tensor(ink)[:, None, None], coverage)[None]


def test_form_does_not_depend_on_ink_nor_palette_on_form():
    codec = VisualCodecModel(load_preset("smallest_product")).eval()
    red, green = (0.6, -0.8, -0.7), (-0.7, 0.2, -0.5)
    disc, square, green_disc = (
        codec.encoder(painted(ink=ink, form=form)).chunk(2, dim=1)
        for ink, form in ((red, "disc"), (red, "square"), (green, "disc"))
    )
    torch.testing.assert_close(disc[0], green_disc[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(disc[1], square[1], atol=1e-4, rtol=0)
    assert not torch.allclose(disc[0], square[0], atol=1e-2)
    assert not torch.allclose(disc[1], green_disc[1], atol=1e-2)


def test_faint_noise_on_a_plain_ground_has_no_form():
    noise = (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) - 0.5) * 0.05
    assert stretched_luminance(0.7 + noise, 16).eq(0).all()
    assert stretched_luminance(0.7 + 10 * noise, 16).amax() == pytest.approx(1, abs=1e-5)


def test_the_slots_of_a_product_never_meet_before_they_are_quantised():
    codec = VisualCodecModel(load_preset("smallest_product")).eval()
    encoded = codec.encoder(pixels())
    changed = encoded.clone()
    changed[:, : changed.shape[1] // 2] += torch.randn_like(changed[:, : changed.shape[1] // 2])
    one, other = (codec.quantizer(codec.resampler.sample(features)).ids for features in (encoded, changed))
    assert one[..., 1].equal(other[..., 1])
    assert not one[..., 0].equal(other[..., 0])


def test_products_that_do_not_divide_the_channels_are_refused():
    for sizes in ((8,), (8, 8, 8)):
        with pytest.raises(ValueError, match="divides the channels"):
            ProductVQ(ProductVQConfig(sizes=sizes), dim=16)
    with pytest.raises(ValueError, match="must divide the encoder's width"):
        build(resampler={"kind": "grid", "dim": 16, "groups": 3})


def test_a_local_encoder_needs_one_odd_kernel_per_stage():
    for kernels in ([3], [3, 2], [3, 0]):
        with pytest.raises(ValueError, match="one odd side"):
            VisualCodecConfig(encoder={**TINY["encoder"]["local"], "kernels": kernels})


@pytest.mark.parametrize(("socket", "kind"), POINTS)
def test_every_value_encodes_decodes_reloads_and_learns(socket, kind, tmp_path):
    kinds = COMPANIONS.get(kind, {}) | {socket: kind}
    codec = build(**{name: TINY[name][value] for name, value in kinds.items()})
    images = pixels()
    codes = codec.encode(images)
    longest = int(codes.lengths.max()) if codec.length.ragged else codec.length.max_length
    if kind in ("resolution", "pooled", "streams"):
        longest = {"streams": 1 + 4}.get(kind, 4)
    assert codes.ids.shape == (3, longest, len(codec.quantizer.sizes))
    codes.validate(codec.spec_without_fingerprint)
    if kind == "none":
        with pytest.raises(ValueError, match="no decoder: a flow draws"):
            codec.decode(codes)
        return
    if codec.config.draws_pixels:
        assert codec.decode(codes).shape == images.shape
    codec.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = VisualCodecModel.from_pretrained(tmp_path, dtype=dtype)
        assert again.encode(images).ids.equal(codes.ids)
        assert again.fingerprint() == codec.fingerprint()
        assert frozen_weights(again) == frozen_weights(codec)
    codec.train()
    output = codec(images)
    loss = output.reconstruction.square().mean() + output.quantizer_loss
    if output.features is not None:
        loss = loss + output.features.square().mean()
    if output.velocity_loss is not None:
        loss = loss + output.velocity_loss
    if output.halting_loss is not None:
        loss = loss + output.halting_loss
    loss.backward()
    for name, weight in codec.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", [*TINY["quantizer"]])
def test_lookup_is_what_decode_saw(kind):
    kinds = COMPANIONS.get(kind, {"quantizer": kind})
    codec = build(**{name: TINY[name][value] for name, value in kinds.items()})
    seen = codec.quantizer(codec._positions(codec.encoder(pixels()))).vectors
    torch.testing.assert_close(codec.lookup(codec.encode(pixels())), seen, atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(2, 16), min_size=1, max_size=8), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
@example([16] * 8, 0)  # more codes than a float32 can count
def test_fsq_ids_are_in_range_and_round_trip(levels, seed):
    quantizer = FSQ(FSQConfig(tuple(levels)), dim=6)
    quantized = quantizer(torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(seed)) * 5)
    assert 0 <= int(quantized.ids.min()) <= int(quantized.ids.max()) < quantizer.sizes[0]
    torch.testing.assert_close(quantizer.lookup(quantized.ids), quantized.vectors, atol=1e-5, rtol=1e-5)


def test_fsq_without_projection_takes_one_channel_per_level():
    quantizer = FSQ(FSQConfig((4, 3), project=False), dim=2)
    assert quantizer.code_vectors()[0].shape == (12, 2)
    with pytest.raises(ValueError, match="set project: true"):
        FSQ(FSQConfig((4, 3), project=False), dim=5)


def test_groups_of_fsq_are_quantised_alone():
    quantizer, alone = (FSQ(FSQConfig((4, 3), project=False, groups=groups), dim=2 * groups) for groups in (3, 1))
    vectors = torch.randn(2, 5, 6)
    quantized = quantizer(vectors)
    assert quantizer.sizes == (12, 12, 12)
    for slot, part in enumerate(vectors.chunk(3, dim=-1)):
        assert quantized.ids[..., slot : slot + 1].equal(alone(part).ids)
    rows = [rows[quantized.ids[..., slot]] for slot, rows in enumerate(quantizer.code_vectors())]
    torch.testing.assert_close(torch.cat(rows, dim=-1), quantized.vectors)
    torch.testing.assert_close(quantizer.lookup(quantized.ids), quantized.vectors)
    with pytest.raises(ValueError, match="under project: false"):
        FSQ(FSQConfig((4, 3), groups=2), dim=4)


def test_every_fsq_id_has_vectors_of_its_own():
    quantizer = FSQ(FSQConfig((4, 3, 5)), dim=3)
    quantizer.to_vectors.weight.data, quantizer.to_vectors.bias.data = torch.eye(3), torch.zeros(3)
    vectors = quantizer.lookup(torch.arange(60).view(1, 60, 1))[0]
    assert len(torch.unique(vectors, dim=0)) == 60


def test_nearest_rows_equal_the_distances():
    vectors, rows = torch.randn(50, 6), torch.randn(20, 6)
    assert nearest_rows(vectors, rows).equal(torch.cdist(vectors, rows).argmin(dim=1))


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_one_index_over_two_tables_is_the_nearest_row_normalised_part_by_part(seed):
    generator = torch.Generator().manual_seed(seed)
    quantizer = VQ(VQConfig(size=20, dim=7, parts=(4, 3), project=False), dim=7)
    quantizer.codebook.data = torch.randn(20, 7, generator=generator)
    vectors = torch.randn(1, 30, 7, generator=generator)
    distances = sum(
        torch.cdist(F.normalize(part, dim=-1), F.normalize(rows, dim=-1)).square()
        for part, rows in zip(vectors[0].split([4, 3], dim=1), quantizer.codebook.split([4, 3], dim=1), strict=True)
    )
    assert quantizer(vectors).ids[0, :, 0].equal(distances.argmin(dim=1))


def test_wrong_parts_sides_and_depths_are_refused():
    with pytest.raises(ValueError, match="add up to dim 8"):
        VQ(VQConfig(dim=8, parts=(4, 3)), dim=8)
    for sides in ((), (2, 1), (0, 1)):
        with pytest.raises(ValueError, match="rising numbers"):
            ScaleVQConfig(sides=sides, project=False)
    with pytest.raises(ValueError, match="taps from 1"):
        ResidualVQConfig(depth=3, taps=(4,), project=False)
    with pytest.raises(ValueError, match="multiples of 32"):
        VisualCodecConfig(decoder={"kind": "attention_dual", "pixels": PYRAMID})
    for config in (ScaleVQConfig, ResidualVQConfig):
        with pytest.raises(ValueError, match="set project: false"):
            config()
    with pytest.raises(ValueError, match="exactly 5"):
        build(**{name: TINY[name][kind] for name, kind in SCALES.items()}).encode(pixels(), num_tokens=4)


def test_bits_are_drawn_by_their_chance_in_training_and_sum_their_rows():
    quantizer = BitQuantizer(BitsConfig(bits=6), dim=4)
    vectors = torch.randn(2, 500, 4)
    assert quantizer.eval()(vectors).ids.equal((quantizer.to_bits(vectors) > 0).long())
    drawn = quantizer.train()(vectors)
    chances = quantizer.to_bits(vectors).sigmoid()
    assert drawn.ids.float().mean().item() == pytest.approx(chances.mean().item(), abs=0.05)
    assert not drawn.ids.equal((chances > 0.5).long())
    assert drawn.loss.item() == pytest.approx(0.1 * (chances * (1 - chances)).mean().item())
    apart = sum(rows[drawn.ids[..., slot]] for slot, rows in enumerate(quantizer.code_vectors()))
    torch.testing.assert_close(apart, quantizer.lookup(drawn.ids), atol=1e-5, rtol=0)


def test_rotary_transformers_that_cannot_be_are_refused():
    for options, message in (
        ({"axes": [2, 3, 3]}, "must be even and add up"),
        ({"axes": [2, 2, 2]}, "must be even and add up"),
        ({"turns": [2]}, "name different blocks"),
        ({"turns": [0, 0]}, "name different blocks"),
    ):
        kinds = {socket: TINY[socket][kind] for socket, kind in ROTARY.items()}
        with pytest.raises(ValueError, match=message):
            build(**(kinds | {"resampler": kinds["resampler"] | options}))
    codec = build(**{socket: TINY[socket][kind] for socket, kind in ROTARY.items()})
    with pytest.raises(ValueError, match="cannot take a 48 x 32"):
        codec.encode(pixels(1, 48, 32))


@given(st.integers(2, 5), st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_a_residual_code_is_nearest_to_what_was_left_over(depth, seed):
    torch.manual_seed(seed)
    quantizer = ResidualVQ(ResidualVQConfig(size=9, dim=4, depth=depth, project=False, normalize=False), dim=4)
    rest, quantized = (vectors := torch.randn(1, 12, 4))[0], quantizer(vectors)
    for slot, codebook in enumerate(quantizer.codebooks):
        assert quantized.ids[0, :, slot].equal(torch.cdist(rest, codebook.codebook).argmin(dim=1))
        rest = rest - codebook.codebook[quantized.ids[0, :, slot]]
    torch.testing.assert_close(quantized.vectors[0] + rest, vectors[0], atol=1e-5, rtol=0)
    shared = ResidualVQ(ResidualVQConfig(size=9, dim=4, depth=depth, shared=True, project=False), dim=4)
    assert len(list(shared.parameters())) == 1
    assert len(shared.code_vectors()) == depth


def test_a_margin_that_no_patch_covers_is_left_out_on_request():
    encoder = {**TINY["encoder"]["vit"], "drop_margin": True}
    config = {**TINY, "encoder": encoder}
    codec = VisualCodecModel(
        VisualCodecConfig(
            image_size=40,
            encoder=encoder,
            resampler=config["resampler"]["grid"],
            decoder=TINY["decoder"]["feature_vit"],
        )
    )
    images = pixels(1, 40, 40)
    codes = codec.encode(images)
    images[..., 32:] = images[..., 32:, :] = 0.3
    assert codec.encode(images).ids.equal(codes.ids)
    assert codes.grid == [(2, 2)]


def test_dead_rows_restart_where_vectors_are():
    torch.manual_seed(0)
    quantizer = VQ(VQConfig(size=16, dim=4, normalize=False, ema_decay=0.5, restart_below=0.05), dim=4).train()
    vectors = torch.randn(4, 8, 4) + 40
    used = [len(quantizer(vectors).ids.unique()) for _ in range(12)]
    assert used[0] <= 2
    assert used[-1] >= 8


def test_of_rows_that_cannot_be_told_apart_the_commonest_stays():
    torch.manual_seed(0)
    quantizer = VQ(VQConfig(size=8, dim=4, normalize=False, ema_decay=0.9, project=False), dim=4).eval()
    quantizer.codebook[2], quantizer.codebook[5] = quantizer.codebook[6] + 2e-3, quantizer.codebook[6] - 1e-3
    vectors = quantizer.codebook[[2, 5, 6, 1]][None]
    assert quantizer(vectors).ids.flatten().tolist() == [2, 5, 6, 1]
    assert quantizer.retire_duplicates(torch.tensor([1, 1, 4, 1, 1, 9, 3, 1])) == 2
    assert quantizer(vectors).ids.flatten().tolist() == [5, 5, 5, 1]
    rows = quantizer.lookup(torch.tensor([[[2], [5], [6]]]))[0]
    torch.testing.assert_close(rows, rows[1:2].expand_as(rows), atol=6e-3, rtol=0)
    with pytest.raises(ValueError, match="no duplicates to retire"):
        VQ(VQConfig(size=8, dim=4), dim=4).retire_duplicates(torch.ones(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 32, 32), "floats \\[B, 3, H, W\\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floats"),
        (torch.zeros(0, 3, 32, 32), "floats"),
        (torch.full((1, 3, 32, 32), 255.0), "range"),
        (torch.zeros(1, 3, 40, 32), "cannot take a 40 x 32"),
    ],
)
def test_wrong_pixels_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        build().encode(images)


def test_resolution_codec_takes_several_sizes():
    codec = build(length=TINY["length"]["resolution"])
    assert codec.encode(pixels(1, 48, 32)).grid == [(3, 2)]


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match="Did you mean conv"):
        VisualCodecConfig(encoder={"kind": "cnv"})
    with pytest.raises(ValueError, match="divides sizes by 16"):
        VisualCodecConfig(decoder={"kind": "vit", "patch": 8})
    with pytest.raises(ValueError, match="go together"):
        VisualCodecConfig(length={"kind": "kept", "rows": 8, "columns": 8})
    with pytest.raises(ValueError, match="'halting', 'halted', 'kept_vit' go together"):
        build(resampler=TINY["resampler"]["halting"], length=TINY["length"]["halted"])
    with pytest.raises(ValueError, match="name three of each"):
        VisualCodecConfig(pixel_mean=[0.5, 0.5, 0.5])
    for options, message in (
        ({"class_token": True}, "has a row of the learned table"),
        ({"table_side": 2, "keep_class_token": True}, "and there is none"),
    ):
        with pytest.raises(ValueError, match=message):
            VisualCodecConfig(encoder={"kind": "vit", **options})
    with pytest.raises(ValueError, match="Did you mean smallest"):
        load_preset("smalest")


@pytest.mark.parametrize("name", [name for name in preset_names() if paper_of(name) is None])
def test_every_preset_encodes(name):
    config = load_preset(name)
    codec = VisualCodecModel(config).eval()
    size = config.image_size
    assert codec.reconstruct(pixels(1, size, size)).shape == (1, 3, size, size)


def animated_gif():
    file = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
    return Image.open(file)


PICTURES = {
    "grey": lambda: Image.new("L", (9, 7), 255),
    "one pixel": lambda: Image.new("RGB", (1, 1), "white"),
    "wide": lambda: Image.new("RGB", (20_000, 10), "white"),
    "cmyk": lambda: Image.new("CMYK", (30, 30), (0, 0, 0, 0)),
    "transparent": lambda: Image.new("RGBA", (30, 30), (0, 0, 0, 0)),
    "16 bit": lambda: Image.fromarray(np.full((30, 40), 65535, dtype=np.uint16)),
    "32 bit floats": lambda: Image.fromarray(np.ones((30, 40), dtype=np.float32)),
    "array": lambda: np.full((30, 40, 3), 255, dtype=np.uint8),
    "floats": lambda: torch.ones(3, 40, 40),
}


@pytest.mark.parametrize("name", PICTURES)
def test_white_pictures_of_every_kind_become_white_pixels(name):
    values = VisualCodecImageProcessor()(PICTURES[name](), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 128, 128)
    torch.testing.assert_close(values, torch.ones_like(values))


def test_an_animation_gives_its_first_frame():
    values = VisualCodecImageProcessor()(animated_gif(), return_tensors="pt")["pixel_values"]
    assert values[0, 0].min() > 0.9
    assert values[0, 2].max() < -0.9


def test_pictures_are_shown_in_one_range_whatever_the_codecs_own():
    codec = build(pixel_range=(0.0, 1.0), encoder=TINY["encoder"]["conv"])
    codes = codec.encode((pixels() + 1) / 2)
    torch.testing.assert_close(codec.pictures(codes), (codec.decode(codes) * 2 - 1).clamp(-1, 1))
    with pytest.raises(ValueError, match="decodes to features"):
        build(decoder=TINY["decoder"]["features"], resampler=TINY["resampler"]["grid"]).pictures(codes)


def test_levels_are_what_coarser_ones_leave_and_cells_what_they_do_not_share():
    torch.manual_seed(0)
    assert level_sizes(8) == (1, 1, 2, 4)
    assert [level_grid(size) for size in (1, 2, 4, 8, 32)] == [(1, 1), (1, 2), (2, 2), (2, 4), (4, 8)]
    features = torch.randn(2, 3, 2, 2)
    levels = residual_levels(features, (1, 1, 2, 4))
    torch.testing.assert_close(levels[:, 0], features.mean(dim=(2, 3)))
    torch.testing.assert_close(levels[:, 1], torch.zeros(2, 3), atol=1e-6, rtol=0)  # a second mean finds nothing
    columns = (levels[:, :1] + levels[:, 2:4]).transpose(1, 2).repeat(1, 1, 2)  # of the first row, then of the second
    torch.testing.assert_close(columns + levels[:, 4:].transpose(1, 2), features.flatten(2))
    resampler = MergingResampler(
        MergingResamplerConfig(tokens=4, rows=2, columns=4, dim=4, width=16, depth=2, num_heads=2, merge_in=(0, 1)),
        encoder_width=6,
        decoder_width=4,
    )
    read = resampler.read(torch.randn(2, 6, 2, 4))
    assert [cells.shape[1] for cells in read.cells] == [2, 4, 8]
    merged = resampler._merged(hidden := torch.randn(1, 9, 16), (2, 4))
    assert merged[:, :4].equal(hidden[:, 0:8:2])
    assert merged[:, 4:12:2].eq(0).all()  # a cell that stands for its pair keeps nothing
    torch.testing.assert_close(merged[:, 5:12:2] + merged[:, :4], hidden[:, 1:8:2])
    assert merged[:, 12:].equal(hidden[:, 8:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 12}, "need a power of two"),
        ({"merge_in": (3, 3)}, "name rising blocks"),
        ({"merge_in": (24,)}, "name rising blocks"),
        ({"merge_in": (0,), "columns": 7}, "must leave a whole number"),
        ({"merge_in": (0,), "reduction": 0.0}, "must leave a whole number"),
    ],
)
def test_wrong_levels_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MergingResamplerConfig(**options)


def test_a_pyramid_normalises_what_it_reads_and_refuses_half_a_statistic():
    sizes = {"channels": (32, 32), "blocks": 1, "code_channels": 8, "stem_channels": 32, "averaged": True}
    torch.manual_seed(0)
    plain = PyramidEncoder(PyramidEncoderConfig(**sizes))
    normalising = PyramidEncoder(PyramidEncoderConfig(**sizes, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    normalising.load_state_dict(plain.state_dict())
    shown = torch.rand(1, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalising.mean, normalising.std))
    torch.testing.assert_close(normalising(shown), plain((shown - mean) / std))
    for wrong in ({"mean": (0.1, 0.2, 0.3)}, {"mean": (0, 0, 0), "std": (1, 1, 0)}, {"centred": True}):
        with pytest.raises(ValueError, match=r"name three of each|set one of them"):
            PyramidEncoderConfig(**sizes, **wrong)


@pytest.mark.parametrize("kinds", [FLOW, {"decoder": "cell_flow"}])
def test_a_flow_draws_the_same_codes_alike_and_otherwise_on_request(kinds):
    codec = build(**{socket: TINY[socket][kind] for socket, kind in kinds.items()})
    torch.nn.init.normal_(codec.decoder.to_patches.weight)
    codes = codec.encode(pixels())
    drawn = codec.decode(codes)
    assert codec.decode(codes).equal(drawn)
    alone = VisualCodes(
        codes.ids[1:2], codes.mask[1:2], codes.grid and codes.grid[1:2]
    )  # what stands beside a picture changes nothing
    torch.testing.assert_close(codec.decode(alone), drawn[1:2], atol=1e-5, rtol=1e-5)
    one, same, other = (codec.decode(codes, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.equal(same)
    assert not one.equal(other)
    assert not one.equal(drawn)
    for length in range(codec.length.min_length, codec.length.max_length + 1):
        assert codec.reconstruct(pixels()).shape == codec.decode(codec.encode(pixels(), num_tokens=length)).shape
    vectors = codec.resampler.restore(codec.lookup(codes), (2, 2))
    for steps in (0, -1):
        with pytest.raises(ValueError, match="takes at least 1"):
            codec.decoder.sample(vectors, torch.zeros(3, 3, 32, 32), steps=steps)
        with pytest.raises(ValueError, match="takes at least 1"):
            FlowDecoderConfig(steps=steps)


def test_projected_guidance_keeps_what_is_orthogonal_within_its_norm():
    torch.manual_seed(0)
    with_codes, without_codes = torch.randn(2, 2, 3, 4, 4)
    plain = ProjectedGuidance(scale=3.0, momentum=0.0, norm_threshold=0.0, parallel=1.0)
    guided, summed = plain.apply(with_codes, without_codes, torch.zeros_like(with_codes))
    torch.testing.assert_close(guided, without_codes + 3 * (with_codes - without_codes), atol=1e-5, rtol=1e-5)
    projected = ProjectedGuidance(scale=3.0, momentum=-0.5, norm_threshold=0.7)
    guided, again = projected.apply(with_codes, without_codes, summed)
    torch.testing.assert_close(again, summed / 2)
    update = (guided - with_codes).flatten(1)
    assert (update * with_codes.flatten(1)).sum(dim=1).abs().max() < 1e-4
    assert (update.norm(dim=1) <= 2 * 0.7 + 1e-5).all()


def test_a_flow_learns_to_draw_what_its_codes_say():
    torch.manual_seed(0)
    size = {"rows": 1, "columns": 1, "patch": 2, "width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64}
    decoder = FlowDecoder(FlowDecoderConfig(dim=2, tokens=2, **size))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    bright = torch.tensor([0.0, 1.0])
    vectors = bright.view(2, 1, 1).expand(2, 2, 2)
    picture = (2 * bright - 1).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    for _ in range(150):
        optimizer.zero_grad()
        decoder.denoise(vectors.repeat(16, 1, 1), picture.repeat(16, 1, 1, 1)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        noise = torch.randn(2, 3, 2, 2)
        drawn = decoder.sample(vectors, noise, steps=8, guidance=ProjectedGuidance(scale=1.0))
    torch.testing.assert_close(drawn.mean(dim=(1, 2, 3)), picture.mean(dim=(1, 2, 3)), atol=0.3, rtol=0)


def tiny_cells():
    """A flow of 2 x 2 cells of 4 pixels a side, none of whose parts is silent."""
    torch.manual_seed(0)
    size = {"rows": 2, "columns": 2, "patch": 4, "width": 32, "depth": 1, "num_heads": 2, "flow_depth": 2}
    return CellFlowDecoder(CellFlowConfig(dim=2, **size)).eval()


@torch.no_grad()
def test_cells_of_a_flow_share_what_codes_say_and_no_noise():
    decoder = tiny_cells()
    vectors, noise = torch.randn(1, 2, 2, 2), torch.randn(1, 3, 8, 8)
    drawn = decoder.sample(vectors, noise, steps=3)
    other = noise.clone()
    other[:, :, :4, :4] = torch.randn(1, 3, 4, 4)  # the first cell
    again = decoder.sample(vectors, other, steps=3)
    assert not again[:, :, :4, :4].isclose(drawn[:, :, :4, :4]).all()
    torch.testing.assert_close(again[:, :, 4:], drawn[:, :, 4:])
    torch.testing.assert_close(again[:, :, :4, 4:], drawn[:, :, :4, 4:])
    other = vectors.clone()
    other[:, :, 0, 0] += 1  # its code
    assert not decoder.sample(other, noise, steps=3)[:, :, 4:].isclose(drawn[:, :, 4:]).any()


def test_a_flow_of_cells_learns_to_draw_what_its_codes_say():
    decoder = tiny_cells().train()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    bright = torch.tensor([0.0, 1.0])
    vectors = bright.view(2, 1, 1, 1).expand(2, 2, 2, 2)
    picture = (2 * bright - 1).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    for _ in range(150):
        optimizer.zero_grad()
        decoder.denoise(vectors.repeat(8, 1, 1, 1), picture.repeat(8, 1, 1, 1)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = decoder.sample(vectors, torch.randn(2, 3, 8, 8), steps=8)
    torch.testing.assert_close(drawn.mean(dim=(1, 2, 3)), picture.mean(dim=(1, 2, 3)), atol=0.3, rtol=0)


def test_a_grid_has_one_map_before_its_projection():
    codec = build(resampler={"kind": "grid", "dim": 16, "norm": False, "gelu_width": 24})
    features = torch.randn(2, codec.encoder(pixels()).shape[1], 2, 2)
    first, last = codec.resampler.before[0], codec.resampler.to_positions
    wanted = F.linear(F.gelu(first(features.flatten(2).mT)), last.weight[..., 0], last.bias)
    torch.testing.assert_close(codec.resampler.sample(features), wanted)
    with pytest.raises(ValueError, match="set all but one of them to 0"):
        GridResamplerConfig(tanh_width=8, gelu_width=8)


@pytest.mark.parametrize(
    ("length", "legal"),
    [("fixed", "2 x 2"), ("resolution", "1 x 1, 1 x 2"), ("pooled", "2 x 2, 1 x 1"), ("adaptive", "2 x 2, 1 x 1")],
)
def test_codes_on_a_grid_that_no_picture_has_are_refused(length, legal):
    codec = build(length=TINY["length"][length])
    ids = torch.zeros(1, 4, 1, dtype=torch.int64)
    codec.decode(VisualCodes.from_grid(ids.unflatten(1, (2, 2))))
    with pytest.raises(ValueError, match=f"grid of 4 x 1; this codec decodes {legal}"):
        codec.decode(VisualCodes.from_grid(ids.unflatten(1, (4, 1))))


@pytest.fixture
def filled():
    codec = build(**{socket: TINY[socket][kind] for socket, kind in (LATENT | {"length": "filled"}).items()})
    torch.nn.init.normal_(codec.absent)
    return codec


def test_filled_codes_of_several_lengths_are_decoded_together(filled):
    codes, lengths = filled.encode(pixels()), (1, 3, 4)
    codes.mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    together = filled.decode(codes)
    for picture, length in enumerate(lengths):
        alone = VisualCodes(codes.ids[picture : picture + 1, :length], torch.ones(1, length, dtype=torch.bool))
        torch.testing.assert_close(filled.decode(alone)[0], together[picture], atol=1e-5, rtol=0)
    plain = build(**{socket: TINY[socket][kind] for socket, kind in LATENT.items()})
    with pytest.raises(ValueError, match="decode one length at a time"):
        plain.decode(codes)


def test_each_picture_of_a_batch_learns_at_its_own_length(filled, tmp_path):
    lengths = torch.tensor([1, 3, 4])
    output = filled(pixels(), num_tokens=lengths)
    whole = filled.encode(pixels()).ids
    assert output.ids.equal(whole * (torch.arange(4) < lengths[:, None])[..., None])
    for picture, length in enumerate(lengths.tolist()):
        alone = filled(pixels()[picture : picture + 1], num_tokens=length)
        torch.testing.assert_close(alone.reconstruction[0], output.reconstruction[picture], atol=1e-5, rtol=0)
    output.reconstruction.square().mean().backward()
    assert filled.absent.grad.abs().sum() > 0
    filled.save_pretrained(tmp_path)
    again = VisualCodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.absent.equal(filled.absent)
    with pytest.raises(ValueError, match=r"need a codec of length\.filled"):
        filled(pixels(), num_tokens=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="set prefixes: true"):
        build(length=TINY["length"]["filled"] | {"prefixes": False})
