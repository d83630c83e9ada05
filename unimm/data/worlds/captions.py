"""Facts to sentences, and sentences back to facts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unimm.scorers.facts import OPPOSITES, RELATIONS, SceneFacts, SceneObject
from unimm.scorers.outlines import SHAPES
from unimm.scorers.palette import COLOURS

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}

_NOUN = "|".join([*PLURALS.values(), *SHAPES])
_OBJECT = rf"(?:(?P<count>an?|one|two|three|four|[1-4]) )?(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<noun>{_NOUN})"
_SHAPE = re.compile(_OBJECT)
_COUNTS = {"a": 1, "an": 1} | {word: n for n, word in NUMBERS.items()} | {str(n): n for n in NUMBERS}


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def shape_captions(facts: SceneFacts) -> tuple[str, ...]:
    """Phrasings of a shapes scene; the canonical one first."""
    first = facts.objects[0]
    if facts.relation:
        other = facts.objects[1]
        return pair_captions(with_article(first.phrase), with_article(other.phrase), facts.relation)
    if len(facts.objects) == 1:
        base = with_article(first.phrase)
        return (base, f"one {first.phrase}", f"a picture of {base}", f"{base} on a plain ground")
    if first.phrase == facts.objects[1].phrase:
        count, things = len(facts.objects), f"{first.colour} {PLURALS[first.name]}"
        return (f"{NUMBERS[count]} {things}", f"{count} {things}", f"a picture of {NUMBERS[count]} {things}")
    second = facts.objects[1]
    both = f"{with_article(first.phrase)} and {with_article(second.phrase)}"
    return (both, f"one {first.phrase} and one {second.phrase}", f"a picture of {both}")


def shape_description(facts: SceneFacts) -> str:
    """What a reader should say of a shapes scene."""
    if len({thing.phrase for thing in facts.objects}) == 1:
        return shape_captions(facts)[0]
    return pair_description([with_article(thing.phrase) for thing in facts.in_reading_order()], facts.runs_across)


def pair_captions(one: str, other: str, relation: str) -> tuple[str, ...]:
    """Phrasings of a relation; the second says the same from the other side."""
    words = {"left of": "to the left of", "right of": "to the right of"}.get(relation, relation)
    return (
        f"{one} {relation} {other}",
        f"{other} {OPPOSITES[relation]} {one}",
        f"{one} {words} {other}",
        f"a picture of {one} {relation} {other}",
    )


def pair_description(phrases: Sequence[str], across: bool) -> str:
    """Two things in reading order that stand across or down the picture."""
    return (" left of " if across else " above ").join(phrases)


def emoji_description(facts: SceneFacts) -> str:
    """What a reader should say of an emoji scene."""
    if len(facts.objects) == 1:
        return emoji_captions(facts)[0]
    return pair_description([thing.name for thing in facts.in_reading_order()], facts.runs_across)


def emoji_captions(facts: SceneFacts) -> tuple[str, ...]:
    """Phrasings of an emoji scene."""
    names = [thing.name for thing in facts.objects]
    if facts.relation:
        return pair_captions(names[0], names[1], facts.relation)
    return (f"{names[0]} emoji", names[0], f"the emoji {names[0]}", f"a picture of {names[0]}")


def word_captions(facts: SceneFacts) -> tuple[str, ...]:
    """Phrasings of a written word."""
    word = facts.word
    return (
        f'the word "{word}" in {facts.ink}',
        f'{facts.ink} letters that say "{word}"',
        f'a picture of the word "{word}" in {facts.ink}',
    )


def parse_caption(text: str) -> SceneFacts | None:
    """The facts that a caption of shapes or of a word states, without places; None where it states none."""
    quoted = re.search(r'"([A-Z]+)"', text)
    if quoted:
        ink = next((colour for colour in COLOURS if re.search(rf"\b{colour}\b", text)), None)
        return SceneFacts(word=quoted.group(1), ink=ink)
    plain = text.lower().replace("to the left of", "left of").replace("to the right of", "right of")
    found = list(_SHAPE.finditer(plain))
    if not found:
        return None
    relation = next((name for name in RELATIONS if f" {name} " in plain), None)
    singular = {plural: shape for shape, plural in PLURALS.items()}
    objects = [
        SceneObject(singular.get(match["noun"], match["noun"]), match["colour"], (0, 0), 0)
        for match in found
        for _ in range(_COUNTS.get(match["count"] or "a", 1))
    ]
    return SceneFacts(objects=tuple(objects), relation=relation)
