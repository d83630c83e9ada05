"""How quantizers learn: the value is always that of the codes, and the gradient goes where the paper sends it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from unimm.codec.quantizers import ESTIMATORS, VQ, Gaussian, GaussianConfig, SignConfig, SignQuantizer, VQConfig
from unimm.codec.quantizers.estimators import bit_entropy_gap, entropy_gap


def codebook(seed=0, **options):
    torch.manual_seed(seed)
    plain = {"size": 12, "dim": 4, "project": False, "normalize": False}
    plain["metric"] = "dot" if options.get("estimator") == "weighed" else "l2"
    return VQ(VQConfig(**plain | options), dim=4).train()


def vectors(seed=0, number=9):
    return torch.randn(2, number, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@given(st.sampled_from([*ESTIMATORS]), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_value_is_that_of_the_codes(estimator, normalize, seed):
    quantizer, given_vectors = codebook(seed, estimator=estimator, normalize=normalize), vectors(seed)
    quantized = quantizer(given_vectors)
    torch.testing.assert_close(quantized.vectors, quantizer.lookup(quantized.ids), atol=1e-6, rtol=0)
    (quantized.vectors.sum() + quantized.loss).backward()
    assert given_vectors.grad.isfinite().all()
    assert quantizer.codebook.grad.isfinite().all()


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_rotation_keeps_the_angle_between_gradient_and_row(seed):
    quantizer, given_vectors = codebook(seed, estimator="rotated"), vectors(seed)
    quantized = quantizer(given_vectors)
    sent = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(seed + 1))
    (arrived,) = torch.autograd.grad(quantized.vectors, given_vectors, sent)
    rows = quantized.vectors.detach()
    before, after = F.cosine_similarity(sent, rows, dim=-1), F.cosine_similarity(arrived, given_vectors, dim=-1)
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    stretch = rows.norm(dim=-1) / given_vectors.norm(dim=-1)
    torch.testing.assert_close(arrived.norm(dim=-1), sent.norm(dim=-1) * stretch, atol=1e-3, rtol=1e-3)


def test_copied_gradients_arrive_as_they_were_sent():
    quantizer, given_vectors = codebook(), vectors()
    sent = torch.randn(2, 9, 4)
    (arrived,) = torch.autograd.grad(quantizer(given_vectors).vectors, given_vectors, sent)
    torch.testing.assert_close(arrived, sent)


def test_weighed_choices_teach_every_row_and_copied_ones_none():
    for estimator, taught in (("weighed", 12), ("copied", 0), ("rotated", 0)):
        quantizer = codebook(estimator=estimator, metric="dot")
        quantizer(vectors()).vectors.square().sum().backward()
        grads = quantizer.codebook.grad
        assert (0 if grads is None else int(grads.abs().sum(dim=1).gt(0).sum())) == taught


def test_weighed_gradients_are_those_of_the_softmax():
    quantizer, given_vectors = codebook(estimator="weighed", metric="dot"), vectors()
    sent = torch.randn(2, 9, 4)
    (arrived,) = torch.autograd.grad(quantizer(given_vectors).vectors, given_vectors, sent)
    rows = quantizer.codebook.detach()
    (expected,) = torch.autograd.grad((given_vectors @ rows.T).softmax(dim=-1) @ rows, given_vectors, sent)
    torch.testing.assert_close(arrived, expected)


def test_a_mapped_codebook_learns_by_its_map_alone():
    quantizer = codebook(map_rows=True)
    quantized = quantizer(vectors())
    quantized.loss.backward()
    assert quantizer.codebook.grad is None
    assert quantizer.row_map.weight.grad.abs().sum() > 0


def test_rows_are_drawn_by_chance_in_training_and_never_afterwards():
    quantizer, one = codebook(sample_temperature=1.0), vectors(number=1)[:1].detach()
    torch.manual_seed(0)
    many = one.expand(1, 4000, 4)
    shares = torch.bincount(quantizer(many).ids.flatten(), minlength=12) / 4000
    expected = -torch.cdist(one[0], quantizer.codebook).square()
    torch.testing.assert_close(shares, expected.softmax(dim=1)[0].detach(), atol=0.03, rtol=0)
    assert len(quantizer.eval()(many).ids.unique()) == 1


def test_rows_that_are_hardly_used_move_to_vectors_and_others_stay():
    quantizer = codebook(reanchor=True)
    quantizer.codebook.data[0] = 0.0
    quantizer.codebook.data[1:] += 50.0  # far from all vectors
    quantizer.shares.fill_(1.0)
    quantizer.shares[6:] = 0.0
    before = quantizer.codebook.detach().clone()
    quantizer(vectors(number=40))
    assert quantizer.codebook[:6].equal(before[:6])
    assert (quantizer.codebook[6:].norm(dim=1) < 10).all()
    assert quantizer.shares.sum() == pytest.approx(0.99 * 6 + 0.01)
    after = quantizer.codebook.detach().clone()
    quantizer.eval()(vectors())
    assert quantizer.codebook.equal(after)


def test_the_entropy_gap_is_least_where_choices_are_sure_and_all_rows_are_used():
    sure, unsure = torch.eye(8) * 100, torch.zeros(8, 8)
    lazy = torch.zeros(8, 8)
    lazy[:, 0] = 100
    assert entropy_gap(sure) == pytest.approx(-math.log(8), abs=1e-4)
    assert entropy_gap(unsure) == pytest.approx(0, abs=1e-5)
    assert entropy_gap(lazy) == pytest.approx(0, abs=1e-5)
    bits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert bit_entropy_gap(bits) == pytest.approx(-2 * math.log(2), abs=1e-3)
    assert bit_entropy_gap(torch.full((2, 2), 0.5)) == pytest.approx(0, abs=1e-5)


def test_entropy_spreads_signs_and_rows():
    torch.manual_seed(0)
    for quantizer in (SignQuantizer(SignConfig(commitment=0.0, entropy=1.0), dim=3), codebook(entropy=1.0)):
        moved = (torch.randn(1, 64, 3 if isinstance(quantizer, SignQuantizer) else 4) * 0.2 + 0.3).requires_grad_()
        before = quantizer(moved)
        before.loss.backward()
        with torch.no_grad():
            for weight in (moved, *quantizer.parameters()):
                weight -= 0.01 * weight.grad
        after = quantizer(moved)
        assert after.loss < before.loss  # one step downhill
        assert not before.loss.isnan()
    plain = SignQuantizer(SignConfig(commitment=0.0), dim=3)(torch.randn(1, 4, 3))
    assert plain.loss == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "straight"}, "must be one of copied, rotated, weighed"),
        ({"reanchor": True, "ema_decay": 0.9}, "neither re-anchored nor weighed"),
        ({"estimator": "weighed", "map_rows": True}, "neither re-anchored nor weighed"),
        ({"estimator": "weighed", "metric": "l2"}, "choose by them too: metric: dot"),
        ({"kmeans_steps": 3, "map_rows": True}, "set one of the two"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        codebook(**options)


@given(st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_spherical_signs_lie_on_the_sphere_and_are_the_nearest_corner(dim, seed):
    quantizer = SignQuantizer(SignConfig(spherical=True, entropy=1.0), dim=dim)
    cloud = torch.randn(1, 9, dim, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    quantized = quantizer(cloud)
    torch.testing.assert_close(quantized.vectors.norm(dim=-1), torch.ones(1, 9))
    torch.testing.assert_close(quantizer.lookup(quantized.ids), quantized.vectors)
    assert quantized.ids.equal(SignQuantizer(SignConfig(), dim=dim)(cloud).ids)
    (quantized.vectors.sum() + quantized.loss).backward()
    assert (cloud.grad * cloud).sum(dim=-1).abs().max() < 1e-3  # along a vector nothing changes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_slots_of_signs_are_the_parts_of_one_code(slots, lowest_first, seed):
    cloud = torch.randn(2, 7, sum(slots), generator=torch.Generator().manual_seed(seed))
    quantizer = SignQuantizer(SignConfig(slots=tuple(slots), lowest_first=lowest_first), dim=sum(slots))
    ids = quantizer(cloud).ids
    assert ids.shape == (2, 7, len(slots))
    for slot, part in enumerate(cloud.split(slots, dim=-1)):
        alone = SignQuantizer(SignConfig(lowest_first=lowest_first), dim=part.shape[-1])
        assert ids[..., slot].equal(alone(part).ids[..., 0])
        assert quantizer.code_vectors()[slot].equal(alone.code_vectors()[0])
    torch.testing.assert_close(quantizer.lookup(ids), quantizer(cloud).vectors)


def test_bounded_channels_have_the_same_signs_and_no_pull_beyond_one():
    cloud = (torch.randn(1, 50, 6) * 20).requires_grad_()
    plain, bounded = (SignQuantizer(SignConfig(bounded=bounded), dim=6)(cloud) for bounded in (False, True))
    assert plain.ids.equal(bounded.ids)
    assert plain.loss > 10 > 0.25 > bounded.loss
    with pytest.raises(ValueError, match="5 channels, and vectors have 6"):
        SignQuantizer(SignConfig(slots=(2, 3)), dim=6)


def test_gaussian_latents_are_drawn_in_training_and_their_means_afterwards():
    torch.manual_seed(0)
    quantizer, cloud = Gaussian(GaussianConfig(divergence=0.5), dim=4).train(), torch.randn(2, 3, 4)
    mean, log_variance = quantizer.to_moments(cloud).chunk(2, dim=-1)
    drawn = torch.stack([quantizer(cloud).vectors for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(dim=0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.var(dim=0), log_variance.exp(), atol=0, rtol=0.2)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(quantizer(cloud).loss, expected / 2)
    assert quantizer.eval()(cloud).vectors.equal(mean)
