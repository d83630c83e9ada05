"""A message that is rewritten crop by crop, and the picture that the same network draws from it."""

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import AutoModel

from unimm import VisualCodecConfig, VisualCodecModel, VisualCodes
from unimm.codec.message import CropsConfig, CropsEncoder, write_message

GRID = {"rows": 8, "columns": 8}
TOKENS = 6
SOCKETS = {
    "encoder": {"kind": "crops", "latent_channels": 4, "crop": 4, "stride": 2},
    "resampler": {"kind": "message", "tokens": TOKENS, "dim": 3},
    "quantizer": {"kind": "fsq", "levels": [8, 8, 5], "project": False},
    "length": {"kind": "sequence", "tokens": TOKENS, **GRID},
    "decoder": {
        "kind": "message_flow",
        "tokens": TOKENS,
        "dim": 3,
        "latent_channels": 4,
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_width": 24,
        "steps": 2,
        **GRID,
    },
}


def changed(**options):
    """Sockets with other options."""
    return {socket: kept | options.get(socket, {}) for socket, kept in SOCKETS.items()}


def lively(codec):
    """Its updates begin at zero, and what it reads would change nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in codec.named_parameters():
        if not name.startswith("vae."):
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3
            weight.data = torch.randn(weight.shape, generator=generator) * scale
    return codec


@pytest.fixture
def codec():
    return lively(VisualCodecModel(VisualCodecConfig(image_size=16, **SOCKETS)).eval())


def latents(batch=3):
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def test_crops_cover_the_picture_and_say_where_they_lie():
    crops = CropsEncoder(CropsConfig(patch=2, crop=3, stride=2))
    picture = torch.arange(12 * 16).view(1, 1, 12, 16)
    cut = crops(picture, 2)
    starts = [(row, column) for row in (0, 4, 6) for column in (0, 4, 8, 10)]  # the last ones end with the picture
    assert cut.shape == (1, len(starts), 1, 6, 6)
    for crop, (row, column) in zip(cut[0], starts, strict=True):
        assert crop.equal(picture[0, :, row : row + 6, column : column + 6])
    middles = torch.tensor([((row + 3) / 6 - 1, (column + 3) / 8 - 1) for row, column in starts])
    torch.testing.assert_close(crops.offsets(6, 8), middles)
    assert crops(picture, 8).shape == (1, 1, 1, 12, 16)  # patches as large as make the picture smaller than a crop
    assert crops.offsets(1, 2).tolist() == [[0, 0]]


@torch.no_grad()
def test_every_crop_rewrites_the_message_and_the_last_one_counts(codec):
    codes, crops, offsets = codec.encode(latents()), codec.encoder(latents(), 2), codec.encoder.offsets(8, 8)
    sockets = (codec.encoder, codec.resampler, codec.quantizer, codec.decoder)
    written = [write_message(crops[:, :read], offsets, *sockets) for read in (1, 2, 8, 9)]
    for one, other in pairwise(written):
        assert not one.quantized.ids.equal(other.quantized.ids)
    assert codes.ids.equal(written[-1].quantized.ids)
    assert codes.side_info["offset"].equal(written[-1].offset)
    assert codes.side_info["offset"].tolist() == [[0.5, 0.5]] * 3
    other = latents()
    other[..., 12:, 12:] = 0
    assert not codec.encode(other).ids.equal(codes.ids)


@torch.no_grad()
def test_a_message_is_written_by_the_crop_its_place_and_the_message_before(codec):
    network, crop, other = codec.decoder, latents()[..., :8, :8], latents()[..., 8:, 8:]
    message, offset = torch.zeros(3, TOKENS, 3), torch.zeros(3, 2)
    written = network.write(crop, message, offset)
    for changed in (
        network.write(other, message, offset),
        network.write(crop, message + 0.5, offset),
        network.write(crop, message, offset + 0.5),
    ):
        assert not changed.isclose(written, atol=1e-3).all()
    # What a message says before anything is read is the code in the middle.
    first = write_message(crop[:, None], offset[:1], codec.encoder, codec.resampler, codec.quantizer, network).quantized
    assert first.ids.equal(codec.quantizer(written).ids)
    middle = codec.quantizer.lookup(torch.tensor([[[4 + 8 * 4 + 64 * 2]]]))
    assert middle.equal(codec.resampler.sample(crop)[:1, :1])


@torch.no_grad()
@pytest.mark.parametrize("hides", [True, False])
def test_what_is_written_is_causal_and_invisible_where_the_mask_hides(hides):
    codec = lively(VisualCodecModel(VisualCodecConfig(image_size=16, **changed(decoder={"hides": hides}))).eval())
    network, message, offset = codec.decoder, torch.zeros(3, TOKENS, 3), torch.zeros(3, 2)
    time = torch.full((3,), 0.3)
    before = network.passed(latents(), time, message, offset)
    network.blank_positions[3:] = torch.randn(TOKENS - 3, 16)  # of the slots from the fourth on
    after = network.passed(latents(), time, message, offset)
    same = [
        after.written[:, :3].allclose(before.written[:, :3], atol=1e-5),
        after.velocity.allclose(before.velocity, atol=1e-5),
        after.offset.allclose(before.offset, atol=1e-5),
    ]
    assert same == [hides] * 3
    assert not after.written[:, 3:].isclose(before.written[:, 3:], atol=1e-3).all()


def test_pictures_depend_on_the_offset_which_is_the_last_one_where_codes_do_not_say(codec, tmp_path):
    codes = codec.encode(latents())
    drawn = codec.decode(codes)
    assert codec.decode(VisualCodes(codes.ids, codes.mask)).equal(drawn)
    moved = VisualCodes(codes.ids, codes.mask, side_info={"offset": -codes.side_info["offset"]})
    assert not codec.decode(moved).isclose(drawn, atol=1e-3).all()
    codec.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        assert again.encode(latents()).ids.equal(codes.ids)
        torch.testing.assert_close(again.decode(moved), codec.decode(moved), atol=1e-5, rtol=0)
    for offset, message in (
        (torch.zeros(3, 1), "give floats"),
        (torch.zeros(3, 2, dtype=torch.int64), "give floats"),
        (torch.full((3, 2), 1.5), r"range over \[-1, 1\]"),
        (torch.full((3, 2), torch.nan), r"range over \[-1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode(VisualCodes(codes.ids, codes.mask, side_info={"offset": offset}))


def test_the_pictures_beside_one_change_nothing():
    codec = lively(VisualCodecModel(VisualCodecConfig(image_size=16, **changed(resampler={"adaptive": True}))).eval())
    together = codec.encode(latents())
    assert len({tuple(offset) for offset in together.side_info["offset"].tolist()}) > 1
    drawn = codec.decode(together)
    for index in range(3):
        alone = codec.encode(latents()[index : index + 1])
        assert alone.ids[0].equal(together.ids[index])
        assert alone.side_info["offset"].equal(together.side_info["offset"][index : index + 1])
        torch.testing.assert_close(codec.decode(alone)[0], drawn[index], atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_adaptive_order_reads_every_crop_once_and_the_worst_drawn_next(codec):
    crops = codec.encoder(latents(), 2)
    offsets = codec.encoder.offsets(8, 8)
    read, network = [], codec.decoder
    write = network.write

    def noted(crop, message, offset):
        read.append((crop, message, offset))
        return write(crop, message, offset)

    network.write = noted
    adaptive = VisualCodecModel(VisualCodecConfig(image_size=16, **changed(resampler={"adaptive": True}))).resampler
    write_message(crops, offsets, codec.encoder, adaptive, codec.quantizer, network)
    places = torch.stack([offset for _, _, offset in read], dim=1)  # [B, S, 2]
    for picture in places.tolist():
        assert sorted(picture) == sorted(offsets.tolist())
        assert picture[0] == offsets[0].tolist()
    assert not places[0].equal(offsets)
    for picture in range(3):  # the second crop that was read
        message, offset = read[1][1][picture : picture + 1], read[0][2][picture : picture + 1]
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        drawn = codec.encoder(noise - network.velocity(noise, torch.ones(1), message, offset), 2)
        missed = (drawn - crops[picture]).square().mean(dim=(2, 3, 4))[0]
        missed[0] = -1
        assert offsets[missed.argmax()].equal(read[1][2][picture])


def test_steps_go_from_noise_to_the_picture(codec):
    message, offset = codec.lookup(codec.encode(latents())), torch.zeros(3, 2)
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        sample = noise
        for step in range(4):
            sample = sample - codec.decoder.velocity(sample, torch.full((3,), 1 - step / 4), message, offset) / 4
        torch.testing.assert_close(codec.decoder.sample(message, offset, noise, steps=4), sample, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="steps is 0"):
        codec.decoder.sample(message, offset, noise, steps=0)
    drawn = [codec.decode(codec.encode(latents()), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_each_crop_has_latents_of_its_own_under_an_autoencoder(tmp_path):
    torch.manual_seed(0)
    stages = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, scaling_factor=2.0, **stages).eval()
    vae.save_pretrained(tmp_path)
    codec = lively(VisualCodecModel.begin(image_size=32, vae=str(tmp_path), **SOCKETS).eval())
    inner = VisualCodecModel(VisualCodecConfig(image_size=16, **SOCKETS)).eval()
    inner.load_state_dict({name: weight for name, weight in codec.state_dict().items() if not name.startswith("vae.")})
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = codec.encode(pixels)
    with torch.no_grad():
        crops = [
            vae.encode(pixels[..., row : row + 16, column : column + 16]).latent_dist.mode() * 2.0
            for row in (0, 8, 16)
            for column in (0, 8, 16)
        ]
        sockets = (inner.encoder, inner.resampler, inner.quantizer, inner.decoder)
        written = write_message(torch.stack(crops, dim=1), inner.encoder.offsets(8, 8), *sockets)
        assert codes.ids.equal(written.quantized.ids)
        whole = inner.encode(vae.encode(pixels).latent_dist.mode() * 2.0)
        assert not whole.ids.equal(codes.ids)  # a crop's border is one
        drawn = vae.decode(inner.decode(codes) / 2.0).sample
    torch.testing.assert_close(codec.decode(codes), drawn, atol=1e-4, rtol=1e-4)
    output = codec.train()(pixels)
    assert output.reconstruction.shape == (2, 4, 16, 16)
    assert output.ids.equal(codes.ids)


def test_a_gradient_reaches_every_crop_by_way_of_the_messages(codec):
    crops = codec.encoder(latents(), 2).requires_grad_()
    sockets = (codec.encoder, codec.resampler, codec.quantizer, codec.decoder)
    written = write_message(crops, codec.encoder.offsets(8, 8), *sockets)
    written.quantized.vectors.square().sum().backward()
    assert (crops.grad.abs().amax(dim=(0, 2, 3, 4)) > 0).all()


def test_a_small_codec_learns_to_draw_what_its_message_says():
    torch.manual_seed(0)
    codec = VisualCodecModel(VisualCodecConfig(image_size=16, **changed(encoder={"stride": 4}))).train()
    optimizer = torch.optim.Adam([weight for weight in codec.parameters() if weight.requires_grad], lr=1e-2)
    picture = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(1)).expand(4, -1, 16, 16)
    losses = []
    for _ in range(12):
        output = codec(picture)
        optimizer.zero_grad()
        output.velocity_loss.backward()
        optimizer.step()
        losses.append(output.velocity_loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(weight.grad is None for weight in codec.decoder.to_place.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encoder": {"patch": 4}}, "patch is 4 where messages are read and 2"),
        ({"encoder": {"latent_channels": 0}}, "latent_channels is 0 where"),
        ({"resampler": {"tokens": 5}}, "tokens is 5 where"),
        ({"length": {"tokens": 5}}, r"A message has 6 codes of 8 x 8 patches"),
        ({"length": {"prefixes": True}}, r"A message has 6 codes of 8 x 8 patches"),
        ({"length": {"rows": 4}}, r"set length: \{kind: sequence, tokens: 6, rows: 8"),
        ({"encoder": {"stride": 5}}, "stride is 5 and crop 4"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        VisualCodecConfig(image_size=16, **changed(**options))


def test_the_three_go_together():
    with pytest.raises(ValueError, match="'crops', 'message', 'message_flow' go together"):
        VisualCodecConfig(image_size=16, **SOCKETS | {"decoder": {"kind": "vit"}})
