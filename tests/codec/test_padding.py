"""Latents of padding (ReToK): training decodes them, and no code stands for them."""

import pytest
import torch

from unimm import VisualCodecConfig, VisualCodecModel
from unimm.codec.queries import QueryResampler, QueryResamplerConfig

GRID = {"rows": 4, "columns": 4}
SIZES = {"width": 16, "depth": 1, "num_heads": 2}
PYRAMID = {"channels": [32, 32], "blocks": 1, "code_channels": 16}


def build(**length):
    torch.manual_seed(0)
    config = VisualCodecConfig(
        image_size=8,
        encoder={"kind": "pyramid", **PYRAMID, "stem_channels": 32},
        resampler={"kind": "queries", "tokens": 4, "padding": 3, "dim": 8, **SIZES, **GRID},
        quantizer={"kind": "vq", "size": 32, "dim": 8, "project": False},
        length={"kind": "sequence", "tokens": 4, "padding": 3, "prefixes": True, **GRID} | length,
        decoder={"kind": "query_vit", "tokens": 7, "dim": 8, **SIZES, **GRID, "pixels": PYRAMID},
    )
    codec = VisualCodecModel(config)
    for weight in codec.parameters():
        if not weight.abs().sum():
            torch.nn.init.normal_(weight.data, std=0.02)
    return codec


def pixels():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_only_the_first_latents_are_codes():
    codec = build().eval()
    codes = codec.encode(pixels())
    assert codes.ids.shape == (2, 4, 1)
    assert codec.spec.max_length == 4
    assert codec.encode(pixels(), num_tokens=2).ids.equal(codes.ids[:, :2])
    output = codec(pixels())
    torch.testing.assert_close(output.reconstruction, codec.decode(codes))
    assert output.vectors.shape == (2, 4, 8)  # what objectives read
    with pytest.raises(ValueError, match="makes and decodes 1 to 4"):
        codec.encode(pixels(), num_tokens=5)
    with pytest.raises(ValueError, match=r"7 latents, with those of length\.padding"):
        codec(pixels(), num_tokens=8)


@pytest.mark.parametrize("filled", [False, True])
def test_training_decodes_the_padding_where_it_is_asked_for(filled):
    codec = build(filled=filled).train()
    positions = codec.decoder.reader.positions
    codec(pixels(), num_tokens=4).reconstruction.square().mean().backward()
    assert bool(positions.grad[4:].any()) == filled  # where all are filled, by one learned vector
    codec.zero_grad()
    output = codec(pixels(), num_tokens=torch.tensor([2, 7]) if filled else 7)
    assert output.ids.shape == (2, 7, 1)
    output.reconstruction.square().mean().backward()
    assert positions.grad[4:].abs().sum(dim=1).min() > 0
    assert codec.resampler.reader.query_positions.grad[4:].abs().sum(dim=1).min() > 0
    drawn = codec.eval().decode(codec.encode(pixels()))
    assert drawn.shape == pixels().shape


def test_padding_begins_as_the_last_averages_do():
    torch.manual_seed(0)
    config = QueryResamplerConfig(tokens=4, padding=3, dim=8, **SIZES, **GRID)
    resampler = QueryResampler(config, encoder_width=16, decoder_width=8).eval()
    with torch.no_grad():  # at the same place what begins alike ends alike
        resampler.reader.query_positions[4:] = resampler.reader.query_positions[1:4]
        latents = resampler.sample(torch.randn(2, 16, 4, 4))
    torch.testing.assert_close(latents[:, 4:], latents[:, 1:4])
    with pytest.raises(ValueError, match="the last of 4 averages"):
        QueryResamplerConfig(tokens=4, padding=5, **GRID)


def test_padding_needs_prefixes():
    with pytest.raises(ValueError, match=r"length\.padding is 3"):
        build(prefixes=False)
