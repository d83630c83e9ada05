"""Worlds are deterministic, hold combinations out, and say what they show."""

import numpy as np
import pytest
from conftest import needs_font

from unimm.data.worlds import (
    HELD_OUT_PAIRS,
    WORLDS,
    EmojiWorld,
    ShapesWorld,
    WordsWorld,
    is_held_out_word,
    parse_caption,
)
from unimm.data.worlds.emoji import held_out_ground, is_held_out_pair
from unimm.scorers.facts import OPPOSITES, SceneFacts
from unimm.scorers.glyphs import find_font

ALL = [ShapesWorld, pytest.param(EmojiWorld, marks=needs_font), WordsWorld]


@pytest.mark.parametrize("world", ALL)
def test_an_example_depends_on_its_index_alone(world):
    one, other = world(seed=1), world(seed=1)
    one.example(3)
    for index in (7, 0, 7):
        a, b = one.example(index), other.example(index)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert (a.facts, a.captions, a.questions) == (b.facts, b.captions, b.questions)
    assert (
        one.example(0).facts != world(seed=2).example(0).facts or one.example(1).facts != world(seed=2).example(1).facts
    )


@pytest.mark.parametrize("world", ALL)
def test_facts_survive_json(world):
    facts = world(seed=1).example(5).facts
    assert SceneFacts.from_json(facts.to_json()) == facts


def test_every_shape_and_colour_is_seen_and_pairs_are_held_out():
    train, held_out = ShapesWorld(), ShapesWorld(split="held_out")
    seen = {
        (o.name, o.colour)
        for i in range(4_000)
        for o in train.compose(np.random.default_rng(i), "single").facts.objects
    }
    unseen = {(o.name, o.colour) for i in range(300) for o in held_out.example(i).facts.objects}
    assert len(HELD_OUT_PAIRS) == 16
    assert len(seen) == 240
    assert not seen & HELD_OUT_PAIRS
    assert unseen == HELD_OUT_PAIRS


def test_captions_are_read_back():
    for index in range(400):
        example = ShapesWorld(seed=2).example(index)
        wanted = sorted((o.name, o.colour) for o in example.facts.objects)
        for caption in example.captions:
            stated = parse_caption(caption)
            assert sorted((o.name, o.colour) for o in stated.objects) == wanted, caption
            if example.facts.relation:
                same_order = stated.objects[0].phrase == example.facts.objects[0].phrase
                relation = stated.relation if same_order else OPPOSITES[stated.relation]
                assert relation == example.facts.relation, caption


def test_held_out_words_stay_unseen():
    for split in ("train", "held_out"):
        world = WordsWorld(split=split)
        for index in range(200):
            facts = world.example(index).facts
            assert is_held_out_word(facts.word) == (split == "held_out")
            assert 1 <= len(facts.word) <= 4
            assert parse_caption(world.example(index).captions[0]).word == facts.word


@needs_font
def test_held_out_emoji_combinations_stay_unseen():
    for index in range(100):
        one = EmojiWorld().example(index, category="emoji").facts
        assert one.ground != held_out_ground(one.objects[0].name)
        two = EmojiWorld(split="held_out").example(index, category="emoji_pair").facts
        assert is_held_out_pair(*(o.name for o in two.objects))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="train, held_out"):
        ShapesWorld(split="test")
    with pytest.raises(ValueError, match="single, count"):
        ShapesWorld().example(0, category="many")


def test_a_missing_font_names_the_install_line(monkeypatch):
    monkeypatch.setattr("unimm.scorers.glyphs.KNOWN_PLACES", ())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji"):
        find_font()


def test_what_is_named_first_stands_first_where_no_relation_is_stated():
    world = WORLDS["shapes"](seed=4)
    for index in range(40):
        facts = world.example(index, category="binding").facts
        (x0, y0), (x1, y1) = (thing.centre for thing in facts.objects)
        assert facts.relation is None
        assert (y0, x0) < (y1, x1)


def test_two_shapes_are_described_in_reading_order_whatever_the_caption_says():
    for index in range(80):
        example = ShapesWorld(seed=6).example(index, category=("position", "binding")[index % 2])
        stated = parse_caption(example.description)
        (first, second) = example.facts.in_reading_order()
        assert [thing.phrase for thing in stated.objects] == [first.phrase, second.phrase]
        assert stated.relation == ("left of" if first.centre[1] == second.centre[1] else "above")
