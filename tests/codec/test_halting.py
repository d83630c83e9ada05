"""Latents that halt: which codes a picture keeps, what is drawn from them, and how halting is learnt."""

import math
from dataclasses import replace

import pytest
import torch

from unimm import VisualCodecConfig, VisualCodecModel, VisualCodes
from unimm.codec.halting import HaltingResamplerConfig, PatchesAndCodesConfig
from unimm.codec.length import HaltedLength

PYRAMID = {"channels": [32, 32, 32], "blocks": 1, "middle_attention": False, "code_channels": 8}
TOKENS = 12


@pytest.fixture
def codec():
    """Of random weights, none of them zero."""
    torch.manual_seed(0)
    grid = {"rows": 3, "columns": 3}
    transformer = {"depth": 2, "num_heads": 2, "table_side": 5}
    config = VisualCodecConfig(
        image_size=12,
        encoder={
            "kind": "patches_and_codes",
            "patch": 4,
            "patch_width": 8,
            "base": {**PYRAMID, "stem_channels": 32},
            "base_codes": 6,
        },
        resampler={
            "kind": "halting",
            "tokens": TOKENS,
            "dim": 4,
            **transformer,
            "allowed_errors": [0.02, 0.1, 0.3],
            "halting_width": 32,
        },
        quantizer={"kind": "vq", "size": 16, "dim": 4, "project": False},
        length={"kind": "halted", **grid, "tokens": TOKENS, "budget": 10},
        decoder={
            "kind": "kept_vit",
            "dim": 4,
            "tokens": TOKENS,
            **grid,
            **transformer,
            "width": 16,
            "soft_codebook": {"size": 6, "pyramid": PYRAMID},
        },
    )
    codec = VisualCodecModel(config).eval()
    for weight in codec.parameters():
        if not weight.abs().sum():
            torch.nn.init.normal_(weight.data)
    with torch.no_grad():
        halting = codec.resampler.latents(codec.encoder(pixels()), 10, torch.full((4,), 0.05)).halting
        codec.resampler.to_halting[2].bias += math.log(3) - halting.quantile(0.55)  # about half of them halt
    return codec


