"""Files: atomic ones, where a reader sees the old content or the new and never half of it, and names of models."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_model_name(name: str) -> None:
    """Raise `ValueError` where a name is neither a folder of a model nor, as one `owner/name`, a Hub name."""
    folder = Path(name)
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/")) and not folder.is_dir()
    if not is_hub_name and not (folder / "config.json").is_file():
        raise ValueError(f"There is no model folder {name}; name a folder that holds config.json, or a Hub model.")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory; it replaces `path` when the block ends, and vanishes if it raises.

    The temporary name keeps the suffix, so that writers which look at it (Pillow, matplotlib) choose the right format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`; it takes the place of `path` when the block ends."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    old = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


KEY_FILE = ".key"


@contextmanager
def resumable_directory(path: str | Path, key: str) -> Iterator[Path]:
    """Yield a directory beside `path` that takes the place of `path` when the block ends.

    A block that raises leaves nothing behind. One that is killed leaves what it wrote, and the next call with the same
    key begins with that, so a block must write its files atomically and may leave out those that are there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}-unfinished")
    if not (unfinished / KEY_FILE).is_file() or (unfinished / KEY_FILE).read_text(encoding="utf-8") != key:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        with atomic_write(unfinished / KEY_FILE) as file:
            file.write_text(key, encoding="utf-8")
    for leftover in unfinished.rglob(".*"):
        if leftover.is_file() and leftover.name != KEY_FILE:
            leftover.unlink()
    try:
        yield unfinished
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    (unfinished / KEY_FILE).unlink()
    os.replace(unfinished, path)
