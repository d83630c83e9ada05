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
    """Shares of the tasks, and of drawing requests whose text is dropped so that guidance has something to lean on."""

    draw: float = 0.55
    read: float = 0.4
    show: float = 0.05
    null_prompt: float = 0.1


def converse(
    captions: Sequence[str], questions: Sequence[tuple[str, str]], rates: TaskRates, rng: np.random.Generator
) -> list[Message]:
    """Messages about one picture, of a task drawn at random.

    Args:
        captions: phrasings, the canonical one first; a picture without any can only be drawn, from an empty request.
        questions: (question, answer) pairs.
        rates: shares of the tasks.
        rng: decides the task and the words.
    """
    if not captions:
        return [_user(""), _assistant([PICTURE])]
    weights = np.array([rates.draw, rates.read, rates.show])
    task = (_draw, _read, _show)[rng.choice(3, p=weights / weights.sum())]
    return task(captions, questions, rates, rng)


def drawing_request(caption: str, rng: np.random.Generator) -> str:
    return _pick(DRAW_PHRASES, rng).format(caption)


def _draw(
    captions: Sequence[str], questions: Sequence[tuple[str, str]], rates: TaskRates, rng: np.random.Generator
) -> list[Message]:
    if rng.random() < rates.null_prompt:
        return [_user(""), _assistant([PICTURE])]
    return [_user(drawing_request(_pick(captions, rng), rng)), _assistant([PICTURE])]


def _read(
    captions: Sequence[str], questions: Sequence[tuple[str, str]], rates: TaskRates, rng: np.random.Generator
) -> list[Message]:
    """One picture, then several turns about it, so that its codes are paid for once."""
    turns = [(_pick(DESCRIBE_PHRASES, rng), captions[0]), *questions]
    order = rng.permutation(len(turns))[: MAX_QUESTIONS + 1]
    messages: list[Message] = []
    for place, index in enumerate(order):
        question, answer = turns[index]
        text = {"type": "text", "text": question}
        messages += [_user([PICTURE, text] if place == 0 else [text]), _assistant(answer)]
    return messages


def _show(
    captions: Sequence[str], questions: Sequence[tuple[str, str]], rates: TaskRates, rng: np.random.Generator
) -> list[Message]:
    """Text, a picture and text in one answer, then a question about what was drawn where there is any."""
    answer = [
        {"type": "text", "text": "here you are: "},
        PICTURE,
        {"type": "text", "text": f"this is {captions[0]}."},
    ]
    turns = [questions[int(rng.integers(len(questions)))]] if questions else []
    request = _pick(SHOW_PHRASES, rng).format(_pick(captions, rng))
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
