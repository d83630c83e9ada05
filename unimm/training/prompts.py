"""What the preference stages (GRPO, DPO) draw and judge: prompts in, drawings and their rewards out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from PIL import Image

from unimm.codes import VisualCodes
from unimm.data.conversations import Message, drawing_request
from unimm.data.pictures import to_pictures
from unimm.data.worlds import WORLDS
from unimm.pipelines import UniMM
from unimm.rewards import (
    REWARDS,
    RewardMixture,
    load_aesthetic,
    load_alignment,
    load_ocr,
    load_self_vqascore,
    remote,
)
from unimm.scorers.facts import SceneFacts
from unimm.sequence import ImagePart
from unimm.training.begin import SamplingConfig
from unimm.training.loop import ON_CPU
from unimm.unified import UniMMForConditionalGeneration

DECODE_BATCH = 64
LOADED = ("alignment", "aesthetic", "remote", "ocr", "self_vqascore")  # rewards that are not there without more
QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')  # in straight double quotes, or curly ones


@dataclass(frozen=True)
class PromptsConfig:
    """What is asked for: categories of the worlds from the training split, or prompts of a data set.

    Args:
        categories: of the worlds, with their shares.
        source: Hub name, folder or file that `datasets` reads, with its prompts in `column`.
        text_column: of the source, what is to be written in the picture, for `ocr`; null or empty where nothing is.
            Without it that is what the prompt has in double quotes.
        seed: of the order.

    Raises:
        ValueError: neither categories nor source, or both, or a text column without source.
    """

    categories: dict[str, float] = field(default_factory=dict)
    source: str | None = None
    column: str = "prompt"
    text_column: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.categories) == bool(self.source):
            raise ValueError(
                f"prompts.categories are {self.categories} and prompts.source is {self.source!r}; give positive "
                f"weights to some of {', '.join(homes())}, or name a data set."
            )
        if self.text_column is not None and self.source is None:
            raise ValueError(
                f"prompts.text_column is {self.text_column!r} without prompts.source; the worlds know their own words, "
                "drop it."
            )


@dataclass(frozen=True)
class Drawn:
    """Pictures that a model drew, one per prompt.

    Args:
        prompt_ids: ids of each prompt, its opening of a picture included.
        completion_ids: what was drawn, the end of the picture included.
        ids: the same as one block `[B, C]`.
        log_probs: of the drawn ids under the distribution that they were sampled from, where they were asked for.
        pictures: None where a picture is not whole.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    ids: torch.Tensor
    log_probs: list[list[float]] | None
    pictures: list[Image.Image | None]


@torch.no_grad()
def draw(
    model: UniMMForConditionalGeneration,
    front: UniMM,
    prompts: Sequence[list[Message]],
    sampling: SamplingConfig,
    *,
    seed: int,
    log_probs: bool = False,
) -> Drawn:
    """One picture for each prompt, all as one batch.

    Args:
        model: that of `front`, perhaps with an adapter around it.
        front: the model with its processor and, for codecs that make no pixels, its detokenizer.
        prompts: of one turn each.
        sampling: of the codes.
        seed: of the detokenizer's noise.
        log_probs: return those of the codes.
    """
    processor = front.processor
    encoded = processor.drawing_inputs([prompt[-1]["content"] for prompt in prompts]).to(model.device)
    vocabulary, grammar = processor.vocabulary, processor.grammar
    opening = front.model.picture_opening()
    training = model.training
    model.eval()
    output = model.generate(
        **encoded,
        generation_mode="image",
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        min_p=0.0,  # None would be filled in from the model, and what it cuts is not scored
        guidance_scale=sampling.guidance_scale,
        guidance_interval=sampling.guidance_interval,
        max_new_tokens=grammar.longest,
        return_dict_in_generate=True,
        output_scores=log_probs,
    )
    model.train(training)
    drawn = output.sequences[:, encoded["input_ids"].shape[1] + len(opening) :]
    lengths = ((drawn == vocabulary.eoi_token_id).int().argmax(dim=1) + 1).tolist()
    completions = [row[:length] for row, length in zip(drawn.tolist(), lengths, strict=True)]
    taken = None
    if log_probs:
        steps = [scores.float().log_softmax(dim=1) for scores in output.scores]
        chosen = torch.stack([s.gather(1, drawn[:, i, None])[:, 0] for i, s in enumerate(steps)], dim=1)
        taken = [row[:length] for row, length in zip(chosen.tolist(), lengths, strict=True)]
    parts = [processor.parse([*opening, *row])[0] for row in completions]
    return Drawn(
        prompt_ids=[
            [*ids[mask.bool()].tolist(), *opening]
            for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        ],
        completion_ids=completions,
        ids=drawn,
        log_probs=taken,
        pictures=paint(front, parts, seed),
    )


