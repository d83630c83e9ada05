"""The tiny benchmark: drawing and reading on combinations that training never shows, judged from pixels and words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.data.worlds import WORLDS, Example, parse_caption
from unimm.evaluation.report import Figure, Report
from unimm.evaluation.sheet import verdict_sheet
from unimm.pipelines import Reply, UniMM
from unimm.rewards import REWARDS, Drawing, RewardMixture
from unimm.scorers.emoji import emoji_judge
from unimm.scorers.facts import SceneFacts
from unimm.scorers.reconstruction import psnr
from unimm.scorers.scene import stands, verify_scene
from unimm.scorers.word import read_word

SEED = 1234
BATCH = 50
NUM_WELL_FORMED = 1_000
# Chooses one of several drawings. It is graded where the judge is not, but reads the same pixels for the same facts.
CHOICE = RewardMixture.choose({"scene": 1.0, "emoji": 1.0, "word": 1.0, "ink": 0.25}, REWARDS)

PictureJudge = Callable[[Image.Image, SceneFacts], bool]


@dataclass(frozen=True)
class DrawingTask:
    """Prompts of one category of a world and the judge of what is drawn."""

    name: str
    world: str
    category: str
    target: float
    judge: PictureJudge


@dataclass(frozen=True)
class ReadingTask:
    """Questions about pictures of a world. `question` of an example gives (question, accepted answer) or None."""

    name: str
    world: str
    category: str
    target: float
    question: Callable[[Example], tuple[str, str]]
    judge: Callable[[str, str, SceneFacts], bool]


def _one_shape(image: Image.Image, facts: SceneFacts) -> bool:
    verdict = verify_scene(image, facts)
    return verdict.count and verdict.shapes


def _related(image: Image.Image, facts: SceneFacts) -> bool:
    verdict = verify_scene(image, facts)
    return verdict.shapes and verdict.relation


DRAWING = (
    DrawingTask("single", "shapes", "single", 0.95, _one_shape),
    DrawingTask("colour", "shapes", "single", 0.95, lambda image, facts: verify_scene(image, facts).exact),
    DrawingTask("count", "shapes", "count", 0.80, lambda image, facts: verify_scene(image, facts).exact),
    DrawingTask("position", "shapes", "position", 0.85, _related),
    DrawingTask("binding", "shapes", "binding", 0.75, lambda image, facts: verify_scene(image, facts).exact),
    DrawingTask(
        "emoji", "emoji", "emoji", 0.80, lambda image, facts: emoji_judge().name(image) == facts.objects[0].name
    ),
    DrawingTask("word", "words", "word", 0.60, lambda image, facts: read_word(image) == facts.word),
)


def _equal(answer: str, expected: str, facts: SceneFacts) -> bool:
    return answer.strip().strip('."').lower() == expected.lower()


def _states_facts(answer: str, expected: str, facts: SceneFacts) -> bool:
    """Whether a caption names exactly the objects of the picture, and no false relation."""
    stated = parse_caption(answer)
    if stated is None:
        return False
    named = sorted((thing.name, thing.colour or "") for thing in stated.objects)
    if named != sorted((thing.name, thing.colour or "") for thing in facts.objects):
        return False
    places = {(thing.name, thing.colour): thing.centre for thing in facts.objects}
    if stated.relation is None:
        return True
    one, other = (places[thing.name, thing.colour] for thing in stated.objects)
    return stands(one, other, stated.relation)


def _ask(words: str) -> Callable[[Example], tuple[str, str]]:
    """The first question of an example that begins with `words`."""
    return lambda example: next(pair for pair in example.questions if pair[0].startswith(words))


READING = (
    ReadingTask(
        "caption facts",
        "shapes",
        "position",
        0.95,
        lambda example: ("describe the picture", example.description),
        _states_facts,
    ),
    ReadingTask("count", "shapes", "count", 0.95, _ask("how many"), _equal),
    ReadingTask("colour", "shapes", "single", 0.98, _ask("what color"), _equal),
    ReadingTask("word", "words", "word", 0.90, _ask("what does it say"), _equal),
    ReadingTask("emoji name", "emoji", "emoji", 0.85, _ask("what emoji"), _equal),
)


def evaluate_tiny(
    model: UniMM,
    *,
    command: str,
    limit: int = 200,
    folder: Path | None = None,
    temperature: float | None = None,
    best_of: int = 1,
) -> Report:
    """Measure everything.

    Args:
        model: to be judged.
        command: recorded in the report.
        limit: trials per category.
        folder: where the report and a sheet of drawings go; None writes nothing.
        temperature: of what is drawn for the figures of drawing; None takes the model's own.
        best_of: drawings per prompt, of which the one with the highest reward is judged. The reward is told the facts
            of the prompt, as the judge is, so that more than one measures what rejection could reach at best, a
            control for reinforcement learning, and no model that only sees the prompt.

    Raises:
        ValueError: fewer than one drawing per prompt.
    """
    if best_of < 1:
        raise ValueError(f"best_of is {best_of}; draw 1 picture per prompt, or more to choose from.")
    figures = codec_figures(model, limit)
    drawn: dict[str, list[tuple[Image.Image, str, bool]]] = {}
    for drawing in DRAWING:
        figure, drawn[drawing.name] = measure_drawing(model, drawing, limit, temperature=temperature, best_of=best_of)
        figures.append(figure)
    figures += [measure_reading(model, reading, limit) for reading in READING]
    figures.append(measure_reading(model, READING[0], limit, copies=True))  # what the model drew is such a copy
    figures.append(well_formed(model, NUM_WELL_FORMED * limit // 200))
    report = Report(command, tuple(figures))
    if folder is not None:
        report.save(folder)
        verdict_sheet(drawn, folder / "drawings.png")
    return report


def held_out(world: str, category: str, number: int) -> list[Example]:
    """Examples of a category that training never shows."""
    source = WORLDS[world](split="held_out", seed=SEED)
    return [source.example(index, category=category) for index in range(number)]


def round_trip(model: UniMM, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, their reconstructions, and their codes `[B N, K]`."""
    pixels = to_pixel_values(np.stack([np.asarray(image) for image in images]))
    codec, decoded, used = model.model.codec, [], []
    for batch in pixels.split(BATCH):
        codes = codec.encode(batch.to(codec.device))
        used.append(codes.ids.flatten(0, 1))
        decoded.append(codec.pictures(codes).cpu())
    return pixels, torch.cat(decoded), torch.cat(used)


