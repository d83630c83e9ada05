"""Distances that count each principal axis of the vectors by their variance there (DINO-Tok)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import GRID, pixels, recipe_of
from towers import write_tower

from unimm.codec import VisualCodecModel
from unimm.codec.quantizers import VQ, VQConfig
from unimm.codec.quantizers.vector import nearest_rows
from unimm.config import from_dict
from unimm.training.codec import CodecRecipe, CodecTask, train_codec
from unimm.training.pool import Pool

VARIANCES = torch.tensor([9.0, 1.0, 0.04, 0.0])
PLAIN = {"size": 24, "dim": 4, "project": False, "normalize": False}


def cloud(seed, number=4000):
    """Vectors `[number, 4]` of known variances along known axes, the columns of `[4, 4]`."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    along = torch.randn(number, 4, generator=generator)
    along = torch.linalg.qr(along - along.mean(dim=0)).Q * (number - 1) ** 0.5  # uncorrelated, of variance 1
    return (along * VARIANCES.sqrt()) @ axes.T + 5, axes


def weighed(seed, **options):
    torch.manual_seed(seed)
    quantizer = VQ(VQConfig(**PLAIN | {"channel_weights": True} | options), dim=4)
    vectors, axes = cloud(seed)
    quantizer.weigh_channels(vectors)
    return quantizer, vectors, axes


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_axes_of_a_known_covariance_are_found(seed):
    quantizer, _, axes = weighed(seed)
    weights = axes.T @ quantizer.channel_map @ quantizer.channel_map.T @ axes
    torch.testing.assert_close(weights, torch.diag(VARIANCES / VARIANCES.mean()), atol=2e-3, rtol=0)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_weighed_search_is_a_plain_one_of_scaled_vectors(seed):
    quantizer, vectors, axes = weighed(seed)
    vectors = vectors[:200] - 5
    scale = (VARIANCES / VARIANCES.mean()).sqrt()
    plain = torch.cdist((vectors @ axes * scale).double(), (quantizer.codebook.detach() @ axes * scale).double())
    best = plain.gather(1, quantizer.eval()(vectors[None]).ids[0])[:, 0]
    torch.testing.assert_close(best, plain.amin(dim=1), atol=2e-3, rtol=0)
    quantizer.train()
    scores = -quantizer._scores(vectors, quantizer.codebook)  # what rows are drawn and re-anchored by
    torch.testing.assert_close(scores.double(), plain.square(), atol=2e-2, rtol=1e-3)
    assert not quantizer(vectors[None]).ids.equal(nearest_rows(vectors, quantizer.codebook)[None, :, None])


def test_codes_stand_for_rows_as_they_are():
    quantizer, vectors, _ = weighed(0)
    quantized = quantizer(vectors[None, :50])
    assert quantized.vectors.detach().allclose(quantizer.codebook[quantized.ids[..., 0]], atol=1e-5)
    assert quantizer.lookup(quantized.ids).equal(quantizer.codebook[quantized.ids[..., 0]])


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


def around(tower, **quantizer):
    """Two layers of a frozen tower side by side, and a codebook for each."""
    return {
        "encoder": {"kind": "tower", "tower": tower, "layers": [1, 2]},
        "resampler": {"kind": "grid", "dim": 32, "norm": False, "groups": 2},
        "quantizer": {
            "kind": "product",
            "sizes": [16, 16],
            "dim": 16,
            "project": False,
            "normalize": False,
            **quantizer,
        },
        "decoder": {"kind": "conv", "patch": 8, "channels": [8], "blocks": 1},
    }


def shown(number=6):
    return ((pixels(number).permute(0, 2, 3, 1) + 1) * 127.5).byte().numpy()


def test_a_recipe_weighs_each_codebook_by_its_own_vectors_and_codes_survive_a_reload(tower, tmp_path):
    model = around(tower, channel_weights=True)
    recipe = from_dict(CodecRecipe, recipe_of(tmp_path, "run", model, weigh_channels=4))
    task = CodecTask(recipe, Pool(shown(), {}))
    codec, given_pixels = (
        task.codec.eval(),
        task.codec.from_shown(torch.from_numpy(shown()[:4]).permute(0, 3, 1, 2) / 127.5 - 1),
    )
    positions = codec.resampler.sample(codec.encoder(given_pixels)).detach().flatten(0, 1)
    for book, part in zip(codec.quantizer.parts, positions.chunk(2, dim=-1), strict=True):
        covariance = torch.cov(part.T)
        wanted = covariance * 16 / covariance.trace()
        torch.testing.assert_close(book.channel_map @ book.channel_map.T, wanted, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        for book in codec.quantizer.parts:
            book.codebook.copy_(positions[torch.randperm(len(positions))[:16], :16])
    ids = codec.encode(given_pixels).ids
    codec.save_pretrained(tmp_path / "saved")
    assert VisualCodecModel.from_pretrained(tmp_path / "saved").encode(given_pixels).ids.equal(ids)
    for book in codec.quantizer.parts:
        book.channel_map.copy_(torch.eye(16))
    assert not codec.encode(given_pixels).ids.equal(ids)


@pytest.mark.parametrize(
    ("quantizer", "others", "said"),
    [
        ({}, {"weigh_channels": 4}, "has no weights to measure"),
        ({"channel_weights": True}, {}, "name a number of pictures"),
        ({"kind": "residual", "channel_weights": True}, {"weigh_channels": 4}, "take kind: vq or product"),
        ({"channel_weights": True, "metric": "dot"}, {"weigh_channels": 4}, "take metric: l2"),
    ],
)
def test_weights_that_nothing_measures_or_reads_are_refused(tmp_path, quantizer, others, said):
    fields = recipe_of(tmp_path, "run", GRID | {"quantizer": GRID["quantizer"] | quantizer}, **others)
    with pytest.raises(ValueError, match=said):
        train_codec(from_dict(CodecRecipe, fields))


def test_vectors_that_do_not_differ_have_no_axes():
    quantizer = VQ(VQConfig(**PLAIN, channel_weights=True), dim=4)
    with pytest.raises(ValueError, match="do not differ"):
        quantizer.weigh_channels(torch.from_numpy(np.ones((5, 4), np.float32)))
    with pytest.raises(ValueError, match="channel_weights: true"):
        VQ(VQConfig(**PLAIN), dim=4).weigh_channels(torch.randn(5, 4))
