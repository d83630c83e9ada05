"""Picture files in, with one clear error for what is none."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000


def open_image(path: str | Path) -> Image.Image:
    """A fully read picture, turned as its EXIF data say, as data sets are; an animation gives its first frame.

    Raises:
        ValueError: no file, no picture, a truncated one, or one of more than 100 million pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no picture {path}; check the path.")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{path} has {image.width} x {image.height} pixels; {MAX_PIXELS:,} are taken. Shrink it first."
                )
            image.seek(0)
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that Pillow can read, whatever its name says.") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path} is broken or truncated ({error}); save the picture again.") from error