def codec_figures(model: UniMM, limit: int) -> list[Figure]:
    """PSNR on unseen scenes, and the share of the codebook that unseen scenes of all worlds use."""
    figures, used = [], []
    for world, target in (("shapes", 30.0), ("emoji", 24.0), ("words", 24.0)):
        source = WORLDS[world](split="held_out", seed=SEED)
        images = [source.example(index).image for index in range(2 * limit)]
        pixels, decoded, codes = round_trip(model, images)
        used.append(codes)
        if world != "words":
            value = float(psnr(decoded, pixels).mean())
            figures.append(Figure("codec", f"PSNR, {world}", value, len(images), target, unit="dB"))
    share = model.model.codec.spec_without_fingerprint.share_used(torch.cat(used))
    return [*figures, Figure("codec", "codes used", 100 * share, 6 * limit, 60.0, unit="%")]


def measure_drawing(
    model: UniMM, task: DrawingTask, limit: int, *, temperature: float | None = None, best_of: int = 1
) -> tuple[Figure, list[tuple[Image.Image, str, bool]]]:
    """The share of drawings that the judge accepts, and the drawings."""
    examples = held_out(task.world, task.category, limit)
    drawn: list[Image.Image] = []
    batch = max(1, BATCH // best_of)
    for start in tqdm(range(0, limit, batch), desc=f"drawing {task.name}", leave=False):
        asked = examples[start : start + batch]
        prompts = [example.captions[0] for example in asked]
        replies = model.generate(prompts, n=best_of, seed=SEED + start, temperature=temperature)
        drawn += [
            choose(replies[place * best_of : (place + 1) * best_of], example) for place, example in enumerate(asked)
        ]
    right = [task.judge(image, example.facts) for image, example in zip(drawn, examples, strict=True)]
    copies = to_pictures(round_trip(model, [example.image for example in examples])[1])
    ceiling = np.mean([task.judge(image, example.facts) for image, example in zip(copies, examples, strict=True)])
    figure = Figure("drawing", task.name, float(np.mean(right)), limit, task.target, float(ceiling))
    captions = [example.captions[0] for example in examples]
    return figure, list(zip(drawn, captions, right, strict=True))


def choose(replies: Sequence[Reply], example: Example) -> Image.Image:
    """The drawing with the highest reward for what was asked, the first of them where several have it."""
    images = [reply.images[0] for reply in replies]
    if len(images) == 1:
        return images[0]
    rewards = CHOICE.total([Drawing(image, example.captions[0], example.facts) for image in images])
    return images[max(range(len(images)), key=lambda place: rewards[place] or 0.0)]


def measure_reading(model: UniMM, task: ReadingTask, limit: int, *, copies: bool = False) -> Figure:
    """The share of answers that the judge accepts, about pictures or about their copies from the codec."""
    examples = held_out(task.world, task.category, limit)
    asked = [task.question(example) for example in examples]
    images = [example.image for example in examples]
    if copies:
        images = to_pictures(round_trip(model, images)[1])
    right: list[bool] = []
    for start in tqdm(range(0, limit, BATCH), desc=f"reading {task.name}", leave=False):
        batch = slice(start, start + BATCH)
        replies = model.understand(images[batch], [question for question, _ in asked[batch]])
        right += [
            task.judge(reply.text, expected, example.facts)
            for reply, (_, expected), example in zip(replies, asked[batch], examples[batch], strict=True)
        ]
    name = f"{task.name} of copies" if copies else task.name
    return Figure("reading", name, float(np.mean(right)), limit, task.target)


def well_formed(model: UniMM, number: int) -> Figure:
    """The share of sampled answers to drawing requests that are one whole picture, opened by the model itself."""
    source = WORLDS["shapes"](split="held_out", seed=SEED)
    right = 0
    for start in tqdm(range(0, number, BATCH), desc="well-formed answers", leave=False):
        prompts = [f"draw {source.example(i).captions[0]}" for i in range(start, min(start + BATCH, number))]
        replies = model.answer(prompts, seed=SEED + start)
        right += sum(len(reply.images) == 1 for reply in replies)
    return Figure("grammar", "answers that are one whole picture", right / number, number, 1.0)