@dataclass(frozen=True)
class JudgesConfig:
    """Where the rewards that judge by a model are found; each is needed by the reward of its name only.

    Args:
        aesthetic: folder or Hub name of an image classifier with one output or a label `aesthetic`.
        remote: address of a server; see `unimm.rewards.remote`.
    """

    aesthetic: str | None = None
    remote: str | None = None


def choose_rewards(
    weights: dict[str, float], alignment_model: str | None, judges: JudgesConfig, init_from: str
) -> RewardMixture:
    """The rewards of a recipe.

    Args:
        weights: of rewards of `unimm.rewards`, by name.
        alignment_model: folder or Hub name of a CLIP-like model, which judges `alignment`.
        judges: of `aesthetic` and `remote`.
        init_from: the saved model whose reading judges `self_vqascore`.

    Raises:
        ValueError: an unknown name, a reward without its judge, or no positive weight.
    """
    names = [*REWARDS, *LOADED]
    if not weights.keys() <= set(names):
        raise ValueError(f"rewards are {weights}; give positive weights to some of {', '.join(names)}.")
    device = PartialState(cpu=ON_CPU).device
    known = dict(REWARDS)
    if alignment_model is not None:
        known["alignment"] = load_alignment(alignment_model, device)
    if judges.aesthetic is not None:
        known["aesthetic"] = load_aesthetic(judges.aesthetic, device)
    if judges.remote is not None:
        known["remote"] = remote(judges.remote)
    if "ocr" in weights:
        known["ocr"] = load_ocr()
    if "self_vqascore" in weights:
        known["self_vqascore"] = load_self_vqascore(init_from, device)
    for name, key in (("alignment", "alignment_model"), ("aesthetic", "judges.aesthetic"), ("remote", "judges.remote")):
        if name in weights and name not in known:
            raise ValueError(f"rewards names {name!r} without its judge; set {key}.")
    return RewardMixture.choose(weights, known)


def make_prompts(config: PromptsConfig, number: int) -> Dataset:
    """Requests and the facts of what they ask for; item i is a pure function of the seed and i.

    Raises:
        ValueError: no weight, an unknown category, or a source without prompts.
    """
    if config.source is not None:
        return read_prompts(config, config.source, number)
    home = homes()
    if not home.keys() >= config.categories.keys() or sum(config.categories.values()) <= 0:
        raise ValueError(
            f"prompts.categories are {config.categories}; give positive weights to some of {', '.join(home)}."
        )
    names = list(config.categories)
    shares = np.array(list(config.categories.values())) / sum(config.categories.values())
    worlds = {world: WORLDS[world](split="train", seed=config.seed) for world in {home[name] for name in names}}
    rows = []
    for index in range(number):
        rng = np.random.default_rng([config.seed, 2, index])
        category = names[rng.choice(len(names), p=shares)]
        example = worlds[home[category]].example(index, category=category)
        caption = example.captions[rng.integers(len(example.captions))]
        prompt = [{"role": "user", "content": drawing_request(caption, rng)}]
        rows.append({"prompt": prompt, "facts": example.facts.to_json()})
    return Dataset.from_list(rows)


