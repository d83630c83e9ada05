"""X-Omni's language model against outputs of its reference, what it does beyond it, and the way back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from unimm import UniMMForConditionalGeneration
from unimm.cli.main import main
from unimm.conversion import convert, restore
from unimm.conversion.maps import xomni_lm
from unimm.conversion.upstream import UpstreamConfig
from unimm.generation import GrammarLogitsProcessor
from unimm.sequence import ImageSpan

GOLDEN = Path(__file__).parent.parent / "golden" / "xomni_lm"
EXACT = {"atol": 1e-4, "rtol": 0}  # the fixture's tolerance, in float32
TEXT, CODES = slice(0, 100), slice(100, 132)
SOM, EOM = 132, 133


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert("xomni_lm", GOLDEN, tmp_path_factory.mktemp("xomni") / "model").target


@pytest.fixture
def model(folder):
    return AutoModelForMultimodalLM.from_pretrained(folder).eval()


def check(logits, expected, prefix="", kept=None):
    kept = torch.ones(logits.shape[:2], dtype=torch.bool) if kept is None else kept
    for mode, block in (("text", TEXT), ("image", CODES)):
        wanted = expected[f"{prefix}logits_{mode}"]
        torch.testing.assert_close(logits[kept][:, block], wanted[kept][:, block], **EXACT)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForMultimodalLM])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_text_and_image_logits_equal_the_reference(auto, attention, folder, expected):
    model = auto.from_pretrained(folder, attn_implementation=attention).eval()
    assert isinstance(model, UniMMForConditionalGeneration)
    assert model.config.codec_config is None
    output = model(expected["input_ids"], output_hidden_states=True)
    check(output.logits, expected)
    assert bool(output.logits.isfinite().all())
    torch.testing.assert_close(torch.stack(output.hidden_states[:-1]), expected["hidden_before_blocks"], **EXACT)
    torch.testing.assert_close(output.hidden_states[-1], expected["final_hidden"], **EXACT)


@torch.no_grad()
def test_left_padding_changes_nothing(model, expected):
    ids, mask = expected["padded_input_ids"], expected["padded_attention_mask"]
    for positions in (expected["padded_position_ids"], None):
        output = model(ids, attention_mask=mask, position_ids=positions)
        check(output.logits, expected, "padded_", mask.bool())


@torch.no_grad()
def test_the_cache_changes_nothing(model, expected):
    ids = expected["input_ids"]
    steps, cache = [], None
    for piece in (ids[:, :7], *ids[:, 7:].split(1, dim=1)):
        output = model(piece, past_key_values=cache, use_cache=True)
        steps.append(output.logits)
        cache = output.past_key_values
    check(torch.cat(steps, dim=1), expected)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize(("mode", "block"), [("text", TEXT), ("image", CODES)])
@torch.no_grad()
def test_greedy_ids_equal_the_reference(mode, block, model, expected):
    wanted = expected[f"greedy_{mode}"]
    ids, cache = wanted[:, :18], None
    while ids.shape[1] < wanted.shape[1]:
        output = model(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        ids = torch.cat([ids, output.logits[:, -1:, block].argmax(dim=2) + block.start], dim=1)
    assert ids.equal(wanted)


def test_generate_draws_what_the_reference_draws(model, expected):
    wanted = expected["greedy_image"]
    # The reference never scores the end of a picture.
    drawn = model.generate(wanted[:, :18], do_sample=False, max_new_tokens=6, suppress_tokens=[EOM])
    assert drawn.equal(wanted)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), wanted[:, :18]], dim=1)
    drawn = model.generate(
        padded, attention_mask=(padded != 0).long(), do_sample=False, max_new_tokens=6, suppress_tokens=[EOM]
    )
    assert drawn[:, 3:].equal(wanted)


def test_the_model_may_open_and_close_a_picture_itself(model):
    torch.manual_seed(0)
    prompt = torch.tensor([[5, 6, 7]])
    rows = model.generate(prompt, do_sample=True, temperature=9.0, num_return_sequences=64, max_new_tokens=60)
    assert SOM in rows
    assert EOM in rows
    assert int(rows.max()) <= EOM  # neither `<IMAGE>`, nor the placeholder, nor a row that means nothing
    spans = [span for row in rows for span in model.config.grammar.parse(row.tolist())]
    assert any(span.complete for span in spans if isinstance(span, ImageSpan))


def test_batched_guidance_equals_the_stock_processor(model, expected):
    prompt = expected["greedy_image"][:, :18]
    negative = prompt[:, 9:13]  # the picture's opening alone
    options = {"do_sample": False, "max_new_tokens": 6}
    stock = model.generate(
        prompt,
        logits_processor=[
            UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model, negative, torch.ones_like(negative)),
            GrammarLogitsProcessor(model.config.grammar, "cpu"),
        ],
        **options,
    )
    ours = model.generate(prompt, guidance_scale=3.0, negative_prompt_ids=negative, **options)
    assert ours.equal(stock)
    opened = model.generate(prompt[:, :9], generation_mode="image", guidance_scale=3.0, **options)
    som = torch.full((1, 1), SOM)
    bare = model.generate(
        torch.cat([prompt[:, :9], som], dim=1), guidance_scale=3.0, negative_prompt_ids=som, eos_token_id=EOM, **options
    )
    assert opened.equal(bare)  # by default guidance steers away from a picture of nothing


def test_a_saved_model_is_the_same_and_goes_back_bit_by_bit(model, folder, expected, tmp_path, capsys):
    model.save_pretrained(tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="copy it from the converted model"):
        restore("xomni_lm", tmp_path / "again", tmp_path / "back")
    shutil.copy(folder / "conversion.json", tmp_path / "again")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "again")
    assert again(expected["input_ids"]).logits.equal(model(expected["input_ids"]).logits)
    assert main(["convert", "xomni_lm", str(tmp_path / "again"), str(tmp_path / "back"), "--back"]) == 0
    back, upstream = load_file(tmp_path / "back" / "weights.safetensors"), load_file(GOLDEN / "weights.safetensors")
    assert back.keys() == upstream.keys()
    assert all(back[key].equal(tensor) for key, tensor in upstream.items())
    fields = json.loads((tmp_path / "back" / "config.json").read_text())["args"]
    given = json.loads((GOLDEN / "config.json").read_text())["args"]
    assert given.items() <= fields.items()
    with pytest.raises(ValueError, match="converted from 'xomni_lm'"):
        restore("llamagen_vq", folder, tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 130, "image_vocab_size": 70, "mm_vocab_size": 73, "num_mm_adap_layers": 0},
        {"num_hidden_layers": 3, "num_mm_adap_layers": 1, "num_mm_head_layers": 0, "num_key_value_heads": 1},
        {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 2, "mm_vocab_size": 32},
        {"num_mm_adap_layers": 0, "num_mm_head_layers": 0, "rope_theta": 500.0},
    ],
)
def test_every_size_comes_from_the_configuration(change, tmp_path):
    torch.manual_seed(0)
    args = json.loads((GOLDEN / "config.json").read_text())["args"] | change
    first = UniMMForConditionalGeneration(xomni_lm.plan(UpstreamConfig(args)).config).eval()
    weights = upstream_weights(first, args["vocab_size"], args["mm_vocab_size"])
    (tmp_path / "source").mkdir()
    save_file(weights, tmp_path / "source" / "weights.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps(args))
    model = AutoModelForCausalLM.from_pretrained(convert("xomni_lm", tmp_path / "source", tmp_path / "out").target)
    text, end = args["vocab_size"], args["vocab_size"] + args["image_vocab_size"]
    ids = torch.randint(text, end, (2, 9))
    ids[:, :4] = torch.randint(0, text, (2, 4))
    assert model(ids).logits[..., :end].equal(first(ids).logits[..., :end])
    assert model.config.text_config.rope_parameters["rope_theta"] == args["rope_theta"]
    for layer in model.model.language_model.layers:
        assert layer.self_attn.q_proj.out_features == args["hidden_size"]


def test_half_precision_stays_half_and_goes_back_bit_by_bit(tmp_path):
    source = spoil(tmp_path)
    weights = {key: tensor.bfloat16() for key, tensor in load_file(source / "weights.safetensors").items()}
    save_file(weights, source / "weights.safetensors")
    target = convert("xomni_lm", source, tmp_path / "out").target
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForMultimodalLM.from_pretrained(target).dtype == torch.bfloat16
    back = load_file(restore("xomni_lm", target, tmp_path / "back") / "weights.safetensors")
    assert all(back[key].equal(tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_of_training_reach_every_part(checkpointing, model, expected):
    ids = expected["input_ids"]
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            assert bool(weight.grad.isfinite().all()), name
            assert bool(weight.grad.any()), name
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[1] < losses[0]


@torch.no_grad()
def test_specials_are_learned_among_the_text(model, expected):
    ids = expected["input_ids"]
    output, logits = model(ids, labels=ids), model(ids).logits[:, :-1]
    targets = ids[:, 1:]
    outside = (targets < TEXT.stop) | (targets >= CODES.stop)
    legal = torch.cat([torch.arange(TEXT.stop), torch.arange(CODES.stop, CODES.stop + 9)])
    scores = logits[outside].log_softmax(dim=1)
    among = scores[:, legal] - scores[:, legal].logsumexp(dim=1, keepdim=True)
    place = torch.where(targets < TEXT.stop, targets, targets - CODES.stop + TEXT.stop)[outside]
    torch.testing.assert_close(output.text_loss, -among.gather(1, place[:, None]).mean())


def test_the_published_size_has_the_published_parameters():
    """Qwen2.5-7B's body, eight layers more, and two tables of 16,448 rows for pictures."""
    args = {
        "vocab_size": 152064,
        "image_vocab_size": 16384,
        "mm_vocab_size": 16448,
        "num_mm_adap_layers": 4,
        "num_mm_head_layers": 4,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 36,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1e6,
    }
    with torch.device("meta"):
        model = UniMMForConditionalGeneration(xomni_lm.plan(UpstreamConfig(args)).config)
    weights = upstream_weights(model, 152064, 16448)
    count = sum(tensor.numel() for tensor in weights.values())
    layers = model.model.language_model.layers
    layer = sum(weight.numel() for weight in layers[0].parameters())
    tables = sum(weights[key].numel() for key in ("model.mm_embed_tokens.weight", "mm_head.weight"))
    qwen = 7_615_616_512  # Qwen2.5-7B's published count
    assert count == qwen + 8 * layer + tables + 3584  # and the second norm
    assert round(8 * layer / 1e9, 2) == 1.86
    assert round(tables / 1e9, 3) == 0.118
    ours = sum(weight.numel() for weight in model.parameters())
    assert ours - count == 2 * 3584 * (model.config.vocabulary.size - 152064 - 16448)