def pixels(batch=4):
    return torch.rand(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_pictures_keep_latents_of_any_place_within_their_budget(codec):
    codes = codec.encode(pixels())
    assert len(set(codes.lengths.tolist())) > 1
    places = codes.side_info["places"]
    assert any(
        kept.tolist() != list(range(len(kept))) for kept in (p[m] for p, m in zip(places, codes.mask, strict=True))
    )
    assert places.max() < 10
    assert codec.encode(pixels(), num_tokens=4).side_info["places"].max() < 4
    for tokens in (0, TOKENS + 1):
        with pytest.raises(ValueError, match=f"num_tokens is {tokens}; a picture has 1 to {TOKENS}"):
            codec.encode(pixels(), num_tokens=tokens)


def test_the_pictures_beside_one_change_nothing(codec):
    together = codec.encode(pixels())
    drawn = codec.decode(together)
    for index, length in enumerate(together.lengths.tolist()):
        alone = codec.encode(pixels()[index : index + 1])
        assert alone.ids[0].equal(together.ids[index, :length])
        torch.testing.assert_close(codec.decode(alone)[0], drawn[index], atol=1e-5, rtol=0)


@torch.no_grad()
def test_halted_latents_are_invisible(codec):
    keep = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.5
    vectors = torch.randn(2, TOKENS, 4)
    cells = codec.decoder.cells(vectors, keep)
    other = torch.where(keep[..., None], vectors, torch.randn(2, TOKENS, 4))
    assert codec.decoder.cells(other, keep).equal(cells)
    assert not codec.decoder.cells(other).allclose(codec.decoder.cells(vectors))
    for index in range(2):  # as they are decoded: without them
        places = keep[index].nonzero().T
        alone = codec.decoder.cells(vectors[index : index + 1, keep[index]], places=places)
        torch.testing.assert_close(alone[0], cells[index], atol=1e-5, rtol=0)


def test_codes_without_places_are_those_of_the_first_latents(codec):
    codes = codec.encode(pixels(1))
    bare = VisualCodes(codes.ids, codes.mask)
    first = VisualCodes(codes.ids, codes.mask, side_info={"places": torch.arange(codes.ids.shape[1])[None]})
    assert codec.decode(bare).equal(codec.decode(first))
    assert codes.side_info["places"].tolist() != first.side_info["places"].tolist()
    assert not codec.decode(bare).equal(codec.decode(codes))
    for places, message in (
        (codes.side_info["places"] + TOKENS, "there are 0 to 11"),
        (codes.side_info["places"][:, 1:], "give int64"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode(VisualCodes(codes.ids, codes.mask, side_info={"places": places}))


@torch.no_grad()
def test_a_latent_is_kept_up_to_the_threshold_and_one_always(codec):
    codec.resampler.config = replace(codec.resampler.config, threshold=0.5)
    halting = torch.tensor([[0.0, 1e-5, -3.0, 4.0], [0.9, 0.8, 0.95, 0.99]])  # logits
    assert codec.resampler.keep(halting).tolist() == [[True, False, True, False], [False, True, False, False]]


@torch.no_grad()
def test_the_error_asked_for_is_the_first_that_is_not_below(codec):
    features = codec.encoder(pixels(1))
    sequences = [codec.resampler.read(features, 5, torch.tensor([error])) for error in (0.1, 0.021, 0.02, 0.11, 9.0)]
    same = [one.equal(sequences[0]) for one in sequences]
    assert same == [True, True, False, False, False]
    assert sequences[3].equal(sequences[4])  # beyond the largest, the largest
    codes = [codec.encode(pixels(), allowed_error=error) for error in (None, 0.05, 0.3)]
    assert codes[0].ids.equal(codes[1].ids)
    assert codes[0].ids.shape != codes[2].ids.shape or not codes[0].ids.equal(codes[2].ids)
    for error in (-0.1, 0.4, math.nan):
        with pytest.raises(ValueError, match=r"allowed_error is .*; this codec takes 0 to 0\.3"):
            codec.encode(pixels(), allowed_error=error)
    with pytest.raises(ValueError, match="whatever the error"):
        VisualCodecModel(VisualCodecConfig(image_size=16)).encode(torch.zeros(1, 3, 16, 16), allowed_error=0.1)


def test_latents_learn_that_the_last_of_them_halt_first(codec):
    def order():
        """How much likelier the last latents halt than the first ones."""
        with torch.no_grad():
            halting = codec.resampler.latents(codec.encoder(pixels()), 10, torch.full((4,), 0.1)).halting
        return float(halting[:, -4:].mean() - halting[:, :4].mean())

    codec.train()
    weights = [weight for weight in codec.parameters() if weight.requires_grad]
    frozen = {id(weight) for weight in (*codec.encoder.base.parameters(), codec.encoder.base_rows)}
    assert {id(weight) for weight in codec.parameters()} - {id(weight) for weight in weights} == frozen
    optimizer, before = torch.optim.Adam(weights, lr=1e-2), order()
    for _ in range(15):
        output = codec(pixels())
        assert 1 <= output.ids.shape[1] <= 10
        optimizer.zero_grad()
        (output.halting_loss + output.reconstruction.square().mean() + output.quantizer_loss).backward()
        optimizer.step()
    assert order() > max(0, before) + 0.5


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="base divides sizes by 16"):
        PatchesAndCodesConfig(patch=8)
    with pytest.raises(ValueError, match="name positive errors that rise"):
        HaltingResamplerConfig(allowed_errors=(0.1, 0.1))
    with pytest.raises(ValueError, match="threshold is 1"):
        HaltingResamplerConfig(threshold=1.0)
    with pytest.raises(ValueError, match="num_tokens is 9"):
        HaltedLength(rows=2, columns=2, tokens=4, budget=9)