def homes() -> dict[str, str]:
    """Categories to the worlds that they belong to."""
    return {category: world for world, kind in WORLDS.items() for category in kind.categories}


def read_prompts(config: PromptsConfig, source: str, number: int) -> Dataset:
    """`number` prompts of a data set in a shuffled order, over and over; of what they ask for, judges know the words
    that are to be written.

    Raises:
        ValueError: no such column, no row, a prompt that is no text, or not one word in the text column.
    """
    path = Path(source)
    try:
        if path.is_file():
            found = load_dataset(str(path.parent.resolve()), data_files=path.name, split="train")
        else:
            found = load_dataset(source, split="train")
    except ValueError as error:
        raise ValueError(
            f"{source} has no rows to read ({error}); prompts.column is {config.column!r}, so name a data set with "
            "prompts there in its train split."
        ) from error
    for key, column in (("column", config.column), ("text_column", config.text_column)):
        if column is not None and (column not in found.column_names or not len(found)):
            raise ValueError(
                f"{source} has {len(found)} rows of {', '.join(found.column_names)}; prompts.{key} is {column!r}."
            )
    found = found.shuffle(seed=config.seed)
    prompts = found[config.column]
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(
            f"{source} has {wrong[0]!r} among its prompts; prompts.column is {config.column!r}, name a column of text."
        )
    if config.text_column is None:
        texts = [" ".join(a or b for a, b in QUOTED.findall(prompt)) for prompt in prompts]
    else:
        texts = ["" if text is None else str(text).strip() for text in found[config.text_column]]
        if not any(texts):
            raise ValueError(
                f"{source} has no word in {config.text_column!r}, which is prompts.text_column; name the column of "
                "what is to be written, or drop it."
            )
    facts = [SceneFacts(word=text or None).to_json() for text in texts]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": prompts[place]}], "facts": facts[place]}
            for place in (index % len(facts) for index in range(number))
        ]
    )


def check_judged(prompts: Dataset, rewards: RewardMixture) -> None:
    """Raise `ValueError` where no reward can judge a drawing of any of these prompts."""
    known = {SceneFacts.from_json(text) for text in set(prompts["facts"])}
    if not any(reward.applies(facts) for facts in known for reward in rewards.rewards.values()):
        raise ValueError(
            f"rewards are {', '.join(rewards.rewards)}, and none of them judges one of the {len(prompts)} prompts; "
            "name one that judges any picture (alignment, aesthetic, self_vqascore, remote), or for ocr a "
            "prompts.text_column, or prompts with what is to be written in double quotes."
        )


@torch.no_grad()
def paint(front: UniMM, parts: Sequence[Any], seed: int) -> list[Image.Image | None]:
    """Pictures by the codec's decoder, those of one grid together, or by the detokenizer where that makes no pixels.

    None stands where a part is no whole picture.
    """
    codec = front.model.codec
    pictures: list[Image.Image | None] = [None] * len(parts)
    whole = [place for place, part in enumerate(parts) if isinstance(part, ImagePart) and part.complete]
    if not codec.config.draws_pixels:
        drawn = front.decode([parts[place].codes for place in whole], seed=seed)
        for place, painted in zip(whole, drawn, strict=True):
            pictures[place] = painted.image
        return pictures
    by_grid: dict[Any, list[int]] = {}
    for place in whole:
        codes = parts[place].codes
        by_grid.setdefault((codes.ids.shape[1], tuple(codes.grid or ())), []).append(place)
    for places in by_grid.values():
        for start in range(0, len(places), DECODE_BATCH):
            batch = places[start : start + DECODE_BATCH]
            codes = [parts[place].codes for place in batch]
            grids = [grid for single in codes for grid in single.grid or ()] or None
            ids, mask = torch.cat([single.ids for single in codes]), torch.cat([single.mask for single in codes])
            decoded = to_pictures(codec.pictures(VisualCodes(ids, mask, grids).to(codec.device)))
            for place, picture in zip(batch, decoded, strict=True):
                pictures[place] = picture
    return pictures
