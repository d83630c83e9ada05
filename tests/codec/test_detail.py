"""Detail of a noisy picture that comes in by a gate, behind what its codes mean (Cheers)."""

import torch
import torch.nn.functional as F

from unimm.codec import VisualCodecConfig, VisualCodecModel
from unimm.codec.cell_flow import GatedDetail


def built(**options):
    torch.manual_seed(0)
    decoder = {"kind": "cell_flow", "dim": 8, "rows": 2, "columns": 2, "patch": 16, "width": 16, "flow_depth": 1}
    config = VisualCodecConfig(
        image_size=32,
        encoder={"kind": "conv", "patch": 16, "channels": [8], "blocks": 1},
        resampler={"kind": "grid", "dim": 8, "norm": False},
        quantizer={"kind": "vq", "size": 16, "dim": 8, "project": False},
        decoder=decoder | {"depth": 1, "num_heads": 2} | options,
    )
    return VisualCodecModel(config)


def seen(decoder, **changes):
    """What the first layer of each cell's network is given, `[2, 4, 16]`, under two meanings and two noisy pictures."""
    generator = torch.Generator().manual_seed(1)
    meaning, noisy = torch.randn(2, 4, 16, generator=generator), torch.randn(2, 3, 32, 32, generator=generator)
    given = {"noisy": noisy, "time": torch.full((2,), 0.5), "conditions": meaning} | changes
    first = []
    hook = decoder.layers[0].register_forward_pre_hook(lambda _, inputs: first.append(inputs[0]))
    decoder.velocity(**given)
    hook.remove()
    return first[0], given


def test_meaning_comes_first_and_detail_by_a_number_for_each_position():
    decoder = built(gated_detail=True).decoder
    before, given = seen(decoder)
    torch.testing.assert_close(before, F.layer_norm(given["conditions"], (16,)))
    other = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert seen(decoder, noisy=other)[0].equal(before)
    plain = built().decoder
    assert not seen(plain, noisy=other)[0].equal(seen(plain)[0])
    torch.nn.init.normal_(decoder.detail.gate)
    high = decoder.patches(given["noisy"]).flatten(2).mT
    share = F.silu(decoder.detail.up(given["conditions"])) @ decoder.detail.gate
    assert share.shape == (2, 4, 1)
    after, _ = seen(decoder)
    torch.testing.assert_close(after, F.layer_norm(given["conditions"] + share * high, (16,)))
    assert not after.equal(before)


def test_the_gate_learns_and_opens():
    codec = built(gated_detail=True).train()
    assert isinstance(codec.decoder.detail, GatedDetail)
    assert not codec.decoder.detail.gate.any()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    for _ in range(3):  # what is behind the gate and before it learns once it is open
        codec(pixels).velocity_loss.backward()
        learned = {name: weight.grad.abs().sum() for name, weight in codec.decoder.detail.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    assert all(amount > 0 for amount in learned.values())
    assert codec.decoder.detail.gate.any()


def test_it_survives_a_reload(tmp_path):
    codec = built(gated_detail=True).eval()
    torch.nn.init.normal_(codec.decoder.detail.gate)
    codec.save_pretrained(tmp_path)
    again = VisualCodecModel.from_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(again.reconstruct(pixels), codec.reconstruct(pixels))
