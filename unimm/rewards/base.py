"""What a reward is: a name, a range, and a plain function from drawings to numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from unimm.scorers.facts import SceneFacts


@dataclass(frozen=True)
class Drawing:
    """One sample to be judged.

    Args:
        image: RGB; None where no whole picture was drawn.
        prompt: the request.
        facts: what the picture should show.
    """

    image: Image.Image | None
    prompt: str
    facts: SceneFacts


@dataclass(frozen=True)
class Reward:
    """A reward.

    Args:
        name: key in recipes and logs.
        low, high: its range; a missing picture scores `low`.
        applies: whether it can judge a picture of these facts.
        function: pictures and their drawings to one number each, within the range; called only where it applies.
    """

    name: str
    low: float
    high: float
    applies: Callable[[SceneFacts], bool]
    function: Callable[[Sequence[Image.Image], Sequence[Drawing]], list[float]]

    def __call__(self, drawings: Sequence[Drawing]) -> list[float | None]:
        """One number per drawing; None where the reward does not apply."""
        scores: list[float | None] = [self.low if self.applies(drawing.facts) else None for drawing in drawings]
        judged = [
            (index, drawing.image, drawing)
            for index, drawing in enumerate(drawings)
            if scores[index] is not None and drawing.image is not None
        ]
        if judged:
            places, images, samples = zip(*judged, strict=True)
            for place, value in zip(places, self.function(images, samples), strict=True):
                assert self.low - 1e-4 <= value <= self.high + 1e-4, (self.name, value)
                scores[place] = value
        return scores
