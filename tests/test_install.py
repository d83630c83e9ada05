"""What an installation brings, and what it must not."""

import importlib
import importlib.metadata
import pkgutil
import re

import pytest

import unimm


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
