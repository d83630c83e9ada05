"""Two grids of codes in one row: what a picture means, then how it looks."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from unimm import VisualCodecConfig, VisualCodecModel, VisualCodes
from unimm.codec.length import StreamsLength
from unimm.codec.quantizers import QUANTIZERS
from unimm.codec.streams import MergingTower, MergingTowerConfig

PYRAMID = {"channels": [32, 32, 32], "blocks": 1, "attention_levels": [2]}
CELLS = {"width": 16, "depth": 1, "num_heads": 2}
ROWS = {"dim": 4, "project": False, "normalize": False}
FIRST = 12  # ids of the first stream


@pytest.fixture
def codec():
    torch.manual_seed(0)
    config = VisualCodecConfig(
        image_size=56,
        encoder={
            "kind": "streams",
            "dim": 4,
            "tower": {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24, "out_width": 12},
            "meaning": CELLS,
            "pyramid": {**PYRAMID, "code_channels": 8, "stem_channels": 32, "folded": True},
        },
        resampler={"kind": "grid", "dim": 5, "norm": False, "project": False},
        quantizer={"kind": "streams", "first": {**ROWS, "size": FIRST}, "second": {**ROWS, "size": 20}},
        length={"kind": "streams", "cell": 4, "max_side": 40},
        decoder={
            "kind": "streams",
            "dim": 4,
            "pixels": {**PYRAMID, "code_channels": 8, "upsampling": "unfold", "norm_channels": 8},
            "meaning": CELLS,
            "feature_width": 12,
        },
    )
    return VisualCodecModel(config).eval()


def pixels(height=56, width=84):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("size", "lengths"), [((56, 84), (2 * 3, 14 * 21)), ((60, 28), (2, 15 * 7)), ((8, 8), (1, 4))])
def test_pictures_of_any_shape_have_both_grids_in_one_row(codec, size, lengths):
    codes = codec.encode(pixels(*size))
    assert codes.ids.shape == (2, sum(lengths), 1)
    first, second = codes.ids.split(lengths, dim=1)
    assert first.max() < FIRST <= second.min()
    assert codec.decode(codes).shape == (2, 3, *size)
    assert codec.features(codes).shape == (2, lengths[0], 12)


def test_both_streams_draw_and_the_first_alone_means(codec):
    codes = codec.encode(pixels())
    drawn, meant = codec.decode(codes), codec.features(codes)
    for index, means_less in ((0, True), (-1, False)):
        other = VisualCodes(codes.ids.clone(), codes.mask, codes.grid, codes.side_info)
        other.ids[:, index] = (other.ids[:, index] + 1) % FIRST + (0 if means_less else FIRST)
        assert not codec.decode(other).equal(drawn)
        assert codec.features(other).equal(meant) != means_less


def test_a_gradient_reaches_each_stream(codec):
    output = codec.train()(pixels())
    (output.reconstruction.square().mean() + output.features.square().mean()).backward()
    for part in (codec.encoder.tower, codec.encoder.meaning, codec.encoder.pyramid, codec.decoder.meaning):
        weights = {name: weight.grad for name, weight in part.named_parameters()}
        # a constant that is added to every key changes no softmax
        assert all(grad.abs().sum() > 0 for name, grad in weights.items() if not name.endswith("key.bias"))


def test_codes_of_another_size_are_refused(codec):
    codes = codec.encode(pixels())
    with pytest.raises(
        ValueError, match=r'There are 300 codes, and a picture of 56 x 56 has 200; .*side_info\["size"\]'
    ):
        codec.decode(VisualCodes(codes.ids, codes.mask, codes.grid))
    with pytest.raises(ValueError, match="num_tokens is 7; this codec always makes 300"):
        codec.encode(pixels(), num_tokens=7)
    with pytest.raises(ValueError, match="cannot take a 58 x 84 picture"):
        codec.encode(pixels(58, 84))


def test_standard_sizes_are_read_as_upstream_reads_them():
    policy = StreamsLength(cell=16, coarse_cell=28, max_side=64)
    lengths = {(256, 256): 81 + 256, (512, 384): 16 * 12 + 32 * 24, (384, 768): 13 * 26 + 24 * 48}
    for (height, width), length in lengths.items():
        assert policy.arrange((height // 16, width // 16), None).length == length
    assert policy.max_length == max(policy.arrange(grid, None).length for grid in policy.grids())


def test_a_row_map_without_a_bias_keeps_the_zero_row():
    config, quantizer = QUANTIZERS["vq"]
    rows = quantizer(config(dim=4, project=False, normalize=False, map_rows=True, map_bias=False), dim=4)
    rows.codebook.data[0] = 0
    assert rows.lookup(torch.zeros(1, 1, 1, dtype=torch.int64)).eq(0).all()


@torch.no_grad()
def test_the_tower_is_that_of_qwen2_vl_in_transformers():
    torch.manual_seed(0)
    stock = Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(depth=2, embed_dim=32, num_heads=2, hidden_size=24, mlp_ratio=3)
    ).eval()
    tower = MergingTower(MergingTowerConfig(width=32, depth=2, num_heads=2, mlp_width=96, out_width=24)).eval()
    names = {"patch_embed.proj": "patches", "merger.ln_q": "norm", "merger.mlp": "merge", "norm1": "attention_norm"}
    names |= {"norm2": "mlp_norm", "attn.qkv": "attention.qkv", "attn.proj": "attention.out"}
    names |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    weights = stock.state_dict()
    for theirs, ours in names.items():
        weights = {name.replace(theirs, ours): weight for name, weight in weights.items()}
    tower.load_state_dict(weights)
    picture = torch.randint(256, (3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    given = processor(picture.numpy(), input_data_format="channels_first", return_tensors="pt")
    expected = stock(given["pixel_values"], given["image_grid_thw"]).pooler_output
    features = tower(picture[None] / 127.5 - 1, (2, 3))[0]
    torch.testing.assert_close(features, F.layer_norm(expected, (24,), eps=1e-6), atol=1e-5, rtol=0)
