"""SEED-LLaMA from upstream's files to a model that reads, draws and chats, and back."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
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
    llama_sizes,
    prompt_tokenizer,
    text_tokenizer,
    tiny_clip,
    tiny_vae,
    write_shards,
)
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
)

import unimm
from unimm import VisualCodes
from unimm.conversion import convert, restore
from unimm.sequence import ImagePart, TextPart

ROWS, CODES, WIDTH = 320, 96, 20
LLAMA = llama_sizes(ROWS + CODES + 2, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seed") / "source"
    folder.mkdir()
    sizes = json.loads((GOLDEN / "seed_tokenizer" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, "visual_tokenizer": sizes}))
    write_shards(language_model(LlamaConfig(**LLAMA)), folder)
    torch.save(golden_weights("seed_tokenizer"), folder / "seed_quantizer.pt")
    codes = [f"<img_{code:05d}>" for code in range(CODES)]
    tokenizer = text_tokenizer(rows=ROWS, chat=["<unk>", "<s>", "</s>"], after=[*codes, "<img>", "</img>"])
    tokenizer.add_special_tokens({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unclip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unclip") / "pipeline"
    tokenizer = prompt_tokenizer()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        attention_head_dim=(2, 4),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * WIDTH,
        cross_attention_dim=16,
        layers_per_block=1,
        use_linear_projection=True,
        norm_num_groups=4,
        sample_size=16,
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=16,
            patch_size=16,
        )
    )
    StableUnCLIPImg2ImgPipeline(
        CLIPImageProcessor(),
        vision,
        StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        DDPMScheduler(),
        tokenizer,
        tiny_clip(tokenizer, 16),
        unet,
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        tiny_vae(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source, unclip, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "model"
    return convert("seed_llama_8b", source, target, accept_licence=True, detokenizer=unclip).target


def test_codes_beyond_the_language_model_are_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "short")
    fields = json.loads((source / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(fields | {"vocab_size": ROWS + CODES - 1}))
    with pytest.raises(ValueError, match=f"or not of {ROWS + CODES - 1} rows"):
        convert("seed_llama_8b", tmp_path / "short", tmp_path / "out", accept_licence=True)


def test_it_reads_draws_and_chats(converted):
    check_everyday_use(unimm.load(converted), size=(32, 32))


@pytest.mark.filterwarnings("ignore")
def test_it_fits_into_less_memory(converted):
    pytest.importorskip("bitsandbytes")
    check_stored(converted, size=(32, 32))


def test_the_language_model_is_a_plain_llama(source, converted):
    model, stock = unimm.load(converted).model, AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor([[5, 6, ROWS + CODES, *range(ROWS, ROWS + 32), ROWS + CODES + 1, 7]])
    with torch.no_grad():
        logits, wanted = model(ids).logits, stock(ids).logits
        drawn = model.generate(ids[:, :20], do_sample=False, max_new_tokens=8)
        greedy = stock.generate(
            ids[:, :20], do_sample=False, max_new_tokens=8, suppress_tokens=[*range(ROWS), 416, 417]
        )
    torch.testing.assert_close(logits[..., : wanted.shape[-1]], wanted, atol=1e-4, rtol=0)
    assert drawn.equal(greedy)
    expected = golden_io("seed_tokenizer")
    assert model.codec.encode(expected["pixel_values"]).ids[..., 0].equal(expected["codes"])


@pytest.mark.parametrize(
    ("system", "prompt"),
    [
        ("seed_llama_8b", "<s>USER: {}what is it?\nASSISTANT:"),
        ("seed_llama_14b", "<s>[INST] {}what is it? [/INST]\n"),
    ],
)
def test_prompts_are_upstreams(system, prompt, source, tmp_path):
    target = convert(system, source, tmp_path / "out", accept_licence=True).target
    processor = AutoProcessor.from_pretrained(target)
    content = [{"type": "image", "image": a_picture()}, {"type": "text", "text": "what is it?"}]
    encoded = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    shown = processor.tokenizer.decode(encoded["input_ids"][0])
    assert shown == prompt.format("<img>" + "<|image|>" * 32 + "</img>")
    assert encoded["pixel_values"].shape == (1, 3, 56, 56)


def test_one_answer_may_mix_text_and_pictures(converted):
    model = unimm.load(converted)
    inputs = model.processor.drawing_inputs(["tell a story with pictures"])
    torch.manual_seed(0)
    rows = model.model.generate(
        **inputs, do_sample=True, temperature=3.0, top_p=1.0, num_return_sequences=24, max_new_tokens=120
    )
    answers = [model.processor.parse(row[inputs["input_ids"].shape[1] :]) for row in rows]
    mixed = [parts for parts in answers if {type(part) for part in parts} == {TextPart, ImagePart}]
    assert mixed
    whole = [part for parts in mixed for part in parts if isinstance(part, ImagePart) and part.complete]
    assert whole
    assert all(part.codes.ids.shape == (1, 32, 1) for part in whole)


def test_it_saves_and_loads_again(converted, tmp_path):
    check_saves(converted, tmp_path)


def test_it_goes_back_bit_by_bit(source, converted, tmp_path):
    back = restore("seed_llama_8b", converted, tmp_path / "back")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        given, found = load_file(source / name), load_file(back / name)
        assert given.keys() == found.keys()
        assert all(found[key].equal(tensor) for key, tensor in given.items())
    dropped = json.loads((converted / "conversion.json").read_text())["dropped"]
    given, found = (torch.load(folder / "seed_quantizer.pt", weights_only=True) for folder in (source, back))
    assert given.keys() - found.keys() == set(dropped)
    assert all(found[key].equal(given[key]) for key in found)


def test_another_pipeline_is_refused(source, tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="draws by a StableUnCLIPImg2ImgPipeline"):
        convert("seed_llama_8b", source, tmp_path / "out", accept_licence=True, detokenizer=tmp_path / "flux")


def test_an_adapter_learns(converted):
    check_lora(converted, VisualCodes(torch.arange(32).view(1, 32, 1), torch.ones(1, 32, dtype=torch.bool)))


@pytest.mark.usefixtures("brightness")
def test_recipes_run_two_steps(converted, tmp_path):
    check_recipes(converted, tmp_path)
