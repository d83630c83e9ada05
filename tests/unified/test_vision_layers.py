"""Vision-only layers over any family: text passes through them, pictures do not, and without them nothing changes."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen3Config

from unimm import UniMMForConditionalGeneration
from unimm.sequence import VisualVocabulary
from unimm.unified import UniMMConfig

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, num_hidden_layers=5),
    "mistral": MistralConfig(**SIZES, num_hidden_layers=5, sliding_window=6),
    "qwen3": Qwen3Config(**SIZES, num_hidden_layers=5),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=5,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
    ),
}
ROWS = {"image_token_offset": 300, "codebook_sizes": [64]}
CODES = (300, 364)


def build(family, **options):
    torch.manual_seed(0)
    config = UniMMConfig(text_config=FAMILIES[family].to_dict(), **ROWS, **options)
    return UniMMForConditionalGeneration(config).eval()


def mixed(batch=2, text=4, codes=5):
    torch.manual_seed(1)
    before, after = torch.randint(8, 300, (batch, text)), torch.randint(8, 300, (batch, 3))
    return torch.cat([before, torch.randint(*CODES, (batch, codes)), after], dim=1)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
def test_text_alone_passes_through_vision_layers_as_it_came(family):
    model = build(family, vision_layers_before=2, vision_layers_after=1, vision_norm=True)
    core = FAMILIES[family].to_dict() | {"num_hidden_layers": 2}
    if core.get("layer_types"):
        core["layer_types"] = core["layer_types"][2:4]
    plain = UniMMForConditionalGeneration(UniMMConfig(text_config=core, **ROWS)).eval()
    state = {}
    for name, weight in model.state_dict().items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None and ".norm." not in name:
            state[name] = weight
        elif layer is not None and int(layer[1]) in (2, 3):
            state[name.replace(layer[0], f".layers.{int(layer[1]) - 2}.")] = weight
    state["model.language_model.norm.weight"] = model.model.norm.text.weight
    plain.load_state_dict(state)
    ids = torch.randint(8, 300, (2, 11))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    ids = mixed()
    assert not torch.allclose(model(ids).logits[:, 4:], plain(ids).logits[:, 4:], atol=1e-2)


@torch.no_grad()
def test_text_before_a_picture_is_seen_by_it_and_not_changed_by_it(family):
    model = build(family, vision_layers_before=1, vision_layers_after=1, vision_norm=True)
    ids = mixed()
    states = model(ids, output_hidden_states=True).hidden_states
    pictures = (ids >= 300) & (ids < 364)
    assert states[0][~pictures].equal(states[1][~pictures])
    assert not states[0][pictures].equal(states[1][pictures])
    assert not states[1][~pictures].equal(states[2][~pictures])
    other = ids.clone()
    other[:, 0] = (other[:, 0] - 8 + 1) % 292 + 8
    moved = model(other, output_hidden_states=True).hidden_states[1]
    assert not moved[:, 4].equal(states[1][:, 4])  # in the first layer, which changes pictures only
    assert moved[:, 1:4].equal(states[1][:, 1:4])


@torch.no_grad()
def test_cache_and_left_padding_change_nothing(family):
    model = build(family, vision_layers_before=1, vision_layers_after=2, vision_norm=True)
    ids = mixed()
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    steps = [first.logits]
    for step in ids[:, 5:].split(1, dim=1):
        steps.append(model(step, past_key_values=first.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=2e-5, rtol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    shifted = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(shifted[:, 3:], whole, atol=2e-5, rtol=1e-4)


def test_no_option_is_the_stock_model(family):
    model = build(family)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    assert {name for name, _ in model.model.language_model.named_parameters()} == {
        name for name, _ in stock.base_model.named_parameters()
    }
    assert model.model.norm is None
    model.model.language_model.load_state_dict(stock.base_model.state_dict())
    model.lm_head.load_state_dict(stock.lm_head.state_dict())
    assert model(mixed()).logits.equal(stock(mixed()).logits)


def test_saved_vision_layers_come_back(family, tmp_path):
    model = build(family, vision_layers_before=1, vision_layers_after=1, vision_norm=True)
    model.save_pretrained(tmp_path)
    again, report = UniMMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again(mixed()).logits.equal(model(mixed()).logits)


def test_new_vision_layers_begin_like_the_others(family):
    model = build(family, vision_layers_before=1, vision_layers_after=1, vision_norm=True)
    deviations = [layer.mlp.up_proj.weight.std().item() for layer in model.model.language_model.layers]
    assert all(0.18 < deviation < 0.22 for deviation in deviations)
    assert model.model.norm.text.weight.equal(model.model.norm.image.weight)
    assert model.model.norm.text.weight is not model.model.norm.image.weight


def test_a_language_model_gets_layers_for_pictures_and_keeps_its_text(family, codec, tokenizer):
    torch.manual_seed(0)
    text_config = type(FAMILIES[family]).from_dict(FAMILIES[family].to_dict() | {"vocab_size": len(tokenizer)})
    llm = AutoModelForCausalLM.from_config(text_config).eval()
    model, processor = UniMMForConditionalGeneration.from_backbones(
        llm, codec, tokenizer, vision_layers_before=2, vision_layers_after=1
    )
    ids = torch.randint(8, len(tokenizer), (2, 12))
    assert len(model.model.language_model.layers) == 8
    assert model(ids).logits[..., : len(tokenizer)].equal(llm(ids).logits)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "a red heart"}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    options = {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": False, "max_new_tokens": 8}
    drawn = model.generate(**prompt, **options)
    assert processor.parse(drawn[0])[-1].complete
    assert model.generate(**prompt, **options, use_cache=False).equal(drawn)


def test_embeddings_need_to_know_where_pictures_are():
    model = build("llama", vision_layers_before=1, vision_norm=True)
    ids = mixed()
    embeds = model.get_input_embeddings()(ids)
    places = (ids >= 300) & (ids < 364)
    assert model(inputs_embeds=embeds, image_positions=places).logits.equal(model(ids).logits)
    for wrong in (None, places[:, :1]):
        with pytest.raises(ValueError, match="layers for pictures only"):
            model(inputs_embeds=embeds, image_positions=wrong)


def test_what_cannot_have_vision_layers_is_refused():
    with pytest.raises(ValueError, match="at most 5 together"):
        build("llama", vision_layers_before=3, vision_layers_after=3)
    config = GPTNeoXConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2
    )
    with pytest.raises(ValueError, match=r"'gpt_neox' .* no 'norm'"):
        UniMMForConditionalGeneration(UniMMConfig(text_config=config.to_dict(), **ROWS, vision_norm=True))


def test_special_rows_may_open_and_close_pictures():
    options = {"image_token_offset": 100, "codebook_sizes": (20,), "pad_token_id": 0}
    vocabulary = VisualVocabulary(**options, boi_token_id=120, eoi_token_id=121, image_token_id=123, num_special_rows=4)
    assert vocabulary.size == 128
    assert vocabulary.text_blocks == (slice(0, 100), slice(120, 124))
    assert vocabulary.is_visual(torch.tensor([99, 100, 119, 120, 123])).tolist() == [False, True, True, True, True]
    with pytest.raises(ValueError, match="special rows, 120 to 122"):
        VisualVocabulary(**options, boi_token_id=120, eoi_token_id=121, image_token_id=123, num_special_rows=3)
    with pytest.raises(ValueError, match="num_special_rows is -1"):
        VisualVocabulary(**options, boi_token_id=1, eoi_token_id=2, image_token_id=3, num_special_rows=-1)
