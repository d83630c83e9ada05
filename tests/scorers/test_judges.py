"""The judges on ground truth, on other prompts, and on nothing."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import needs_font
from PIL import Image, ImageDraw, ImageFilter

from unimm.data.worlds import EmojiWorld, ShapesWorld, WordsWorld
from unimm.scorers.emoji import SINGLE_SIZE, EmojiJudge
from unimm.scorers.facts import SceneFacts
from unimm.scorers.glyphs import catalog, world_glyphs
from unimm.scorers.scene import NO_SHAPE, find_objects, verify_scene
from unimm.scorers.word import read_word

NUMBER = 200


@pytest.fixture(scope="module", params=["train", "held_out"])
def scenes(request):
    world = ShapesWorld(split=request.param, seed=5)
    return [world.example(index) for index in range(NUMBER)]


def test_ground_truth_is_accepted_sharp_and_soft(scenes):
    assert all(verify_scene(example.image, example.facts).exact for example in scenes)
    soft = [verify_scene(e.image.filter(ImageFilter.GaussianBlur(0.7)), e.facts).exact for e in scenes]
    assert np.mean(soft) > 0.95


def test_other_pictures_are_refused(scenes):
    pairs = list(pairwise(scenes))
    accepted = [verify_scene(image.image, other.facts).exact for image, other in pairs]
    assert np.mean(accepted) < 0.05


def test_swapped_colours_are_refused():
    example = ShapesWorld(seed=3).example(0, category="binding")
    one, other = example.facts.objects
    swapped = (
        type(one)(one.name, other.colour, one.centre, one.size),
        type(one)(other.name, one.colour, other.centre, one.size),
    )
    verdict = verify_scene(example.image, SceneFacts(swapped))
    assert verdict.shapes
    assert not verdict.binding


def test_blank_and_noise_show_nothing():
    blank = Image.new("RGB", (128, 128), "white")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    one = ShapesWorld().example(0, category="single").facts.objects[0]
    facts = SceneFacts((type(one)("square", "gray", one.centre, one.size),))
    assert find_objects(blank) == find_objects(noise) == []
    assert read_word(blank) is None
    assert not verify_scene(blank, facts).exact
    assert not verify_scene(noise, facts).exact


def test_a_patchwork_whose_median_is_the_ground_is_a_blob():
    pixels = np.full((128, 128, 3), 255, dtype=np.uint8)
    for place, colour in enumerate([(255, 255, 0), (255, 0, 255), (0, 255, 255)]):
        pixels[40:80, 30 + 20 * place : 50 + 20 * place] = colour
    assert [thing.shape for thing in find_objects(Image.fromarray(pixels))] == [NO_SHAPE]


def test_words_are_read_back():
    world = WordsWorld(split="held_out", seed=5)
    examples = [world.example(index) for index in range(NUMBER)]
    assert [read_word(e.image) for e in examples] == [e.facts.word for e in examples]


@needs_font
def test_emoji_are_named():
    judge = EmojiJudge(catalog(), world_glyphs(), glyph_size=SINGLE_SIZE, picture_size=128)
    world = EmojiWorld(split="held_out", seed=5)
    examples = [world.example(index, category="emoji") for index in range(60)]
    assert [judge.name(e.image) for e in examples] == [e.facts.objects[0].name for e in examples]


def test_a_blob_has_no_shape():
    blob = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(blob)
    pen.ellipse((30, 50, 80, 100), fill="purple")
    pen.ellipse((60, 30, 105, 75), fill="purple")
    assert [found.shape for found in find_objects(blob)] == ["blob"]
