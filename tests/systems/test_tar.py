"""Tar from upstream's files to a model that reads, draws and chats, and back."""

import json

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file
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
    text_tokenizer,
    write_shards,
)
from transformers import AutoModelForCausalLM, AutoProcessor, Qwen2Config

import unimm
from unimm import VisualCodecModel, VisualCodes
from unimm.conversion import convert, restore
from unimm.conversion.maps import tar
from unimm.conversion.maps.tar_system import read
from unimm.conversion.presets import load_published
from unimm.conversion.upstream import UpstreamConfig

ROWS, CODES = 320, 64
AFTER = ["<im_start>", "<im_end>", "<S0>", "<S1>", "<S2>"]
OPEN, CLOSE, S0 = ROWS + CODES, ROWS + CODES + 1, ROWS + CODES + 2
QWEN = {
    "vocab_size": ROWS + CODES + 5,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tar") / "source"
    folder.mkdir()
    sizes = json.loads((GOLDEN / "ta_tok" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **QWEN, "visual_tokenizer": sizes}))
    weights = language_model(Qwen2Config(**QWEN))
    weights.pop("lm_head.weight", None)  # the embedding is the head
    write_shards(weights, folder)
    torch.save({"model": {"args": sizes["args"], "sd": golden_weights("ta_tok")}}, folder / "ta_tok.pth")
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    codes = [f"<I{code}>" for code in range(CODES)]
    tokenizer = text_tokenizer(rows=ROWS, chat=chat, after=[*codes, *AFTER])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana") / "pipeline"
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=48,
        sample_size=16,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    SanaPipeline(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, sana, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "model"
    return convert("tar", source, target, accept_licence=True, detokenizer=sana).target


def test_it_reads_draws_and_chats(converted):
    check_everyday_use(unimm.load(converted), size=(32, 32))


@pytest.mark.filterwarnings("ignore")
def test_it_fits_into_less_memory(converted):
    pytest.importorskip("bitsandbytes")
    check_stored(converted, size=(32, 32))


def test_three_lengths_have_a_token_each(converted):
    model = unimm.load(converted)
    side = model.processor.downsample
    for cells, token in ((6, 0), (3, 1), (2, 2)):
        (reply,) = model.generate("a star", seed=0, size=(cells * side, cells * side), diffusion_steps=1)
        codes = reply.parts[0].codes
        assert codes.grid == [(cells, cells)]
        assert model.model.config.grammar.build(codes)[:2] == [OPEN, S0 + token]
    with pytest.raises(ValueError, match="not legal here"):
        model.generate("a star", size=(4 * side, 4 * side))


def test_prompts_are_upstreams(converted):
    processor = AutoProcessor.from_pretrained(converted)
    content = [{"type": "image", "image": a_picture()}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}]
    encoded = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    shown = processor.tokenizer.decode(encoded["input_ids"][0])
    assert shown == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + "<|image|>" * 36
        + "\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    messages += [{"role": "assistant", "content": [{"type": "image", "image": a_picture()}]}]
    shown = processor.apply_chat_template(messages)
    assert shown.endswith("<|im_start|>assistant\n<im_start><S0><|image|><im_end><|im_end|>\n")


def test_the_language_model_is_a_plain_qwen(source, converted):
    model, stock = unimm.load(converted).model, AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor([[5, 6, OPEN, S0, *range(ROWS, ROWS + 36), CLOSE, 7]])
    with torch.no_grad():
        wanted = stock(ids).logits
        torch.testing.assert_close(model(ids).logits[..., : wanted.shape[-1]], wanted, atol=1e-4, rtol=0)
        others = [*range(ROWS), *range(ROWS + CODES, QWEN["vocab_size"])]
        greedy = stock.generate(ids[:, :20], do_sample=False, max_new_tokens=8, suppress_tokens=others)
        assert model.generate(ids[:, :20], do_sample=False, max_new_tokens=8).equal(greedy)
    expected = golden_io("ta_tok")
    assert model.codec.encode(expected["pixel_values"]).ids[..., 0].equal(expected["codes"])


def test_pixels_that_make_no_whole_patch_are_dropped():
    """The published tower reads 384 pixels by patches of 14."""
    fields = json.loads((GOLDEN / "ta_tok" / "config.json").read_text())
    fields["args"] |= {"input_size": 75}
    torch.manual_seed(0)
    codec = VisualCodecModel(tar.plan(UpstreamConfig(fields)).config).eval()
    pixels = torch.rand(1, 3, 75, 75)
    codes = codec.encode(pixels)
    assert codes.grid == [(6, 6)]
    changed = pixels.clone()
    changed[..., 72:, :] = changed[..., 72:] = 0
    assert codec.encode(changed).ids.equal(codes.ids)
    assert load_published("ta_tok").config.length_policy.max_length == 729


def test_it_saves_and_loads_again(converted, tmp_path):
    check_saves(converted, tmp_path)


def test_it_goes_back_bit_by_bit(source, converted, tmp_path):
    back = restore("tar", converted, tmp_path / "back")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        given, found = load_file(source / name), load_file(back / name)
        assert given.keys() == found.keys()
        assert all(found[key].equal(tensor) for key, tensor in given.items())
    dropped = json.loads((converted / "conversion.json").read_text())["dropped"]
    files = [torch.load(f / "ta_tok.pth", weights_only=True)["model"] for f in (source, back)]
    assert files[0]["args"] == files[1]["args"]
    given, found = (file["sd"] for file in files)
    assert given.keys() - found.keys() == set(dropped)
    assert all(found[key].equal(given[key]) for key in found)


def test_the_tokenizers_sizes_are_read_from_its_file(source, tmp_path):
    fields = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: fields[key] for key in fields if key != "visual_tokenizer"}))
    (tmp_path / "ta_tok.pth").write_bytes((source / "ta_tok.pth").read_bytes())
    assert read(tmp_path)["visual_tokenizer"] == {"args": fields["visual_tokenizer"]["args"]}


def test_an_adapter_learns(converted):
    check_lora(converted, VisualCodes.from_grid(torch.arange(9).view(1, 3, 3, 1)))


@pytest.mark.usefixtures("brightness")
def test_recipes_run_two_steps(converted, tmp_path):
    check_recipes(converted, tmp_path)
