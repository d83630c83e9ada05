"""The emoji alphabet: glyphs of Noto Color Emoji with their names.

The font is needed to render and to judge, never to draw or to describe with a trained model.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import emoji
import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

BITMAP_SIZE = 109  # the only strike of the font
CANVAS = (136, 128)
KNOWN_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
SKIN_TONES = range(0x1F3FB, 0x1F400)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
VARIATION_SELECTOR = 0xFE0F
THUMBNAIL = 12  # side at which glyphs are compared
NUM_GLYPHS = 384  # of the emoji world


@dataclass(frozen=True)
class Glyph:
    """One emoji: its characters, its English name and further names for it."""

    characters: str
    name: str
    keywords: tuple[str, ...]


def find_font() -> Path:
    """Where the Noto Color Emoji font lies.

    Raises:
        FileNotFoundError: it is not installed; the message has the install line.
    """
    for place in KNOWN_PLACES:
        if Path(place).is_file():
            return Path(place)
    try:
        found = subprocess.run(
            ["fc-match", "--format=%{file}", "Noto Color Emoji"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        found = ""
    if Path(found).name.startswith("NotoColorEmoji"):
        return Path(found)
    raise FileNotFoundError(
        "The Noto Color Emoji font is missing; install it with: apt-get install fonts-noto-color-emoji"
    )


class EmojiCatalog:
    """Every fully qualified emoji of the font.

    Args:
        font: path of the font; None looks in the usual places.

    Raises:
        FileNotFoundError: no font.
        ImportError: a Pillow without Raqm, which cannot shape emoji sequences.
    """

    def __init__(self, font: Path | None = None) -> None:
        if not features.check("raqm"):
            raise ImportError(
                "This Pillow lacks Raqm, which shapes emoji; install Pillow from a wheel: pip install pillow"
            )
        self._font = ImageFont.truetype(str(font or find_font()), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
        qualified = emoji.STATUS["fully_qualified"]
        self.glyphs = tuple(
            Glyph(characters, _words(data["en"]), tuple(_words(alias) for alias in data.get("alias", ())))
            for characters, data in emoji.EMOJI_DATA.items()
            if data["status"] == qualified and self._font.getbbox(characters)[2] == CANVAS[0]
        )

    @lru_cache(maxsize=4096)  # noqa: B019  a catalogue lives as long as the process
    def bitmap(self, characters: str) -> Image.Image:
        """RGBA picture of the glyph on its 136 x 128 canvas."""
        canvas = Image.new("RGBA", CANVAS)
        ImageDraw.Draw(canvas).text((0, 0), characters, font=self._font, embedded_color=True)
        return canvas

    @lru_cache(maxsize=8192)  # noqa: B019
    def resized(self, characters: str, size: int) -> np.ndarray:
        """The glyph in a square of `size` pixels, premultiplied RGBA float32 `[size, size, 4]` in [0, 1]."""
        bitmap = self.bitmap(characters)
        square = Image.new("RGBA", (CANVAS[0], CANVAS[0]))
        square.paste(bitmap, (0, (CANVAS[0] - CANVAS[1]) // 2))
        pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS).convert("RGBa"), dtype=np.float32)
        return pixels / 255

    def select(self, limit: int, *, max_similarity: float = 0.9) -> tuple[Glyph, ...]:
        """Up to `limit` glyphs that can be told apart, those with the shortest names first.

        Single characters with names of at most three words, skin tones and flags excluded; a glyph whose thumbnail is
        more than `max_similarity` alike (cosine of the differences from white) to one already taken is left out.
        """
        taken: list[Glyph] = []
        thumbnails = np.zeros((0, THUMBNAIL * THUMBNAIL * 3))
        simple = (glyph for glyph in self.glyphs if _is_simple(glyph))
        for glyph in sorted(simple, key=lambda glyph: (len(glyph.name.split()), len(glyph.name), glyph.name)):
            vector = self._thumbnail(glyph)
            if not vector.any():  # newer than the font
                continue
            if len(taken) and float((thumbnails @ vector).max()) > max_similarity:
                continue
            taken.append(glyph)
            thumbnails = np.vstack([thumbnails, vector])
            if len(taken) == limit:
                break
        return tuple(taken)

    def _thumbnail(self, glyph: Glyph) -> np.ndarray:
        pixels = self.resized(glyph.characters, THUMBNAIL)
        difference = (pixels[..., :3] - pixels[..., 3:]).reshape(-1)
        return difference / max(float(np.linalg.norm(difference)), 1e-9)


@lru_cache(maxsize=1)
def catalog() -> EmojiCatalog:
    """The catalogue of the installed font, read once."""
    return EmojiCatalog()


@lru_cache(maxsize=1)
def world_glyphs() -> tuple[Glyph, ...]:
    """The glyphs of the emoji world; its `held_out` split combines the same ones anew."""
    return catalog().select(NUM_GLYPHS)


def _is_simple(glyph: Glyph) -> bool:
    points = [ord(c) for c in glyph.characters if ord(c) != VARIATION_SELECTOR]
    if len(points) != 1 or points[0] in SKIN_TONES or points[0] in REGIONAL_INDICATORS:
        return False
    plain = all(character.islower() or character in " -" for character in glyph.name)
    return plain and len(glyph.name.split()) <= 3


def _words(shortcode: str) -> str:
    """`:hot_pepper:` to `hot pepper`."""
    return shortcode.strip(":").replace("_", " ").replace("\u2019", "'")