def upstream_weights(model, text_rows, image_rows):
    """A model's weights under upstream's names, which has two tables each for embedding and head."""
    weights = {}
    for key, tensor in model.state_dict().items():
        if key in xomni_lm.TABLES:
            names = xomni_lm.TABLES[key]
            weights[names[0]] = tensor[:text_rows].contiguous()
            weights[names[1]] = tensor[text_rows : text_rows + image_rows].contiguous()
        else:
            key = key.replace("model.language_model.layers.", "model.layers.")
            weights[key.replace("norm.text.", "lm_norm.").replace("norm.image.", "mm_norm.")] = tensor
    return weights


def spoil(tmp_path, **change):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    fields = json.loads((source / "config.json").read_text())
    fields["args"] |= change
    (source / "config.json").write_text(json.dumps(fields))
    return source


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tie_word_embeddings": True}, "must be false"),
        ({"mm_vocab_size": 31}, "at least image_vocab_size, 32"),
        ({"mm_special_tokens": ["<SOM>"]}, "<EOM>"),
        ({"num_mm_adap_layers": 5}, "at most 6 together"),
        ({"num_hidden_layers": 5, "num_mm_head_layers": 1}, "no place for"),
        ({"num_hidden_layers": 7}, "lack what becomes"),
        ({"vocab_size": 99}, "do not belong together"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        convert("xomni_lm", spoil(tmp_path, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()
