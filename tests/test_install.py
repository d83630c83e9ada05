"""What an installation brings, and what it must not."""

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys

import pytest

import unimm

HEAVY = {
    "torch",
    "transformers",
    "diffusers",
    "matplotlib",
    "accelerate",
    "trl",
    "peft",
    "datasets",
    "scipy",
    "skimage",
}


def dependency_tree(root: str) -> set[str]:
    seen: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        seen.add(name)
        plain = [line for line in requirements if "extra ==" not in line]
        waiting += [re.split(r"[ ;<>=!~\[(]", line)[0].lower() for line in plain]
    return seen


def test_torchvision_is_absent():
    assert "torchvision" not in dependency_tree("unimm")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torchvision")


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(unimm.__path__, "unimm.") if not m.name.endswith("__main__")]
)
def test_every_module_imports(name):
    importlib.import_module(name)


def run(code: str) -> None:
    """In a fresh process."""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "code",
    [
        "import unimm; unimm.__all__, unimm.__version__, dir(unimm)",
        "from unimm.cli.main import build_parser; build_parser().format_help()",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_asked_for(code):
    run(f"{code}\nimport sys; found = {HEAVY!r} & set(sys.modules); assert not found, found")


@pytest.mark.parametrize("before", ["import unimm", "from transformers import AutoModel, AutoProcessor"])
@pytest.mark.slow
def test_auto_classes_know_ours_whatever_is_imported_first(before, tiny_folder):
    run(
        f"{before}\nimport unimm\nfrom transformers import AutoImageProcessor, AutoModel, AutoProcessor\n"
        "for auto in (AutoModel, AutoImageProcessor, AutoProcessor):\n"
        f"    loaded = auto.from_pretrained({str(tiny_folder)!r})\n"
        "    assert type(loaded).__module__.startswith('unimm.'), type(loaded)"
    )


def test_every_public_name_is_there():
    assert all(getattr(unimm, name).__module__.startswith("unimm.") for name in unimm.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        unimm.nothing  # noqa: B018
