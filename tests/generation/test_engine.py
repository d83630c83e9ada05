"""The engine against the stock loop: the same ids, the same scores, the same distribution."""

import gc
import weakref

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from unimm import UniMMForConditionalGeneration
from unimm.generation import engine
from unimm.sequence import VisualVocabulary
from unimm.training.policy import SamplingPolicy
from unimm.unified import UniMMConfig
from unimm.unified.decoder import CachedDecoder
from unimm.unified.recorded import RecordedDecoder

BOI, EOI, PAD, END = 1, 2, 0, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TEXT_ROWS, SCALE = 120, 2.5
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": (LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
}
FIXED = [{"grid": [2, 3], "prefix": [], "min_positions": 6, "max_positions": 6}]
SIZED = [
    {"grid": [1, 2], "prefix": [9, 10], "min_positions": 2, "max_positions": 2},
    {"grid": [2, 2], "prefix": [9, 11], "min_positions": 4, "max_positions": 4},
]
NESTED = [{"grid": None, "prefix": [], "min_positions": 2, "max_positions": 5}]


def build(family="qwen3", *, sizes=(40,), shapes=FIXED, seed=0, **options):
    rows = VisualVocabulary(TEXT_ROWS, sizes, BOI, EOI, 3, PAD).size
    kind, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = UniMMConfig(
        text_config=kind(vocab_size=rows, **SIZES, **own).to_dict(),
        image_token_offset=TEXT_ROWS,
        codebook_sizes=list(sizes),
        span_shapes=shapes,
        null_prompt_ids=[5, 6],
        eos_token_id=END,
        **options,
    )
    model = UniMMForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def prompts(lengths=(5, 3, 7), seed=1):
    """Ids padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(12, TEXT_ROWS, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch):
    """How often the engine ran."""
    made = []
    run = engine.Engine.generate
    monkeypatch.setattr(engine.Engine, "generate", lambda self, *a, **k: made.append(1) or run(self, *a, **k))
    return made


def assert_equal_to_stock(model, calls, asked, **options):
    before = len(calls)
    fast = model.generate(**asked, do_sample=False, **options)
    assert len(calls) == before + 1
    slow = model.generate(**asked, do_sample=False, **options, stock=True)
    assert len(calls) == before + 1
    assert fast.equal(slow)
    return fast


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_equal_the_stock_loop(family, scale, calls):
    model = build(family)
    options = {"generation_mode": "image", "guidance_scale": scale, "max_new_tokens": 10}
    rows = assert_equal_to_stock(model, calls, prompts(), **options)
    assert (rows[:, -1] == EOI).all()
    assert_equal_to_stock(model, calls, prompts((4,)), **options)


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("shapes", [FIXED, SIZED, NESTED], ids=["fixed", "sized", "nested"])
@pytest.mark.parametrize("sizes", [(40,), (30, 20)], ids=["one code", "two codes"])
def test_every_grammar_equals_the_stock_loop(shapes, sizes, scale, calls):
    for seed in range(2):
        model = build(sizes=sizes, shapes=shapes, seed=seed)
        asked = prompts((5, 3, 7, 5), seed=seed)
        assert_equal_to_stock(model, calls, asked, generation_mode="image", guidance_scale=scale, max_new_tokens=14)


@pytest.mark.parametrize("shapes", [FIXED, SIZED, NESTED], ids=["fixed", "sized", "nested"])
def test_answers_that_mix_text_and_pictures_equal_the_stock_loop(shapes, calls):
    whole = ended = 0
    for seed in range(2):
        model = build(shapes=shapes, sizes=(9, 7), seed=seed)
        model.lm_head.weight.data[[BOI, END]] *= 2  # pictures and ends are likely among 120 text rows
        lengths = torch.randint(2, 9, (6,)).tolist()
        rows = assert_equal_to_stock(model, calls, prompts(lengths, seed), guidance_scale=SCALE, max_new_tokens=20)
        answers = rows[:, max(lengths) :]
        whole += int(((answers == EOI).any(dim=1) & (answers[:, 0] != BOI)).sum())
        ended += int((answers == END).any(dim=1).sum())
    assert whole
    assert ended


def test_text_mode_and_scales_per_sample_equal_the_stock_loop(calls):
    model = build()
    model.lm_head.weight.data[BOI] *= 3
    rows = assert_equal_to_stock(model, calls, prompts(), generation_mode="text", max_new_tokens=12)
    assert not (rows == BOI).any()
    scales = torch.tensor([1.0, 2.0, 4.0])
    assert_equal_to_stock(model, calls, prompts(), guidance_scale=scales, max_new_tokens=12)


@pytest.mark.parametrize("interval", [(0.0, 0.4), (0.4, 0.7), (0.5, 1.0)])
@pytest.mark.parametrize("shapes", [FIXED, SIZED, NESTED], ids=["fixed", "sized", "nested"])
def test_guidance_of_a_part_equals_the_stock_loop(shapes, interval, calls):
    model = build(sizes=(30, 20), shapes=shapes)
    model.lm_head.weight.data[[BOI, END]] *= 2
    asked = prompts((5, 3, 7, 5))
    options = {"guidance_scale": SCALE, "guidance_interval": interval}
    assert_equal_to_stock(model, calls, asked, generation_mode="image", max_new_tokens=14, **options)
    assert_equal_to_stock(model, calls, asked, max_new_tokens=20, **options)


def test_guidance_acts_inside_its_interval_only(tmp_path):
    model = build(shapes=[{"grid": [4, 5], "prefix": [], "min_positions": 20, "max_positions": 20}])
    options = {"generation_mode": "image", "do_sample": False, "max_new_tokens": 21}
    asked, start = prompts((7,)), 8
    whole, none = (model.generate(**asked, **options, guidance_scale=scale)[0, start:-1] for scale in (SCALE, 1.0))
    first, last, all_of_it, nothing = (
        model.generate(**asked, **options, guidance_scale=SCALE, guidance_interval=interval)[0, start:-1]
        for interval in ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0), (0.0, 0.01))
    )
    assert all_of_it.equal(whole)
    assert nothing.equal(none)
    assert first[:10].equal(whole[:10])
    assert last[:10].equal(none[:10])
    assert not first.equal(whole)
    assert not last.equal(none)
    GenerationConfig(guidance_scale=SCALE, guidance_interval=[0.0, 0.5]).save_pretrained(tmp_path)
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    assert model.generate(**asked, **options)[0, start:-1].equal(first)


@pytest.mark.parametrize("window", [1, 4])
def test_rows_that_guidance_no_longer_needs_are_not_read(window):
    model = build(shapes=[{"grid": [4, 5], "prefix": [], "min_positions": 20, "max_positions": 20}])
    rows = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    options = {"generation_mode": "image", "do_sample": False, "max_new_tokens": 21, "guidance_scale": SCALE}
    drawn = [model.generate(**prompts(), **options, guidance_interval=(0.2, 0.6), jacobi_window=window)]
    steps = rows[1:]  # the prompt is read before, equal rows of it once
    if window == 1:
        assert steps == [6] * 11 + [3] * 9
    else:
        assert steps == sorted(steps, reverse=True)
        assert set(steps) == {6, 3}
    drawn.append(model.generate(**prompts(), **options, guidance_interval=(0.2, 0.6), stock=True))
    assert drawn[0].equal(drawn[1])


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.0, 1.1), (0.5,), (0.0, 0.5, 1.0)])
def test_intervals_that_cannot_be_are_refused(interval):
    for scale in (SCALE, 1.0):
        with pytest.raises(ValueError, match="guidance_interval"):
            build().generate(**prompts(), guidance_scale=scale, guidance_interval=interval)


@pytest.mark.parametrize("norm", [False, True])
def test_vision_layers_equal_the_stock_loop(norm, calls):
    model = build(vision_layers_before=1, vision_layers_after=1, vision_norm=norm)
    model.lm_head.weight.data[BOI] *= 2
    for mode in ("image", None):
        assert_equal_to_stock(model, calls, prompts(), generation_mode=mode, guidance_scale=SCALE, max_new_tokens=24)


def test_a_prompt_with_a_picture_equals_the_stock_loop(tiny, calls):
    model, processor = tiny
    asked = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": torch.rand(3, 32, 32)}, {"type": "text", "text": "?"}],
            }
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert_equal_to_stock(model, calls, asked, guidance_scale=1.0, max_new_tokens=8)


def test_scores_equal_the_stock_loop():
    model = build(sizes=(30, 20))
    options = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 12,
        "top_p": 0.9,
        "generation_mode": "image",
        "guidance_scale": SCALE,
        "max_new_tokens": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    fast, slow = (model.generate(**prompts(), **options, stock=stock).scores for stock in (False, True))
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("warping", [{"temperature": 1.5}, {"top_p": 0.8}], ids=["temperature", "nucleus"])
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_samples_follow_the_distribution(scale, warping):
    """Chi-square over all 27 pictures of three positions with three codes each, against their exact probabilities."""
    shapes = [{"grid": [1, 3], "prefix": [], "min_positions": 3, "max_positions": 3}]
    model = build(sizes=(3,), shapes=shapes, seed=3)
    asked = prompts((4,))
    torch.manual_seed(0)
    number = 1500
    rows = model.generate(
        **asked,
        generation_mode="image",
        guidance_scale=scale,
        do_sample=True,
        num_return_sequences=number,
        max_new_tokens=4,
        top_k=0,
        **warping,
    )
    drawn = rows[:, 5:8] - TEXT_ROWS
    counts = torch.bincount(drawn @ torch.tensor([9, 3, 1]), minlength=27)
    pictures = torch.cartesian_prod(*[torch.arange(3)] * 3)
    ids = torch.cat([rows[:1, :5].expand(27, -1), pictures + TEXT_ROWS], dim=1)
    policy = SamplingPolicy(
        model.config.grammar,
        (5, 6),
        temperature=warping.get("temperature", 1.0),
        top_p=warping.get("top_p", 1.0),
        guidance_scale=scale,
    )
    with torch.no_grad():
        exact = policy.score(model, ids, torch.ones_like(ids), 3).log_probs.sum(dim=1).exp().double()
    inside = counts > 0 if warping.get("top_p") else exact > 0
    assert counts[~inside].sum() == 0
    exact = exact[inside] / exact[inside].sum()
    assert chisquare(counts[inside].double(), exact * number).pvalue > 1e-3


def test_equal_prompts_are_read_once():
    model = build()
    read = []
    hook = model.model.register_forward_hook(lambda module, args, kwargs, output: read.append(kwargs), with_kwargs=True)
    model.generate(
        **prompts((4,)),
        generation_mode="image",
        guidance_scale=SCALE,
        do_sample=True,
        num_return_sequences=6,
        max_new_tokens=8,
    )
    hook.remove()
    assert [kwargs["input_ids"].shape[0] for kwargs in read] == [2]


@pytest.mark.parametrize("kind", [CachedDecoder, RecordedDecoder])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_steps_of_any_width_equal_one_pass(family, kind):
    model = build(family, vision_layers_before=1, vision_norm=True)
    asked = prompts()
    new = torch.randint(TEXT_ROWS, TEXT_ROWS + 40, (3, 6))
    decoder = kind(model)
    states = [decoder.prefill(**asked, capacity=1)]
    states += [decoder.step(part) for part in (new[:, :1], new[:, 1:4])]
    decoder.step(new[:, :2])
    decoder.rewind(2)
    states += [decoder.step(new[:, 4:])]
    mask = torch.nn.functional.pad(asked["attention_mask"], (0, 6), value=1)
    whole = model.model(
        input_ids=torch.cat([asked["input_ids"], new], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
    ).last_hidden_state[:, -7:]
    torch.testing.assert_close(torch.cat(states, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert decoder.logits(whole[:, 0], torch.tensor([3, 1])).allclose(model.lm_head(whole[:, 0])[:, [3, 1]], atol=1e-4)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", [SIZED, NESTED], ids=["sized", "nested"])
def test_recorded_steps_equal_the_stock_loop(shapes, device, window, calls, monkeypatch):
    """Prompts of many lengths, as the cache of a recording has a fixed one, and weights that change between them."""
    model = build(shapes=shapes).to(device)
    monkeypatch.setattr(type(model), "decoder", lambda self: RecordedDecoder.of(self))
    for lengths in ((5, 3, 7, 5), (2, 6, 4, 4), (2,), (19, 4)):  # the second is drawn by the recordings of the first
        asked = {name: value.to(device) for name, value in prompts(lengths).items()}
        options = {"do_sample": False, "guidance_scale": SCALE, "max_new_tokens": 40}
        dropped = {"generation_mode": "image", "guidance_interval": (0.0, 0.5)}  # the unconditional rows
        for more in (dropped, {}):
            stock = model.generate(**asked, **options, **more, stock=True)
            assert model.generate(**asked, **options, **more, jacobi_window=window).equal(stock)
        for weight in model.parameters():
            weight.data.mul_(1.1)
    assert len(calls) == 8


class Quantised(torch.Tensor):
    """A tensor that is more than its numbers."""


@torch.no_grad()
def waiting(model):
    """The places of a decoder that has read prompts and waits, as if it had recorded a step."""
    decoder = RecordedDecoder(model)
    decoder.prefill(**prompts(), capacity=1)
    decoder.recordings[1] = None
    decoder.wait(model)
    return [part.data_ptr() for part in decoder._state()]


def goes_on(model, places):
    """Whether the next decoder has these places and what was recorded over them."""
    decoder = RecordedDecoder.of(model)
    return bool(decoder.recordings) and [part.data_ptr() for part in decoder._state()] == places


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_next_batch_takes_the_places_of_the_last_and_the_weights_of_now(family):
    model = build(family)
    places = waiting(model)
    for weight in model.parameters():
        weight.data.mul_(1.1)
    again = RecordedDecoder.of(model)
    norms = [layer.head_norm and layer.head_norm[0].data_ptr() for layer in again.layers]
    new, asked = torch.randint(TEXT_ROWS, TEXT_ROWS + 40, (3, 1)), prompts((2, 6, 4))
    states, wanted = [], []
    for decoder, found in ((again, states), (RecordedDecoder(model), wanted)):
        found += [decoder.prefill(**asked, capacity=1), decoder.step(new)]
        found += [decoder.logits(found[-1][:, 0], slice(3, 9))]
    assert [part.data_ptr() for part in again._state()] == places
    for state, other in zip(states, wanted, strict=True):
        assert state.equal(other)
    again.wait(model)  # recordings read the norms of heads where they were at first
    third = RecordedDecoder.of(model)
    assert [layer.head_norm and layer.head_norm[0].data_ptr() for layer in third.layers] == norms


def test_what_waits_holds_no_weights():
    model = build("qwen3")
    places = waiting(model)
    storage = weakref.ref(model.model.language_model.layers[0].self_attn.q_proj.weight.untyped_storage())
    body = model.model.language_model.to(torch.float64)
    gc.collect()
    assert storage() is None
    body.to(torch.float32)
    assert not goes_on(model, places)


@pytest.mark.parametrize("change", ["moved", "subclass", "adapter", "precision", "inference", "body"])
def test_a_decoder_does_not_go_on_over_other_weights(change, monkeypatch):
    model = build("qwen3")
    layer = model.model.language_model.layers[0].self_attn.q_proj
    if change == "adapter":  # there from the beginning, and turned off and on later
        model.model.language_model.layers[0].self_attn.q_proj = torch.nn.Sequential(layer)
    if change == "subclass":
        layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Quantised))
    places = waiting(model)
    if change == "moved":
        layer.weight.data = layer.weight.data.clone()
    if change == "body":
        model.model.language_model = build("qwen3").model.language_model
    if change == "precision":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with torch.inference_mode(change == "inference"):
        assert not goes_on(model, places)


def test_what_waits_is_small_whole_and_let_go(monkeypatch):
    model = build("qwen3")
    assert goes_on(model, waiting(model))
    waiting(model)
    model.to(torch.float32)
    assert not RecordedDecoder.of(model).recordings
    decoder = RecordedDecoder(model)
    decoder.prefill(**prompts(), capacity=1)
    decoder.keep(2)
    decoder.recordings[1] = None
    decoder.wait(model)
    assert not RecordedDecoder.of(model).recordings
    monkeypatch.setattr("unimm.unified.recorded.KEPT", 0)
    assert not goes_on(model, waiting(model))


def test_a_batch_of_other_rows_begins_anew():
    model = build("qwen3")
    waiting(model)
    decoder = RecordedDecoder.of(model)
    decoder.prefill(**prompts((2,)), capacity=1)
    assert not decoder.recordings


@pytest.mark.parametrize("sizes", [(40,), (30, 20)], ids=["one code", "two codes"])
@pytest.mark.parametrize("shapes", [FIXED, SIZED, NESTED], ids=["fixed", "sized", "nested"])
def test_a_window_draws_the_same_with_the_same_seed_in_fewer_passes(shapes, sizes):
    model = build(sizes=sizes, shapes=shapes)
    model.lm_head.weight.data *= 3  # likely codes, as of a trained model
    passes = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].shape))
    drawn, taken = [], []
    scale = torch.tensor([1.5, 1.0, SCALE])
    for window in (1, 2, 5, 64):
        torch.manual_seed(3)
        passes.clear()
        output = model.generate(
            **prompts(),
            generation_mode="image",
            guidance_scale=scale,
            do_sample=True,
            temperature=0.7,
            top_k=9,
            max_new_tokens=14,
            jacobi_window=window,
            return_dict_in_generate=True,
        )
        drawn.append(output.sequences)
        taken.append(len(passes))
        assert output.passes == len(passes) - 1  # the prompt is read besides
        assert max(shape[1] for shape in passes[1:]) <= window
    assert all(drawn[0].equal(other) for other in drawn[1:])
    assert taken == sorted(taken, reverse=True)


def test_a_window_accepts_what_does_not_change():
    """Codes that do not depend on the codes before them need two looks: one to guess them, one to see them stay."""
    model = build()
    model.model.language_model.embed_tokens.weight.data[:] = 0.1
    passes = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: passes.append(1))
    model.generate(**prompts((4,)), generation_mode="image", do_sample=False, max_new_tokens=7, jacobi_window=6)
    assert len(passes) - 1 <= 2  # the prompt is read besides


def test_windows_that_cannot_be_are_refused():
    for options in ({"jacobi_window": 0}, {"jacobi_window": 4, "stock": True}):
        with pytest.raises(ValueError, match="jacobi_window"):
            build().generate(**prompts(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5)]},
        {"stopping_criteria": [lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)]},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ],
    ids=["penalty", "processor", "criterion", "no cache", "static cache", "states"],
)
def test_what_the_engine_does_not_know_takes_the_stock_loop(options, calls):
    model = build()
    model.generate(**prompts(), generation_mode="image", do_sample=False, max_new_tokens=4, **options)
    assert not calls


def test_a_model_in_training_and_other_families_take_the_stock_loop(calls):
    model = build().train()
    model.generate(**prompts(), generation_mode="image", do_sample=False, max_new_tokens=4)
    windowed, own = FAMILIES["mistral"]
    FAMILIES["windowed"] = (windowed, {**own, "sliding_window": 4})
    try:
        assert build("windowed").decoder() is None
    finally:
        del FAMILIES["windowed"]
    assert not calls
