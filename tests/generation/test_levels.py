"""Drawing by levels: one pass per level, of codes that the model was taught in the same way."""

import pytest
import torch
from test_engine import BOI, EOI, FIXED, NESTED, PAD, SCALE, SIZED, TEXT_ROWS, build, prompts
from torch.nn import functional as F

from unimm.sequence import IGNORED_LABEL, Levels
from unimm.training.policy import SamplingPolicy
from unimm.unified.decoder import CachedDecoder
from unimm.unified.levels import ask
from unimm.unified.recorded import RecordedDecoder

LEVELS = {
    "a pyramid": ([1, 1, 4], (40,), FIXED),
    "both codes of a position": ([2], (40, 30), FIXED),
    "some positions": ([4, 8], (40, 30), FIXED),
    "one after the other": ([1], (40,), FIXED),
    "spelled sizes": ([1, 3], (40,), SIZED),
}


@pytest.fixture
def widths(monkeypatch):
    """How many ids each pass over the cache read."""
    read = []
    step = CachedDecoder.step
    monkeypatch.setattr(CachedDecoder, "step", lambda self, ids: read.append(ids.shape[1]) or step(self, ids))
    return read


def taught(model, sequences, mask, labels=None):
    """The likeliest code of every place `[B, T]` by the states that the loss is taken of, -1 where there is no code."""
    config = model.config
    labels = sequences if labels is None else labels
    asked = ask(sequences, labels, mask, None, config.grammar, config.drawing_levels)
    hidden = model.model(asked.input_ids, attention_mask=asked.mask, position_ids=asked.position_ids)
    length = sequences.shape[1]
    logits, targets = model.lm_head(hidden.last_hidden_state[:, length:]), asked.labels[:, length + 1 :]
    likeliest = torch.full_like(sequences, -1)
    for row in range(len(sequences)):
        columns = (config.grammar.places(sequences)[row] >= 0).nonzero().flatten()
        states = config.grammar.states(sequences)[row][columns - 1]
        scores = logits[row][: len(columns)].masked_fill(~config.grammar.table[states], -float("inf"))
        assert targets[row][: len(columns)].tolist() == sequences[row][columns].tolist()
        likeliest[row][columns] = scores.argmax(dim=1)
    return likeliest


@pytest.mark.parametrize("decoder", [CachedDecoder, RecordedDecoder])
@pytest.mark.parametrize("name", LEVELS)
@torch.no_grad()
def test_what_is_drawn_is_what_is_taught(name, decoder, monkeypatch):
    levels, sizes, shapes = LEVELS[name]
    model = build(sizes=sizes, shapes=shapes, levels=levels)
    monkeypatch.setattr(type(model), "decoder", lambda self: decoder(self))
    asked = prompts()
    grid = (2, 2) if shapes == SIZED else None
    drawn = model.generate(**asked, do_sample=False, generation_mode="image", grid=grid)
    places = model.config.grammar.places(drawn)
    assert int(places.max()) + 1 == (4 if shapes == SIZED else 6) * len(sizes)
    mask = F.pad(asked["attention_mask"], (0, drawn.shape[1] - asked["attention_mask"].shape[1]), value=1)
    likeliest = taught(model, drawn, mask)
    assert torch.equal(likeliest[places >= 0], drawn[places >= 0])
    assert (drawn[:, -1] == EOI).all()


@pytest.mark.parametrize("scale", [1, SCALE])
def test_a_level_is_one_pass(widths, scale):
    model = build(sizes=(40, 30), levels=[4, 8])
    model.generate(**prompts(), do_sample=False, generation_mode="image", guidance_scale=scale)
    assert widths == [4, 4 + 8, 8]  # placeholders; known codes and placeholders; known codes


@pytest.mark.parametrize("new", [6, 3])
def test_scores_are_kept_of_every_id(new):
    model = build(sizes=(40, 30), shapes=SIZED, levels=[3])
    options = {"do_sample": False, "generation_mode": "image", "grid": (2, 2), "guidance_scale": SCALE}
    plain = model.generate(**prompts(), **options, max_new_tokens=new)
    kept = model.generate(**prompts(), **options, max_new_tokens=new, output_scores=True, return_dict_in_generate=True)
    assert kept.sequences.equal(plain)
    assert len(kept.scores) == new
    assert torch.stack(kept.scores, dim=1).argmax(dim=2).equal(plain[:, -new:])
    assert kept.scores[0][:, :TEXT_ROWS].isneginf().all()


