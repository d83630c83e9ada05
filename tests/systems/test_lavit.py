"""LaVIT from upstream's files to a model that reads by features, draws by codes and chats, and back."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
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
    text_tokenizer,
    tiny_vae,
    write_shards,
)
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor, LlamaConfig

import unimm
from unimm import VisualCodes
from unimm.conversion import convert, restore
from unimm.sequence import ImageSpan

ROWS, CODES, FEATURES, POOLED = 320, 64, 24, 28
OPEN, CLOSE, FIRST = ROWS, ROWS + 1, ROWS + 2
LLAMA = llama_sizes(ROWS + 2 + CODES, 40)  # 40: the width that the fixture's features have for the language model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lavit") / "source"
    for part in ("language_model", "visual_tokenizer", "pixel_decoding"):
        (folder / part).mkdir(parents=True)
    language = folder / "language_model"
    (language / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA, "text_vocab_size": ROWS}))
    write_shards(language_model(LlamaConfig(**LLAMA)), language)
    tokenizer = text_tokenizer(rows=ROWS, chat=["<unk>", "<s>", "</s>"])
    tokenizer.add_special_tokens({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.save_pretrained(language)
    encoder = golden_weights("lavit_tokenizer", "tokenizer_encoder.")
    reading = {key: tensor for key, tensor in encoder.items() if key.startswith(("causal_encoder.", "vit_proj."))}
    torch.save(reading, language / "visual_weight.bin")
    torch.save(encoder, folder / "visual_tokenizer" / "tokenizer_encoder.bin")
    decoder = golden_weights("lavit_tokenizer", "tokenizer_decoder.")
    torch.save(decoder, folder / "visual_tokenizer" / "tokenizer_decoder.bin")
    large = golden_weights("lavit_tokenizer", "highres_tokenizer_decoder.")
    torch.save(large, folder / "visual_tokenizer" / "highres_tokenizer_decoder.bin")
    sizes = (GOLDEN / "lavit_tokenizer" / "config.json").read_text()
    (folder / "visual_tokenizer" / "config.json").write_text(sizes)
    write_pixel_decoding(folder / "pixel_decoding")
    return folder


def write_pixel_decoding(folder, width=FEATURES, **conditions):
    torch.manual_seed(0)
    UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        attention_head_dim=2,
        cross_attention_dim=width,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        **conditions,
    ).save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    if not conditions:
        torch.save(torch.randn(1, 16, FEATURES), folder / "uncond_embeddings.bin")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    return convert("lavit", source, tmp_path_factory.mktemp("converted") / "model", accept_licence=True).target


@pytest.fixture(scope="module")
def large(source, tmp_path_factory):
    """With Stable Diffusion XL: six numbers of 8 for its sizes beside the pooled vector."""
    folder = tmp_path_factory.mktemp("large")
    conditions = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    sizes = {"projection_class_embeddings_input_dim": POOLED + 6 * 8}
    write_pixel_decoding(folder / "highres_pixel_decoding", FEATURES + POOLED, **conditions, **sizes)
    target, detokenizer = folder / "model", folder / "highres_pixel_decoding"
    return convert("lavit", source, target, accept_licence=True, detokenizer=detokenizer).target


def test_it_reads_draws_and_chats(converted):
    model = unimm.load(converted)
    assert model.model.generation_config.guidance_scale == 4.0
    check_everyday_use(model, size=(32, 32))


@pytest.mark.filterwarnings("ignore")
def test_it_fits_into_less_memory(converted):
    pytest.importorskip("bitsandbytes")
    check_stored(converted, size=(32, 32))


def test_pictures_have_as_many_codes_as_they_need(converted):
    model = unimm.load(converted)
    torch.manual_seed(0)
    inputs = model.processor.drawing_inputs(["a star"] * 32)
    rows = model.model.generate(**inputs, generation_mode="image", guidance_scale=1.0, temperature=4.0)
    parsed = [model.model.config.grammar.parse(row.tolist()) for row in rows]
    spans = [span for spans in parsed for span in spans if isinstance(span, ImageSpan)]
    assert len(spans) == 32
    assert len({len(span.codes) for span in spans}) > 1
    assert all(span.complete and 1 <= len(span.codes) <= 16 for span in spans)


@torch.no_grad()
def test_features_of_a_picture_equal_the_reference(converted):
    model, expected = unimm.load(converted).model.model, golden_io("lavit_tokenizer")
    cells, keep = model.codec.kept_cells(expected["pixel_values"])
    assert keep.long().equal(expected["keep_argmax"])
    features = model.reader(cells, keep)[keep.bool()]
    torch.testing.assert_close(features, expected["continuous_argmax"], atol=1e-4, rtol=0)
    sampled = model.reader(cells, expected["keep_sampled"].float())[expected["keep_sampled"].bool()]
    torch.testing.assert_close(sampled, expected["continuous_sampled"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_reading_equals_a_plain_llama_over_the_kept_features(source, converted):
    """Dropped cells are masked, and what is kept stands at the positions it would have alone."""
    model, expected = AutoModelForMultimodalLM.from_pretrained(converted).eval(), golden_io("lavit_tokenizer")
    stock = AutoModelForCausalLM.from_pretrained(source / "language_model").eval()
    pixels, holder = expected["pixel_values"][:2], model.config.image_token_id
    question = [9, 11, 12]
    ids = torch.tensor([[5, OPEN, *[holder] * 16, CLOSE, *question]] * 2)
    logits = model(ids, pixel_values=pixels).logits[:, -len(question) :]
    answers = model.generate(ids, pixel_values=pixels, do_sample=False, max_new_tokens=6, generation_mode="text")
    start = 0
    for row, count in enumerate(expected["token_num_argmax"][:2].tolist()):
        kept = expected["continuous_argmax"][None, start : start + count]
        start += count
        embed = stock.get_input_embeddings()
        embeds = torch.cat([embed(torch.tensor([[5, OPEN]])), kept, embed(torch.tensor([[CLOSE, *question]]))], dim=1)
        wanted = stock(inputs_embeds=embeds).logits[0, -len(question) :]
        torch.testing.assert_close(logits[row, :, : wanted.shape[-1]], wanted, atol=1e-4, rtol=0)
        greedy = stock.generate(
            inputs_embeds=embeds, do_sample=False, max_new_tokens=6, suppress_tokens=[*range(ROWS, LLAMA["vocab_size"])]
        )
        assert answers[row, ids.shape[1] :].tolist()[: greedy.shape[1]] == greedy[0].tolist()


def test_features_are_guided_as_ids_are_and_are_no_targets(converted):
    model, expected = AutoModelForMultimodalLM.from_pretrained(converted), golden_io("lavit_tokenizer")
    ids = torch.tensor([[5, OPEN, *[model.config.image_token_id] * 16, CLOSE, 9, 11]])
    pixels = expected["pixel_values"][:1]
    options = {"pixel_values": pixels, "do_sample": False, "generation_mode": "image"}
    plain, one, two = (
        model.generate(ids, guidance_scale=torch.tensor([scale]) if scale else 1.0, **options)
        for scale in (0, 1.0, 9.0)
    )
    assert one.equal(plain)  # two rows for each, of which the second has no say
    assert not two.equal(plain)
    with pytest.raises(ValueError, match="15 picture placeholders for 16 cells"):
        model(ids[:, 3:], pixel_values=pixels)
    output = model(ids, pixel_values=pixels, labels=ids)
    output.loss.backward()
    assert float(output.image_loss) == 0
    assert bool(model.model.reader.project.weight.grad.any())


def test_prompts_are_upstreams(converted):
    processor = AutoProcessor.from_pretrained(converted)
    content = [{"type": "image", "image": a_picture()}, {"type": "text", "text": "what is it?"}]
    encoded = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    shown = processor.tokenizer.decode(encoded["input_ids"][0])
    assert shown == "<s><image>" + "<|image|>" * 16 + "</image>what is it?"


def test_it_saves_and_loads_again(converted, tmp_path):
    check_saves(converted, tmp_path)


def test_it_goes_back_bit_by_bit(source, converted, tmp_path):
    back = restore("lavit", converted, tmp_path / "back")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        given, found = (load_file(folder / "language_model" / name) for folder in (source, back))
        assert given.keys() == found.keys()
        assert all(found[key].equal(tensor) for key, tensor in given.items())
    for name in (
        "language_model/visual_weight.bin",
        "visual_tokenizer/tokenizer_encoder.bin",
        "visual_tokenizer/tokenizer_decoder.bin",
    ):
        given, found = (torch.load(folder / name, weights_only=True) for folder in (source, back))
        assert all(found[key].equal(given[key]) for key in found)
        assert all(key.startswith(("encoder.norm.", "vit_proj.")) for key in given.keys() - found.keys())


def test_it_draws_by_the_large_model_too(large):
    check_everyday_use(unimm.load(large), size=(32, 32))


@torch.no_grad()
def test_what_the_large_model_reads_equals_the_reference(large):
    model, expected = unimm.load(large), golden_io("lavit_tokenizer")
    states, pooled = model.detokenizer.condition(
        model.model.codec.decode(model.model.codec.encode(expected["pixel_values"]))
    )
    torch.testing.assert_close(states, expected["highres_cond_argmax"], atol=1e-4, rtol=0)
    torch.testing.assert_close(pooled, expected["highres_pooled_argmax"], atol=1e-4, rtol=0)


def test_the_large_decoder_goes_back_bit_by_bit(source, large, tmp_path):
    name = "visual_tokenizer/highres_tokenizer_decoder.bin"
    back = restore("lavit", large, tmp_path / "back")
    given, found = (torch.load(folder / name, weights_only=True) for folder in (source, back))
    assert given.keys() == found.keys()
    assert all(found[key].equal(tensor) for key, tensor in given.items())


def test_an_adapter_learns(converted):
    check_lora(
        converted, VisualCodes(torch.arange(5).view(1, 5, 1), torch.ones(1, 5, dtype=torch.bool)), answers_only=False
    )


@pytest.mark.usefixtures("brightness")
def test_recipes_run_two_steps(converted, tmp_path):
    check_recipes(converted, tmp_path, answers_only="false")
