"""One codec at the length of any square, trained at a few of them (TokenFLEX)."""

import pytest
import torch
import torch.nn.functional as F

from unimm.codec import VisualCodecConfig, VisualCodecModel

SIDE = 8  # of the encoder's grid
SEEN, UNSEEN = (3, 6, 8), (1, 2, 4, 5, 7)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    config = VisualCodecConfig(
        image_size=8 * SIDE,
        encoder={"kind": "conv", "patch": 8, "channels": [16], "blocks": 1},
        resampler={"kind": "grid", "dim": 6, "norm": False, "gated_width": 20},
        quantizer={"kind": "continuous"},
        length={"kind": "adaptive", "rows": SIDE, "columns": SIDE},
        decoder={"kind": "feature_vit", "dim": 6, "width": 8, "depth": 1, "num_heads": 2, "mlp_width": 16},
    )
    codec = VisualCodecModel(config).train()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=1e-2)
    for step in range(60):
        side = SEEN[step % len(SEEN)]
        output = codec(pictures(step), num_tokens=side**2)
        F.mse_loss(output.reconstruction, wanted(step, side)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return codec.eval()


def colours(seed):
    """Of the squares of two pictures, `[2, 3, SIDE, SIDE]`."""
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pictures(seed):
    return F.interpolate(colours(seed), scale_factor=8)


def wanted(seed, side):
    """Mean colours `[2, side^2, 8]` of a grid, and zeros."""
    return F.pad(F.adaptive_avg_pool2d(colours(seed), side).flatten(2).mT, (0, 5))


@pytest.mark.parametrize("side", [*SEEN, *UNSEEN])
def test_every_square_is_an_average_of_the_cells_that_each_position_reads_alone(codec, side):
    shown = pictures(100)
    latents = codec.encode(shown, num_tokens=side**2).side_info["latents"]
    cells = codec.encoder(shown)
    spans = [(row * SIDE // side, -(-(row + 1) * SIDE // side)) for row in range(side)]
    means = torch.stack([cells[:, :, a:b, c:d].mean(dim=(2, 3)) for a, b in spans for c, d in spans], dim=1)
    gate, value = codec.resampler.before.up(means).chunk(2, dim=-1)
    read = codec.resampler.before.down(F.silu(gate) * value)
    own = F.linear(read, codec.resampler.to_positions.weight[..., 0], codec.resampler.to_positions.bias)
    assert latents.shape == (2, side**2, 6)
    torch.testing.assert_close(latents, own, atol=1e-5, rtol=1e-4)


def test_sizes_that_training_never_drew_are_read_as_well(codec):
    """Nearly as near to what is wanted, of pictures that were not seen either, and far nearer than their mean."""
    losses, spread = {}, {}
    for side in (*SEEN, 4, 5, 7):
        codes = codec.encode(pictures(200), num_tokens=side**2)
        losses[side] = F.mse_loss(codec.decode(codes), wanted(200, side)).item()
        spread[side] = wanted(200, side)[..., :3].var().item() * 3 / 8
    assert max(losses[side] / spread[side] for side in (4, 5, 7)) < 0.5
    assert max(losses[side] for side in (4, 5, 7)) < 3 * max(losses[side] for side in SEEN)


def test_no_other_number_of_codes_is_made(codec):
    with pytest.raises(ValueError, match="makes 64 of a picture, or the square of 1 to 8"):
        codec.encode(pictures(0), num_tokens=12)
    with pytest.raises(ValueError, match="or the square of 1 to 8"):
        codec.encode(pictures(0), num_tokens=81)
