"""Codecs under a text: on the side of the decoder alone (TA-TiTok), or on both (TexTok)."""

import pytest
import torch

from unimm import VisualCodecConfig, VisualCodecModel

GRID = {"rows": 2, "columns": 2}
SIZES = {"tokens": 3, "depth": 1, "num_heads": 2, **GRID}
TEXT = {"condition_tokens": 5, "condition_width": 6}


def build(reading=TEXT, drawing=TEXT, quantizer=None):
    """TexTok's form: patches, latents and a text, and latents without codes."""
    torch.manual_seed(0)
    config = VisualCodecConfig(
        image_size=16,
        encoder={"kind": "patches", "patch": 8, "width": 16},
        resampler={"kind": "latent", "dim": 4, **SIZES, **reading},
        quantizer=quantizer or {"kind": "gaussian"},
        length={"kind": "sequence", "tokens": 3, **GRID},
        decoder={"kind": "mask_vit", "dim": 4, "patch": 8, "width": 16, **SIZES, **drawing},
    )
    codec = VisualCodecModel(config)
    for weight in codec.parameters():
        if not weight.abs().sum():
            torch.nn.init.normal_(weight.data, std=0.2)
    return codec


def given():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, torch.randn(2, 5, 6, generator=generator)


def test_both_sides_read_the_text_and_neither_works_without(tmp_path):
    codec, (pixels, text) = build().eval(), given()
    codes = codec.encode(pixels, condition=text)
    assert codes.side_info["latents"].shape == (2, 3, 4)
    other = codec.encode(pixels, condition=text.flip(0))
    assert not torch.allclose(other.side_info["latents"], codes.side_info["latents"], atol=1e-3)
    drawn = codec.decode(codes, condition=text)
    assert not torch.allclose(codec.decode(codes, condition=text.flip(0)), drawn, atol=1e-3)
    torch.testing.assert_close(codec.reconstruct(pixels, condition=text), drawn)
    for wrong in (None, text[:, 1:], text[:1]):
        with pytest.raises(ValueError, match="encodes under a text"):
            codec.encode(pixels, condition=wrong)
        with pytest.raises(ValueError, match="decodes under a text"):
            codec.decode(codes, condition=wrong)
        with pytest.raises(ValueError, match="learns under a text"):
            codec(pixels, condition=wrong)
    codec.save_pretrained(tmp_path)
    again = VisualCodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(again.encode(pixels, condition=text).side_info, codes.side_info)


def test_every_part_learns_under_a_text():
    codec, (pixels, text) = build().train(), given()
    output = codec(pixels, condition=text)
    (output.reconstruction.square().mean() + output.quantizer_loss).backward()
    for name, weight in codec.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
    assert codec.resampler.text.embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("reading", "drawing"), [({}, TEXT), (TEXT, {})])
def test_a_text_may_be_on_one_side_alone(reading, drawing):
    codec, (pixels, text) = build(reading, drawing, {"kind": "vq", "size": 8, "dim": 4}).eval(), given()
    codes = codec.encode(pixels, condition=text if reading else None)
    drawn = codec.decode(codes, condition=text if drawing else None)
    torch.testing.assert_close(codec.reconstruct(pixels, condition=text), drawn)
    assert codec(pixels, condition=text).ids.equal(codes.ids)
    for wrong, call in ((not reading, codec.encode), (not drawing, codec.decode)):
        if wrong:
            with pytest.raises(ValueError, match="takes no condition"):
                call(pixels if call == codec.encode else codes, condition=text)


def test_one_text_serves_both_sides():
    with pytest.raises(ValueError, match="one text serves both"):
        build(drawing=TEXT | {"condition_tokens": 4})
