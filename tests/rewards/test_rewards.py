"""Every reward on ground truth, on other prompts, on nothing and on spam."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import needs_font
from PIL import Image, ImageDraw
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from unimm.data.worlds import EmojiWorld, ShapesWorld, WordsWorld
from unimm.data.worlds.shapes import render
from unimm.rewards import REWARDS, Drawing, Reward, RewardMixture, alignment
from unimm.rewards.scene import scene_parts
from unimm.rewards.word import edit_distance
from unimm.scorers.facts import SceneFacts
from unimm.scorers.letters import CELL_HEIGHT

BLANK = Image.new("RGB", (128, 128), "white")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
SHAPES = ("scene", "scene_exact")
WORDS = ("word", "word_exact", "ink")


def examples(name, number=40):
    if name in SHAPES:
        world = ShapesWorld(seed=7)
        return [world.example(index) for index in range(number)]
    world, category = (WordsWorld(seed=7), "word") if name in WORDS else (EmojiWorld(seed=7), "emoji")
    return [world.example(index, category=category) for index in range(number)]


def drawing(image, facts):
    return Drawing(image, "a request", facts)


@pytest.fixture(params=[pytest.param(name, marks=needs_font if name == "emoji" else ()) for name in REWARDS])
def reward(request):
    return REWARDS[request.param]


def test_ground_truth_gets_full_marks(reward):
    assert reward([drawing(e.image, e.facts) for e in examples(reward.name)]) == [reward.high] * 40


def test_other_pictures_get_less(reward):
    shown = examples(reward.name)
    swapped = reward([drawing(a.image, b.facts) for a, b in pairwise(shown)])
    assert np.mean(swapped) < 0.7 * reward.high


def test_nothing_and_noise_get_nothing(reward):
    facts = [example.facts for example in examples(reward.name)]
    for image in (None, BLANK):
        scores = reward([drawing(image, f) for f in facts])
        assert np.mean(scores) <= (0.1 if reward.name == "emoji" and image else reward.low)
    assert np.mean(reward([drawing(NOISE, f) for f in facts])) <= 0.1


def test_what_does_not_apply_gets_none(reward):
    other = ShapesWorld().example(0) if reward.name not in SHAPES else WordsWorld().example(0)
    assert reward([drawing(other.image, other.facts)]) == [None]


@needs_font
def test_pairs_of_emoji_are_judged_by_none():
    example = EmojiWorld().example(0, category="emoji_pair")
    assert all(reward([drawing(example.image, example.facts)]) == [None] for reward in REWARDS.values())


def test_a_scene_earns_marks_part_by_part():
    example = ShapesWorld(seed=3).example(0, category="position")
    one, other = example.facts.objects
    first_only = render(SceneFacts((one,), ground=example.facts.ground))
    turned = render(
        SceneFacts(
            (
                type(one)(one.name, one.colour, other.centre, one.size),
                type(one)(other.name, other.colour, one.centre, one.size),
            ),
            ground=example.facts.ground,
        )
    )
    assert scene_parts(first_only, example.facts) == {"count": 0.5, "shapes": 0.5, "binding": 0.5, "relation": 0}
    assert scene_parts(turned, example.facts) == {"count": 1, "shapes": 1, "binding": 1, "relation": 0}
    marks = [REWARDS["scene"]([drawing(image, example.facts)])[0] for image in (first_only, turned, example.image)]
    assert marks == [0.375, 0.75, 1.0]


def test_a_picture_full_of_shapes_earns_less_than_the_shape_alone():
    single = ShapesWorld(seed=3).example(0, category="single")
    crowd = ShapesWorld(seed=3).example(0, category="count")
    wanted = SceneFacts((crowd.facts.objects[0],))
    assert len(crowd.facts.objects) > 1
    crowded = REWARDS["scene"]([drawing(crowd.image, wanted)])[0]
    assert crowded <= 2 / 3
    assert REWARDS["scene"]([drawing(single.image, single.facts)]) == [1.0]


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("CAKE", "CAKE", 0), ("CAKE", "", 4), ("CAKE", "LAKES", 2), ("AB", "BA", 2)],
)
def test_edit_distance(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_a_wrong_letter_costs_its_share():
    shown, asked = (WordsWorld(seed=1).example(i) for i in (0, 1))
    facts = shown.facts
    near = SceneFacts(word=("A" if facts.word[0] != "A" else "E") + facts.word[1:], ink=facts.ink)
    assert REWARDS["word"]([drawing(shown.image, near)]) == [pytest.approx(1 - 1 / len(facts.word))]
    assert REWARDS["word_exact"]([drawing(shown.image, near)]) == [0.0]
    assert asked.facts != facts


def test_a_word_among_other_ink_earns_nothing():
    world = WordsWorld(seed=1)
    example = next(e for e in map(world.example, range(50)) if len(e.facts.word) == 4)
    spam = example.image.copy()
    ImageDraw.Draw(spam).rectangle((10, 100, 118, 100 + CELL_HEIGHT // 4), fill="black")
    assert REWARDS["word"]([drawing(spam, example.facts)]) == [0.0]
    assert REWARDS["word"]([drawing(example.image, example.facts)]) == [1.0]


def test_a_score_outside_its_range_is_our_mistake():
    broken = Reward("broken", 0.0, 1.0, lambda facts: True, lambda images, drawings: [2.0])
    with pytest.raises(AssertionError, match="broken"):
        broken([drawing(BLANK, SceneFacts())])


def test_a_mixture_weighs_what_applies_on_its_own_range():
    signed = Reward("signed", -1.0, 1.0, lambda facts: True, lambda images, drawings: [0.0] * len(images))
    mixture = RewardMixture.choose({"scene": 3.0, "word": 2.0, "signed": 1.0}, REWARDS | {"signed": signed})
    shape, word = ShapesWorld().example(0), WordsWorld().example(0)
    drawings = [drawing(shape.image, shape.facts), drawing(None, word.facts)]
    assert mixture.scores(drawings) == {"scene": [1.0, None], "word": [None, 0.0], "signed": [0.0, -1.0]}
    assert mixture.total(drawings) == [pytest.approx((3 * 1.0 + 1 * 0.5) / 4), 0.0]
    assert RewardMixture.choose({"word": 1.0}, REWARDS).total(drawings[:1]) == [None]


@pytest.mark.parametrize("weights", [{}, {"scene": 0.0}, {"scene": -1.0, "word": 2.0}, {"beauty": 1.0}])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="some of scene"):
        RewardMixture.choose(weights, REWARDS)


@pytest.fixture(scope="module")
def clip(tokenizer):
    """A random CLIP of a few thousand weights, with its processor on Pillow."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = copy.deepcopy(tokenizer)
    eos = (words.eos_token, words.eos_token_id)
    words.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
    words.padding_side = "right"  # as CLIP's own
    text = {"vocab_size": len(words), "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": eos[1]}
    vision = {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=16)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config), CLIPProcessor(image_processor, words)


def test_alignment_is_the_cosine_of_the_two_embeddings(clip):
    model, processor = clip
    shown = [ShapesWorld(seed=2).example(index) for index in range(3)]
    drawings = [Drawing(e.image, e.captions[0], e.facts) for e in shown]
    scores = alignment(model, processor)(drawings)
    for score, example in zip(scores, shown, strict=True):
        # One at a time and without padding.
        inputs = processor(text=[example.captions[0]], images=[example.image], return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        assert score == pytest.approx(float((output.image_embeds * output.text_embeds).sum()), abs=1e-5)
    assert len(set(scores)) == 3
    assert alignment(model, processor)([Drawing(None, "a", SceneFacts())]) == [-1.0]
