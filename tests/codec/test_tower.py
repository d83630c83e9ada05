"""Vision towers of transformers as encoders."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from unimm import VisualCodecConfig, VisualCodecModel
from unimm.codec.tower import TowerEncoder, TowerEncoderConfig

SIDE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TOWERS = [
    SiglipVisionConfig(**SIDE, intermediate_size=24),
    CLIPVisionConfig(**SIDE, intermediate_size=24),
    Dinov2Config(**SIDE, mlp_ratio=2),
    Dinov2WithRegistersConfig(**SIDE, mlp_ratio=2),
    DINOv3ViTConfig(**SIDE, intermediate_size=24, num_register_tokens=2),
    ViTConfig(**SIDE, intermediate_size=24),
]
MERGING = Qwen2VLConfig(
    vision_config={"depth": 3, "embed_dim": 16, "hidden_size": 20, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
).vision_config
SOCKETS = {
    "resampler": {"kind": "grid", "dim": 8},
    "quantizer": {"kind": "fsq", "levels": [4, 4]},
    "decoder": {"kind": "features", "width": 32, "blocks": 1},
}


def pictures():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("config", TOWERS, ids=lambda config: config.model_type)
def test_cells_are_the_hidden_states_of_a_layer(config):
    torch.manual_seed(0)
    whole = AutoModel.from_config(config).eval()
    output = whole(pictures(), output_hidden_states=True)
    for layer in range(4):
        encoder = TowerEncoder(TowerEncoderConfig(config.to_dict(), (layer,))).eval()
        kept = encoder.tower.state_dict()
        encoder.tower.load_state_dict({name: whole.state_dict()[name] for name in kept})
        states = output.hidden_states[layer] if layer else output.last_hidden_state
        assert encoder(pictures()).flatten(2).transpose(1, 2).equal(states[:, -16:])
    assert len(kept) == len(whole.state_dict())
    first = TowerEncoder(TowerEncoderConfig(config.to_dict(), (1,))).tower.state_dict()
    assert len(first) < len(kept)  # later layers are not there


@torch.no_grad()
def test_several_layers_are_read_side_by_side(tmp_path):
    AutoModel.from_config(TOWERS[0]).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    taps = ((1, 3), (0, 2))
    both, other = (VisualCodecModel.from_tower(tmp_path, encoder={"layers": list(tap)}, **SOCKETS) for tap in taps)
    alone = [VisualCodecModel.from_tower(tmp_path, encoder={"layers": [layer]}, **SOCKETS) for layer in range(4)]
    states = [codec.encoder(pictures()) for codec in alone]
    for codec, tap in ((both, taps[0]), (other, taps[1])):
        assert codec.encoder(pictures()).equal(torch.cat([states[layer] for layer in tap], dim=1))
    with pytest.raises(ValueError, match=r"layers are \(\)"):
        TowerEncoderConfig(TOWERS[0].to_dict(), layers=())


@torch.no_grad()
def test_siglip2_reads_pictures_of_any_shape_as_its_own_processor_lays_them_out():
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIDE.items() if name != "image_size"}
    config = Siglip2VisionConfig(**sizes, intermediate_size=24, num_patches=16)
    whole = AutoModel.from_config(config).eval()
    picture = torch.randint(256, (3, 24, 40), dtype=torch.uint8)  # 3 x 5 patches
    processor = Siglip2ImageProcessorPil(do_resize=False, patch_size=8, max_num_patches=15)
    given = processor(picture.numpy(), input_data_format="channels_first", return_tensors="pt")
    assert given["spatial_shapes"].tolist() == [[3, 5]]
    output = whole(**given, output_hidden_states=True)
    for layer in range(4):
        encoder = TowerEncoder(TowerEncoderConfig(config.to_dict(), (layer,))).eval()
        encoder.tower.load_state_dict({name: whole.state_dict()[name] for name in encoder.tower.state_dict()})
        states = output.hidden_states[layer] if layer else output.last_hidden_state
        cells = encoder(picture[None] / 127.5 - 1)
        assert cells.shape == (1, 16, 3, 5)
        torch.testing.assert_close(cells.flatten(2).mT, states, atol=1e-5, rtol=0)


@torch.no_grad()
def test_qwen2_vl_reads_pictures_of_any_shape_as_its_own_processor_lays_them_out():
    torch.manual_seed(0)
    whole = Qwen2VisionTransformerPretrainedModel(MERGING).eval()
    picture = torch.randint(256, (3, 32, 48), dtype=torch.uint8)  # 2 x 3 blocks of 2 x 2 patches
    processor = Qwen2VLImageProcessorPil(do_resize=False, patch_size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    given = processor(picture.numpy(), input_data_format="channels_first", return_tensors="pt")
    assert given["image_grid_thw"].tolist() == [[1, 4, 6]]
    output = whole(given["pixel_values"], given["image_grid_thw"], output_hidden_states=True)
    pixels = picture[None].repeat(2, 1, 1, 1) / 127.5 - 1
    pixels[1] = 0.0
    in_blocks = torch.arange(24).view(2, 3, 2, 2).transpose(1, 2).flatten()  # of each cell, row by row
    for layer in range(4):
        encoder = TowerEncoder(TowerEncoderConfig(MERGING.to_dict(), (layer,))).eval()
        kept = encoder.tower.state_dict()
        encoder.tower.load_state_dict({name: whole.state_dict()[name] for name in kept})
        states = output.hidden_states[layer][in_blocks] if layer else output.pooler_output
        cells = encoder(pixels)
        assert cells.shape == (2, *((16, 4, 6) if layer else (20, 2, 3)))
        torch.testing.assert_close(cells[0].flatten(1).mT, states, atol=1e-5, rtol=0)
        assert len(kept) == len(whole.state_dict()) - 12 * (3 - (layer or 3))


@pytest.mark.parametrize("layers", [[0], [1, 2]])
def test_a_qwen2_vl_is_taken_and_trained(tmp_path, layers):
    Qwen2VisionTransformerPretrainedModel(MERGING).save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(patch_size=8).save_pretrained(tmp_path)
    codec = VisualCodecModel.from_tower(tmp_path, encoder={"layers": layers, "learns": True}, **SOCKETS)
    assert codec.config.image_size == 16 * 16
    codec.train()(torch.rand(1, 3, 256, 256) * 2 - 1).reconstruction.square().mean().backward()
    learned = {name for name, weight in codec.encoder.tower.named_parameters() if weight.requires_grad}
    assert any(name.startswith("merger.") for name in learned) == (layers == [0])
    assert all(codec.encoder.tower.get_parameter(name).grad is not None for name in learned)


def test_a_siglip2_is_taken_with_its_own_side_and_trained(tmp_path):
    sizes = {name: value for name, value in SIDE.items() if name != "image_size"}
    config = Siglip2VisionConfig(**sizes, intermediate_size=24, num_patches=16)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    Siglip2ImageProcessorPil(patch_size=8).save_pretrained(tmp_path)
    codec = VisualCodecModel.from_tower(tmp_path, encoder={"layers": [2], "learns": True}, **SOCKETS)
    assert codec.config.image_size == 32
    output = codec.train()(codec.from_shown(pictures()))
    (output.reconstruction.square().mean() + output.quantizer_loss).backward()
    assert codec.encoder.tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


def test_a_folder_without_the_towers_weights_is_refused(tmp_path):
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    AutoModel.from_config(CLIPVisionConfig(**SIDE, intermediate_size=24)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"other.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="save its vision model alone"):
        VisualCodecModel.from_tower(tmp_path, **SOCKETS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A saved model of pictures and texts."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**SIDE, intermediate_size=24).to_dict())
    ).save_pretrained(folder)
    CLIPImageProcessorPil(size=32, crop_size=32, image_std=[0.5, 0.25, 0.5]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("learns", [False, True])
def test_a_codec_begins_with_a_saved_tower_and_keeps_or_trains_it(clip, tmp_path, learns):
    codec = VisualCodecModel.from_tower(clip, encoder={"layers": [2], "learns": learns}, **SOCKETS)
    saved = CLIPModel.from_pretrained(clip).vision_model.state_dict()
    kept = {name.removeprefix("vision_model."): weight for name, weight in codec.encoder.tower.state_dict().items()}
    assert all(weight.equal(saved[name]) for name, weight in kept.items())
    assert codec.config.pixel_std == [0.5, 0.25, 0.5]
    codec.train()
    assert codec.encoder.tower.training == learns
    output = codec(codec.from_shown(pictures()))
    (output.reconstruction.square().mean() + output.quantizer_loss).backward()
    reached = {name for name, weight in codec.named_parameters() if weight.grad is not None}
    assert any(name.startswith("encoder") for name in reached) == learns
    assert any(name.startswith("resampler") for name in reached)
    codec.eval().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    pixels = codec.from_shown(pictures())
    assert again.encode(pixels).ids.equal(codec.encode(pixels).ids)


def test_a_recipe_names_a_tower(clip):
    codec = VisualCodecModel.begin(**{"encoder": {"kind": "tower", "tower": str(clip), "layers": [1]}, **SOCKETS})
    assert codec.encoder.config.layers == (1,)
    assert codec.config.image_size == 32
    assert str(clip) not in codec.config.to_json_string()
    with pytest.raises(ValueError, match="unknown key 'layr'"):
        VisualCodecModel.begin(**{"encoder": {"kind": "tower", "tower": str(clip), "layr": 1}, **SOCKETS})
    own = VisualCodecModel.begin(**{"encoder": {"kind": "tower", "tower": str(clip)}, "image_size": 32, **SOCKETS})
    assert own.encoder.config.layers == (0,)


def test_models_of_another_form_are_refused(tmp_path):
    Qwen2_5_VLConfig().vision_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="take a vision transformer over square patches"):
        VisualCodecModel.from_tower(tmp_path)
    with pytest.raises(ValueError, match="take a vision transformer over square patches"):
        TowerEncoderConfig(Qwen2VLConfig().to_dict())
    with pytest.raises(ValueError, match="transformers knows no such model"):
        TowerEncoderConfig({"model_type": "nothing"})
    with pytest.raises(ValueError, match="0 has larger cells"):
        TowerEncoderConfig(MERGING.to_dict(), layers=(0, 1))
    with pytest.raises(ValueError, match="layers 1 to 3"):
        TowerEncoderConfig(TOWERS[0].to_dict(), layers=(4,))
    with pytest.raises(ValueError, match=r"tower\.model_type is None"):
        VisualCodecConfig(encoder={"kind": "tower", "tower": {}})
