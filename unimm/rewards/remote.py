"""Reward from a server: pictures and prompts over HTTP, numbers back."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from urllib.error import URLError
from urllib.request import Request, urlopen

from PIL import Image

from unimm.rewards.base import Drawing, Reward

TIMEOUT = 120  # seconds


class RemoteReward:
    """Posts `{"images": [PNG in base64], "prompts": [text]}` as JSON and expects `{"scores": [numbers in [0, 1]]}`.

    Args:
        url: of the server, with `http://` or `https://`.

    Raises:
        ValueError: another kind of address.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judges.remote is {url!r}; give an address that begins with http:// or https://.")
        self.url = url

    def __call__(self, images: Sequence[Image.Image], drawings: Sequence[Drawing]) -> list[float]:
        """One number in [0, 1] per picture.

        Raises:
            ValueError: no answer within `TIMEOUT`, or another answer than one number in [0, 1] per picture.
        """
        body = {"images": [_png(image) for image in images], "prompts": [drawing.prompt for drawing in drawings]}
        request = Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=TIMEOUT) as response:
                answer = json.load(response)
        except (URLError, TimeoutError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The reward server {self.url} gave no JSON ({error}); start it, or drop 'remote' from rewards."
            ) from error
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if (
            not isinstance(scores, list)
            or len(scores) != len(images)
            or not all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores)
        ):
            raise ValueError(
                f"The reward server {self.url} answered {str(answer)[:100]}; it must answer "
                f'{{"scores": [...]}} with {len(images)} numbers from 0 to 1.'
            )
        return [float(score) for score in scores]


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def remote(url: str) -> Reward:
    """The reward of a server, in [0, 1]."""
    return Reward("remote", 0.0, 1.0, lambda facts: True, RemoteReward(url))
