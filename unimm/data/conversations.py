"""From what a picture shows to what people say about it: chat messages for drawing, reading and both in one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Message = dict[str, Any]
PICTURE = {"type": "image"}

DRAW_PHRASES = ("{}", "{}", "{}", "draw {}", "please draw {}", "show me {}", "draw a picture of {}")
DESCRIBE_PHRASES = ("describe the picture", "what is in the picture?", "describe this image", "what do you see?")
SHOW_PHRASES = ("show me {} and say what it is", "draw {} and describe it", "can you draw {} and tell me about it?")
MAX_QUESTIONS = 3


@dataclass(frozen=True)
class TaskRates:
    """How often what is asked.

    Args:
        draw, read, show: shares of the tasks.
        null_prompt: drawing requests whose text is dropped, so that guidance has something to lean on.
        copied: pictures to read that are copies from the codec, as the model's own drawings are.

    Raises:
        ValueError: shares below 0, or none above it.
    """

    draw: float = 0.55
    read: float = 0.4
    show: float = 0.05
    null_prompt: float = 0.1
    copied: float = 0.5

    def __post_init__(self) -> None:
        shares = (self.draw, self.read, self.show)
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(
                f"tasks have draw {self.draw}, read {self.read} and show {self.show}; give shares of 0 or more, one of "
                "them above."
            )


@dataclass(frozen=True)
class PictureTexts:
    """What is said about one picture.

    Args:
        description: what a reader should say.
        captions: what people may ask for who want it drawn.
        questions: (question, answer) pairs.
    """

    description: str
    captions: Sequence[str]
    questions: Sequence[tuple[str, str]]


def converse(texts: PictureTexts, rates: TaskRates, rng: np.random.Generator) -> list[Message]:
    """Messages about one picture, of a task drawn at random.

    Args:
        texts: what there is to say; a picture without captions can only be drawn, from an empty request.
        rates: shares of the tasks.
        rng: decides the task and the words.
    """
    if not texts.captions:
        return [_user(""), _assistant([PICTURE])]
    weights = np.array([rates.draw, rates.read, rates.show])
    task = (_draw, _read, _show)[rng.choice(3, p=weights / weights.sum())]
    return task(texts, rates, rng)


def drawing_request(caption: str, rng: np.random.Generator) -> str:
    return _pick(DRAW_PHRASES, rng).format(caption)


def _draw(texts: PictureTexts, rates: TaskRates, rng: np.random.Generator) -> list[Message]:
    if rng.random() < rates.null_prompt:
        return [_user(""), _assistant([PICTURE])]
    return [_user(drawing_request(_pick(texts.captions, rng), rng)), _assistant([PICTURE])]


def _read(texts: PictureTexts, rates: TaskRates, rng: np.random.Generator) -> list[Message]:
    """One picture, then its description and several questions in any order, so that its codes are paid for once."""
    asked = [texts.questions[index] for index in rng.permutation(len(texts.questions))[:MAX_QUESTIONS]]
    turns = [(_pick(DESCRIBE_PHRASES, rng), texts.description), *asked]
    order = rng.permutation(len(turns))
    messages: list[Message] = []
    for place, index in enumerate(order):
        question, answer = turns[index]
        text = {"type": "text", "text": question}
        messages += [_user([PICTURE, text] if place == 0 else [text]), _assistant(answer)]
    return messages


def _show(texts: PictureTexts, rates: TaskRates, rng: np.random.Generator) -> list[Message]:
    """Text, a picture and text in one answer, then a question about what was drawn where there is any."""
    answer = [
        {"type": "text", "text": "here you are: "},
        PICTURE,
        {"type": "text", "text": f"this is {texts.description}."},
    ]
    questions = texts.questions
    turns = [questions[int(rng.integers(len(questions)))]] if questions else []
    request = _pick(SHOW_PHRASES, rng).format(_pick(texts.captions, rng))
    messages = [_user(request), _assistant(answer)]
    for question, reply in turns:
        messages += [_user(question), _assistant(reply)]
    return messages


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> Message:
    return {"role": "assistant", "content": content}