def test_guidance_moves_every_code_of_a_level():
    model = build(levels=[3])
    options = {"do_sample": False, "generation_mode": "image"}
    drawn = [model.generate(**prompts(), guidance_scale=scale, **options)[:, 8:] for scale in (1, 40.0)]
    assert (drawn[0] != drawn[1]).any(dim=0)[:6].sum() > 3


@torch.no_grad()
def test_codes_of_a_level_do_not_know_each_other_and_later_ones_know_them():
    model = build(levels=[2, 4], sizes=(40,))
    picture = [BOI, *range(TEXT_ROWS, TEXT_ROWS + 6), EOI]
    row = torch.tensor([[7, 8, *picture, 9]])
    mask = torch.ones_like(row)
    before = scores(model, row, mask)  # [6, V]
    for place in range(6):
        changed = row.clone()
        changed[0, 3 + place] += 20
        moved = (scores(model, changed, mask) - before).abs().amax(dim=1) > 1e-5
        assert moved.tolist() == [False, False, *[place < 2] * 4]
    words = row.clone()
    words[0, 0] = 11
    assert ((scores(model, words, mask) - before).abs().amax(dim=1) > 1e-5).all()


def scores(model, rows, mask, position_ids=None):
    """Scores `[Q, V]` of the asked codes of one row."""
    config = model.config
    asked = ask(rows, rows, mask, position_ids, config.grammar, config.drawing_levels)
    hidden = model.model(asked.input_ids, attention_mask=asked.mask, position_ids=asked.position_ids)
    return model.lm_head(hidden.last_hidden_state[0, rows.shape[1] :])


@torch.no_grad()
def test_packed_and_padded_rows_are_learned_as_they_are_alone():
    model = build(levels=[2, 4])
    rows = [[7, 8, BOI, *range(TEXT_ROWS + first, TEXT_ROWS + first + 6), EOI, *[9] * first] for first in (3, 0)]
    alone = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])) for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED_LABEL] * (width - len(row)) for row in rows])
    padded = model(input_ids=ids, labels=labels)
    packed_labels = [row if not place else [IGNORED_LABEL, *row[1:]] for place, row in enumerate(rows)]
    packed = model(
        input_ids=torch.tensor([rows[0] + rows[1]]),
        labels=torch.tensor([packed_labels[0] + packed_labels[1]]),
        position_ids=torch.tensor([[*range(len(rows[0])), *range(len(rows[1]))]]),
    )
    wanted = torch.stack([output.image_loss for output in alone]).mean()
    text = sum(output.text_loss * (len(row) - 7) for output, row in zip(alone, rows, strict=True))
    for output in (padded, packed):
        torch.testing.assert_close(output.image_loss, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.text_loss, text / sum(len(row) - 7 for row in rows), atol=1e-5, rtol=0)


def test_levels_of_one_code_learn_the_picture_and_text_as_one_after_the_other():
    row = torch.tensor([[7, 8, BOI, *range(TEXT_ROWS, TEXT_ROWS + 6), EOI, 9, 10]])
    by_levels, plain = build(levels=[1]), build()
    plain.load_state_dict(by_levels.state_dict())
    losses = [model(input_ids=row, labels=row) for model in (by_levels, plain)]
    torch.testing.assert_close(losses[0].text_loss, losses[1].text_loss)  # words see codes and never placeholders
    assert losses[0].image_loss != losses[1].image_loss  # a placeholder asks, and not the code before
    losses[0].loss.backward()
    gradient = by_levels.get_input_embeddings().weight.grad
    assert gradient[by_levels.config.image_token_id].abs().sum() > 0


