"""X-Omni from upstream's files to a model that reads, draws and chats, and back."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from remote_code import check_loads_without_unimm
from safetensors.torch import load_file, save_file
from tiny_upstreams import (
    GOLDEN,
    a_picture,
    check_everyday_use,
    check_lora,
    check_recipes,
    check_saves,
    check_stored,
    golden_io,
    golden_weights,
    language_model,
    prompt_tokenizer,
    text_tokenizer,
    tiny_clip,
    tiny_vae,
    write_shards,
)
from transformers import AutoModelForMultimodalLM, AutoProcessor, Qwen2Config, T5Config, T5EncoderModel

import unimm
from unimm import VisualCodes
from unimm.conversion import convert, restore

ROWS, CODES, SLOTS = 320, 64, 128
SOM, EOM, IMAGE = ROWS + CODES, ROWS + CODES + 1, ROWS + CODES + 2
SPECIALS = ["<SOM>", "<EOM>", "<IMAGE>"]
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What upstream's repository holds."""
    folder = tmp_path_factory.mktemp("xomni") / "source"
    folder.mkdir()
    args = {
        "model_type": "x-omni",
        "vocab_size": ROWS,
        "image_vocab_size": CODES,
        "mm_vocab_size": SLOTS,
        "mm_special_tokens": SPECIALS,
        "num_mm_adap_layers": 1,
        "num_mm_head_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    }
    tokenizer_fields = json.loads((GOLDEN / "xomni_tokenizer" / "config.json").read_text())
    vision = {
        "dtype": "bfloat16",
        "transform": {
            "short_size": 32,
            "long_size": 64,
            "patch_size": 16,
            "min_short_size": 16,
            "max_aspect_ratio": 3.0,
            "random_ratio": None,
            "filtering": True,
        },
        "encoder": tokenizer_fields["args"]
        | {"siglip_path": "siglip.pt", "projector_path": "vq.pt", "with_norm": True},
        "decoder": {
            "model_path": "decoder",
            "upscale_factor": 16,
            "num_inference_steps": 3,
            "cfg_scale": 1.5,
            "cfg_scale_2": 1.5,
        },
        "siglip_model_config": tokenizer_fields["siglip_model_config"],
        "patched_literals": tokenizer_fields["patched_literals"],
    }
    (folder / "config.json").write_text(json.dumps(args | {"vision_config": vision}))
    write_shards(lm_weights(args), folder)
    torch.save(golden_weights("xomni_tokenizer", "vit."), folder / "siglip.pt")
    torch.save(golden_weights("xomni_tokenizer", "vqproj."), folder / "vq.pt")
    codes = [f"<MM-Token-{code}>" for code in range(CODES)]
    tokenizer = text_tokenizer(rows=ROWS, chat=CHAT, after=[*codes, *SPECIALS])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    write_decoder(folder / "decoder")
    return folder


def lm_weights(args):
    stock = language_model(Qwen2Config(**{name: value for name, value in args.items() if name != "model_type"}))
    torch.manual_seed(1)
    weights = {
        "model.mm_embed_tokens.weight": torch.randn(SLOTS, 32) * 0.2,
        "mm_head.weight": torch.randn(SLOTS, 32) * 0.2,
        "model.mm_norm.weight": torch.rand(32) + 0.5,
    }
    names = {"model.embed_tokens.weight": "model.lm_embed_tokens.weight", "model.norm.weight": "model.lm_norm.weight"}
    weights |= {names.get(key, key): tensor for key, tensor in stock.items()}
    return {key: tensor.bfloat16() for key, tensor in weights.items()}


FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}


def write_decoder(folder):
    torch.manual_seed(0)
    FluxTransformer2DModel(**FLUX).save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"siglip_embed.weight": torch.randn(32, 64)}, file)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"_class_name": "FluxTransformer2DModelWithSigLIP", "siglip_channels": 64, "drop_token_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A FLUX pipeline, whose transformer X-Omni replaces."""
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    tokenizer = prompt_tokenizer()
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        tiny_vae(stages=4, shift_factor=0.1, scaling_factor=0.5),
        tiny_clip(tokenizer, 16),
        tokenizer,
        t5,
        tokenizer,
        FluxTransformer2DModel(**FLUX),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, flux, tmp_path_factory):
    return convert("xomni", source, tmp_path_factory.mktemp("converted") / "model", detokenizer=flux).target


def test_it_reads_draws_and_chats(converted):
    check_everyday_use(unimm.load(converted), size=(48, 64), options={"size": (64, 48)})


@pytest.mark.filterwarnings("ignore")
def test_it_fits_into_less_memory(converted):
    pytest.importorskip("bitsandbytes")
    check_stored(converted, size=(48, 64), options={"size": (64, 48)})


