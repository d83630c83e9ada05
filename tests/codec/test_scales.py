"""Scale-causal attention: what coarse codes stand for does not depend on finer ones."""

import pytest
import torch

from unimm.codec.scales import ScaleCausalConfig, ScaleCausalResampler

SIDES = (1, 2, 4)
FIRST = [0, 1, 1 + 4]  # position of each scale


@pytest.fixture
def resampler():
    torch.manual_seed(0)
    config = ScaleCausalConfig(sides=SIDES, dim=6, depth=2, num_heads=2)
    return ScaleCausalResampler(config, encoder_width=8, decoder_width=16).eval()


@torch.no_grad()
def test_finer_cells_do_not_reach_coarser_codes(resampler):
    cells = torch.randn(1, 8, 4, 4)
    moved = cells.clone()
    moved[..., 0, 0] += 1.0
    moved[..., 0, 1] -= 1.0  # two cells that every coarser scale averages: only the finest sees a change
    one, other = resampler.sample(cells), resampler.sample(moved)
    assert one.shape == (1, 21, 6)
    torch.testing.assert_close(one[:, : FIRST[2]], other[:, : FIRST[2]], atol=1e-5, rtol=0)
    assert not torch.allclose(one[:, FIRST[2] :], other[:, FIRST[2] :], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_codes_reach_their_own_scale_and_finer_ones(resampler, scale):
    tokens = torch.randn(1, 21, 16)
    moved = tokens.clone()
    moved[:, FIRST[scale]] = torch.randn(16)
    changed = (resampler.decode(tokens) - resampler.decode(moved)).abs().amax(dim=(0, 2)) > 1e-5
    assert changed.tolist() == [position >= FIRST[scale] for position in range(21)]


def test_the_decoder_reads_the_finest_scale(resampler):
    assert resampler.restore(torch.randn(2, 21, 6), (4, 4)).shape == (2, 16, 4, 4)
    for sides in ((), (2, 1), (0, 2), (2, 2)):
        with pytest.raises(ValueError, match="rising numbers"):
            ScaleCausalConfig(sides=sides)
