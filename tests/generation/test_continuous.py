"""Requests of every kind in one pass, against each on its own."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from unimm import UniMMForConditionalGeneration
from unimm.sequence import VisualVocabulary
from unimm.unified import UniMMConfig

BOI, EOI, PAD, END = 1, 2, 0, 4
TEXT_ROWS = 60
SIZED = [
    {"grid": [1, 2], "prefix": [9, 10], "min_positions": 2, "max_positions": 2},
    {"grid": [2, 2], "prefix": [9, 11], "min_positions": 4, "max_positions": 4},
]
NESTED = [{"grid": None, "prefix": [], "min_positions": 2, "max_positions": 5}]
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=END, pad_token_id=PAD)
PAGE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"  # of 5.17
SMALL = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=32, **{PAGE: 8})


def build(shapes, **options):
    sizes = (30, 20)
    rows = VisualVocabulary(TEXT_ROWS, sizes, BOI, EOI, 3, PAD).size
    text = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    config = UniMMConfig(
        text_config=text.to_dict(),
        image_token_offset=TEXT_ROWS,
        codebook_sizes=list(sizes),
        span_shapes=shapes,
        null_prompt_ids=[5, 6],
        eos_token_id=END,
        **options,
    )
    model = UniMMForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.lm_head.weight.data[BOI] *= 2  # pictures are likely among the text rows
    return model


@pytest.mark.parametrize(
    ("shapes", "options"),
    [(SIZED, {}), (NESTED, {}), (SIZED, {"vision_layers_before": 1, "vision_norm": True})],
    ids=["sized", "nested", "vision layers"],
)
def test_requests_of_every_kind_are_answered_as_on_their_own(shapes, options):
    model = build(shapes, **options)
    lengths = (3, 40, 7, 12, 5, 9)  # one is read in two passes
    prompts = [torch.randint(12, TEXT_ROWS, (length,)).tolist() for length in lengths]
    modes = [None, "image", "text", "image", None, "text"]
    expected = []
    for prompt, mode in zip(prompts, modes, strict=True):
        drawn = model.generate(
            torch.tensor([prompt]), generation_config=GREEDY, generation_mode=mode, max_new_tokens=12, stock=True
        )[0, len(prompt) :].tolist()
        expected.append(drawn[1:] if mode == "image" else drawn)
    opening = model.picture_opening()
    answers = {}
    with model.continuous_batching_context_manager(GREEDY, continuous_batching_config=SMALL) as manager:
        for prompt, mode in zip(prompts, modes, strict=True):
            if mode == "image":
                manager.add_request([*prompt, *opening], request_id=str(len(answers)), eos_token_id=EOI)
            else:
                manager.add_request(prompt, request_id=str(len(answers)), draws=mode is None)
            answers[str(len(answers))] = None
        for _ in prompts:
            output = manager.get_result(timeout=60)
            assert output.error is None
            answers[output.request_id] = output.generated_tokens
    assert list(answers.values()) == expected
    assert EOI in expected[1]
    assert BOI in expected[0] + expected[4]
    assert BOI not in expected[2] + expected[5]


def test_a_batch_of_prompts_is_answered_with_the_grammar():
    model = build(SIZED)
    answers = model.generate_batch([[20, 30], [*range(12, 20), BOI]], GREEDY, SMALL)
    for answer in answers.values():
        ids = torch.tensor([answer.prompt_ids + answer.generated_tokens])
        states = model.config.grammar.states(ids)[0, len(answer.prompt_ids) - 1 : -1]
        assert model.config.grammar.table[states, answer.generated_tokens].all()


def test_what_a_request_cannot_carry_is_refused():
    model = build(SIZED)
    with pytest.raises(ValueError, match="guidance_scale is 3"):
        model.init_continuous_batching(GenerationConfig(guidance_scale=3.0))
    with pytest.raises(ValueError, match="use_async_batching"):
        model.init_continuous_batching(GREEDY, ContinuousBatchingConfig(use_async_batching=True))