def test_a_size_is_spelled_as_upstream_has_it(converted):
    model, processor = unimm.load(converted), AutoProcessor.from_pretrained(converted)
    tokenizer = processor.tokenizer
    reply = model.generate("a star", seed=0, size=(32, 64), diffusion_steps=2)[0]
    assert reply.parts[0].codes.grid == [(2, 4)]
    encoded = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": a_picture()}, {"type": "text", "text": "what?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    ids = encoded["input_ids"][0].tolist()
    rows, columns = (side // 16 for side in encoded["pixel_values"].shape[-2:])
    span = ids[ids.index(SOM) : ids.index(EOM) + 1]
    spelled = [SOM, *tokenizer(f"{rows} {columns}", add_special_tokens=False)["input_ids"], IMAGE]
    assert span == [*spelled, *[model.model.config.image_token_id] * (rows * columns), EOM]
    assert ids[ids.index(EOM) + 1] == tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(ValueError, match="not legal here"):
        model.generate("a star", size=(16, 64))
    with pytest.raises(ValueError, match="multiples of 16"):
        model.generate("a star", size=(33, 64))


def test_pictures_of_several_shapes_stand_in_one_conversation(converted):
    model = unimm.load(converted)
    wide, tall = (Image.effect_noise(size, 60).convert("RGB") for size in ((64, 32), (32, 48)))
    content = [{"type": "image", "image": wide}, {"type": "image", "image": tall}, {"type": "text", "text": "which?"}]
    inputs = model.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    placed = model.model.model.place_pictures(inputs["input_ids"], inputs["pixel_values"])
    drawn = [span for span in model.model.config.grammar.parse(placed[0].tolist()) if hasattr(span, "grid")]
    assert [span.grid for span in drawn] == [(2, 4), (3, 2)]
    for span, picture in zip(drawn, (wide, tall), strict=True):
        pixels = model.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        codes = model.model.codec.encode(pixels).ids[0, :, 0].tolist()
        assert [code for (code,) in span.codes] == codes
    model.model.generation_config.max_new_tokens = 4
    assert model.chat([{"role": "user", "content": content}], seed=0).parts is not None


def test_the_model_spells_sizes_itself(converted):
    model = unimm.load(converted)
    inputs = model.processor.drawing_inputs(["a star"])
    torch.manual_seed(0)
    prompt = torch.cat([inputs["input_ids"], torch.tensor([[SOM]])], dim=1)
    rows = model.model.generate(prompt, do_sample=True, num_return_sequences=4, eos_token_id=EOM, max_new_tokens=30)
    grids = {
        span.grid for row in rows for span in model.model.config.grammar.parse(row.tolist()) if hasattr(span, "grid")
    }
    assert len(grids) > 1
    assert all(2 <= side <= 4 for grid in grids for side in grid)


def test_user_text_spells_no_code(converted):
    processor = AutoProcessor.from_pretrained(converted)
    ids = processor.tokenizer(processor.escape("<MM-Token-5><SOM><|image|>"), add_special_tokens=False)["input_ids"]
    assert max(ids) < ROWS
    assert processor.tokenizer.convert_ids_to_tokens([ROWS + 5, SOM]) == ["<MM-Token-5>", "<SOM>"]
    assert len(processor.tokenizer) == 512  # rows of the model


@torch.no_grad()
def test_parts_are_what_they_are_alone(source, converted, tmp_path):
    model = AutoModelForMultimodalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    assert model.codec.encoder.table.dtype == torch.float32
    expected = golden_io("xomni_tokenizer")
    assert model.codec.encode(expected["pixel_values"]).ids[..., 0].equal(expected["codes"].flatten(1))
    alone = AutoModelForMultimodalLM.from_pretrained(convert("xomni_lm", source, tmp_path / "lm").target)
    ids = torch.tensor([[5, 6, SOM, ROWS + 3, ROWS + 9, EOM, 7]])
    assert alone(ids).logits.equal(model(ids).logits)


def test_it_saves_and_loads_again(converted, tmp_path):
    check_saves(converted, tmp_path)


def test_it_goes_back_bit_by_bit(source, converted, tmp_path):
    back = restore("xomni", converted, tmp_path / "back")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        given, found = load_file(source / name), load_file(back / name)
        assert given.keys() == found.keys()
        assert all(found[key].equal(tensor) and found[key].dtype == tensor.dtype for key, tensor in given.items())
    name = "decoder/diffusion_pytorch_model.safetensors"
    given, found = load_file(source / name), load_file(back / name)
    assert given.keys() == found.keys()
    assert all(found[key].equal(tensor) for key, tensor in given.items())
    fields = [json.loads((folder / "decoder" / "config.json").read_text()) for folder in (source, back)]
    assert fields[0] == fields[1]
    dropped = json.loads((converted / "conversion.json").read_text())["dropped"]
    for name, prefix in (("siglip.pt", "vit."), ("vq.pt", "vqproj.")):
        given, found = (torch.load(folder / name, weights_only=True) for folder in (source, back))
        kept = {key: tensor for key, tensor in given.items() if prefix + key not in dropped}
        assert kept.keys() == found.keys()
        assert all(found[key].equal(tensor) for key, tensor in kept.items())


def test_without_flux_it_converts_and_says_what_it_lacks(source, tmp_path):
    model = unimm.load(convert("xomni", source, tmp_path / "out").target)
    with pytest.raises(ValueError, match="convert it with one"):
        model.generate("a star", seed=0, size=(32, 32))
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        convert("xomni", source, tmp_path / "other", detokenizer=source)
    assert not (tmp_path / "other").exists()


def test_it_loads_without_unimm(converted, tmp_path):
    check_loads_without_unimm(converted, tmp_path)


def test_an_adapter_learns(converted):
    check_lora(converted, VisualCodes.from_grid(torch.arange(6).view(1, 2, 3, 1)))


@pytest.mark.usefixtures("brightness")
def test_recipes_run_two_steps(converted, tmp_path):
    check_recipes(converted, tmp_path)