def test_a_picture_is_learned_by_levels_and_drawn():
    """Both codes of a position follow from the prompt, so they can be drawn at once."""
    torch.manual_seed(0)
    model = build(sizes=(8, 8), levels=[2], seed=3)
    rows = []
    for word in (20, 21, 22, 23):
        codes = [
            TEXT_ROWS + (word * (position + 1) + 8 * slot) % 8 + 8 * slot for position in range(6) for slot in (0, 1)
        ]
        rows.append([word, BOI, *codes, EOI])
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, 0] = IGNORED_LABEL
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model.train()(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = model.eval().generate(ids[:, :1], do_sample=False, generation_mode="image")
    assert torch.equal(drawn, ids)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("name", ["a pyramid", "both codes of a position", "spelled sizes"])
def test_drawings_are_scored_by_what_they_were_sampled_from(name, scale):
    """Of many drawings of one prompt, every code is sampled as often as its log-probability says."""
    levels, _, shapes = LEVELS[name]
    model = build(sizes=(4, 3)[: 2 if name == "both codes of a position" else 1], shapes=shapes, levels=levels)
    config, asked = model.config, prompts((5,))
    many = {key: value.repeat(600, 1) for key, value in asked.items()}
    torch.manual_seed(0)
    grid = (2, 2) if shapes == SIZED else None
    options = {"generation_mode": "image", "do_sample": True, "temperature": 0.7, "guidance_scale": scale}
    drawn = model.generate(**many, **options, grid=grid)
    policy = SamplingPolicy(config.grammar, (5, 6), temperature=0.7, guidance_scale=scale, levels=config.drawing_levels)
    sampled = drawn.shape[1] - (6 if grid is None else 8)  # behind the opening
    scores = policy.score(model, drawn, torch.ones_like(drawn), sampled)
    places = config.grammar.places(drawn)[:, -sampled:]
    first = places == 0  # its probability is the same in all drawings of a size
    for token in drawn[:, -sampled:][first].unique():
        chosen = first & (drawn[:, -sampled:] == token)
        probabilities = scores.log_probs[chosen].exp()
        assert probabilities.max() - probabilities.min() < 1e-4
        expected, count = float(probabilities[0]) * int(first.sum()), int(chosen.sum())
        assert abs(count - expected) < 5 * (expected + 1) ** 0.5
    # A drawing's log-probabilities average to minus the entropy of what it was drawn from.
    codes = places >= 0
    surprise = -scores.log_probs[codes].mean()
    torch.testing.assert_close(surprise, scores.entropies[codes].mean(), atol=0.06, rtol=0)


def test_an_answer_of_words_and_pictures_is_the_whole_grammar(widths):
    model = build(levels=[3])
    with torch.no_grad():
        model.lm_head.weight[BOI] *= 6
    drawn = model.generate(torch.tensor([[20, 21]]), do_sample=True, max_new_tokens=40)
    spans = model.config.grammar.parse(drawn[0].tolist())
    assert any(getattr(span, "complete", False) for span in spans)
    assert 3 in widths


def test_what_cannot_be_drawn_by_levels_is_refused():
    model = build(levels=[3])
    asked, image = prompts(), {"generation_mode": "image", "do_sample": False}
    with pytest.raises(ValueError, match="the engine alone draws, not the stock loop"):
        model.generate(**asked, **image, stock=True)
    with pytest.raises(ValueError, match="not a jacobi_window"):
        model.generate(**asked, **image, jacobi_window=4)
    with pytest.raises(ValueError, match="not continuous batching"):
        model.init_continuous_batching()
    begun = torch.tensor([[7, BOI, TEXT_ROWS, TEXT_ROWS + 1]])
    with pytest.raises(ValueError, match="goes on at code 2, inside the level of 0"):
        model.generate(begun, do_sample=False)
    model.generate(**asked, generation_mode="text", stock=True, do_sample=False, max_new_tokens=3)
    nested = build(shapes=NESTED, levels=[2])
    with pytest.raises(ValueError, match="give num_codes"):
        nested.generate(**asked, **image)
    assert nested.generate(**asked, **image, num_codes=4).shape[1] == 7 + 6
    model.config.text_config._attn_implementation = "eager"
    ids = torch.tensor([[7, BOI, *range(TEXT_ROWS, TEXT_ROWS + 6), EOI]])
    with pytest.raises(ValueError, match="Attention is eager"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match=r"levels are \[0\]"):
        build(levels=[0])
    with pytest.raises(ValueError, match="beside vision layers"):
        build(levels=[2], vision_norm=True)


def test_the_last_size_goes_on():
    assert Levels((1, 2)).starts(6) == [0, 1, 1, 3, 3, 5]
