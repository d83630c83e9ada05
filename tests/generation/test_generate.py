"""Constrained, guided generation against the stock loop."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from unimm import ImagePart, UniMMForConditionalGeneration
from unimm.generation import GrammarLogitsProcessor

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "qwen3": lambda rows: Qwen3Config(vocab_size=rows, num_key_value_heads=1, head_dim=16, **SIZES),
    "llama": lambda rows: LlamaConfig(vocab_size=rows, **SIZES),
    "gemma3": lambda rows: Gemma3TextConfig(
        vocab_size=rows, num_key_value_heads=1, head_dim=16, sliding_window=8, **SIZES
    ),
    "gpt_neox": lambda rows: GPTNeoXConfig(vocab_size=rows, **SIZES),
}
SCALE = 3.0


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, codec, tokenizer):
    torch.manual_seed(0)
    config = FAMILIES[request.param](len(tokenizer))
    config.initializer_range = 0.3
    llm = AutoModelForCausalLM.from_config(config).eval()
    return llm, *UniMMForConditionalGeneration.from_backbones(llm, codec, tokenizer)


def ask(processor, *prompts):
    return processor.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )


def test_text_rows_equal_the_language_model(family, tokenizer):
    llm, model, _ = family
    ids = torch.randint(8, len(tokenizer), (2, 12))
    assert model(ids).logits[..., : len(tokenizer)].equal(llm(ids).logits)


def test_batched_guidance_equals_the_stock_processor(family):
    _, model, processor = family
    prompt = ask(processor, "a red heart above a blue star")
    boi = torch.tensor([[model.config.boi_token_id]])
    ids = torch.cat([prompt["input_ids"], boi], dim=1)
    negative = torch.cat([torch.tensor([model.config.null_prompt_ids]), boi], dim=1)
    stock = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=5,
        logits_processor=[
            UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model, negative, torch.ones_like(negative)),
            GrammarLogitsProcessor(model.config.grammar, "cpu"),
        ],
    )
    ours = model.generate(**prompt, generation_mode="image", do_sample=False, guidance_scale=SCALE, max_new_tokens=8)
    plain = model.generate(**prompt, generation_mode="image", do_sample=False, max_new_tokens=8)
    assert ours.equal(stock)
    assert ours.shape == plain.shape


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_a_padded_batch_equals_single_prompts(tiny, scale):
    model, processor = tiny
    prompts = ("a star", "draw a picture of three green circles", "")
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": scale, "max_new_tokens": 8}
    together = model.generate(**ask(processor, *prompts), **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(**ask(processor, prompt), **options)[0]
        assert row[-5:].equal(alone[-5:])


def test_a_negative_prompt_longer_than_the_prompt(tiny):
    model, processor = tiny
    negative = ask(processor, "draw a picture of three green circles")["input_ids"]
    options = {"generation_mode": "image", "do_sample": False, "max_new_tokens": 8}
    prompt = ask(processor, "a star")
    guided = model.generate(**prompt, **options, guidance_scale=SCALE, negative_prompt_ids=negative)
    same = model.generate(**prompt, **options, guidance_scale=SCALE, negative_prompt_ids=prompt["input_ids"])
    assert guided.shape == same.shape
    assert same.equal(model.generate(**prompt, **options))  # u + s (c - u) = c where both prompts are the same


def test_scales_per_sample(tiny):
    model, processor = tiny
    options = {"generation_mode": "image", "do_sample": False, "max_new_tokens": 8}
    prompts = ask(processor, "a star", "a star")
    both = model.generate(**prompts, **options, guidance_scale=torch.tensor([1.0, SCALE]))
    assert both[0].equal(model.generate(**prompts, **options)[0])
    assert both[1].equal(model.generate(**prompts, **options, guidance_scale=SCALE)[1])


def test_a_scale_in_the_generation_config_guides_once_and_pictures_only(tiny, monkeypatch):
    model, processor = tiny
    inputs = ask(processor, "a star", "what is it?")
    options = {"do_sample": False, "max_new_tokens": 6}
    drawn = model.generate(**inputs, generation_mode="image", guidance_scale=SCALE, **options)
    written = model.generate(**inputs, generation_mode="text", guidance_scale=1.0, **options)
    monkeypatch.setattr(model.generation_config, "guidance_scale", SCALE)
    assert model.generate(**inputs, generation_mode="image", **options).equal(drawn)
    assert model.generate(**inputs, generation_mode="text", **options).equal(written)


def test_sampled_pictures_always_parse(tiny):
    model, processor = tiny
    torch.manual_seed(0)
    rows = model.generate(
        **ask(processor, "a red heart"),
        generation_mode="image",
        do_sample=True,
        num_return_sequences=50,
        max_new_tokens=9,
    )
    for row in rows:
        picture = processor.parse(row)[-1]
        assert isinstance(picture, ImagePart)
        assert picture.complete
        assert picture.codes.grid == [(2, 2)]
    assert len({tuple(row.tolist()) for row in rows}) > 1


def test_free_answers_open_and_close_pictures_themselves(tiny):
    model, processor = tiny
    torch.manual_seed(1)
    prompt = ask(processor, "a red heart")
    rows = model.generate(**prompt, do_sample=True, temperature=3.0, num_return_sequences=64, max_new_tokens=60)
    answers = rows[:, prompt["input_ids"].shape[1] :]
    pictures = [part for row in answers for part in processor.parse(row) if isinstance(part, ImagePart)]
    assert pictures
    whole = [part for part in pictures if part.complete]
    cut = len(pictures) - len(whole)
    assert cut <= sum(int(model.config.grammar.states(row[None])[0, -1] != 0) for row in answers)


def test_text_mode_opens_no_picture(tiny):
    model, processor = tiny
    torch.manual_seed(0)
    rows = model.generate(
        **ask(processor, "hi"), generation_mode="text", do_sample=True, num_return_sequences=20, max_new_tokens=20
    )
    assert not (rows == model.config.boi_token_id).any()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_what_guidance_cannot_follow_is_refused(tiny, options):
    model, processor = tiny
    with pytest.raises(ValueError, match="two rows per sample"):
        model.generate(**ask(processor, "a star"), guidance_scale=SCALE, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": float("nan")}, "finite number"),
        ({"guidance_scale": "3"}, "finite number"),
        ({"guidance_scale": torch.ones(3)}, "each of the 1 samples"),
        ({"guidance": 3.0}, "guidance is no argument; guidance_scale"),
        ({"input_ids": [[1, 2]]}, r"no ids \[B, T\]"),
        ({"input_ids": torch.tensor([1, 2])}, r"no ids \[B, T\]"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 32)}, "the grammar reads them"),
    ],
)
def test_other_ids_and_guidance_are_refused(tiny, options, message):
    model, processor = tiny
    with pytest.raises(ValueError, match=message):
        model.generate(**{**ask(processor, "a star"), "generation_mode": "image", **options})


def test_unknown_mode_is_refused(tiny):
    with pytest.raises(ValueError, match="image, text or None"):
        tiny[0].generate(**ask(tiny[1], "a star"), generation_mode="audio")
