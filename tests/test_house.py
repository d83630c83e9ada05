"""Imports between rooms only go down."""

import ast
from pathlib import Path

import unimm

FLOORS = {
    0: ("codes", "config", "files"),
    1: ("nn",),
    2: ("codec", "sequence", "scorers"),
    3: ("generation", "detokenizer"),
    4: ("unified",),
    5: ("pipelines", "data", "rewards", "conversion"),
    6: ("training", "evaluation", "hub"),
    7: ("serving", "demo"),
    8: ("cli",),
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
PACKAGE = Path(unimm.__file__).parent


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_no_import_climbs():
    climbs = []
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            parts = (module or "").split(".")
            if parts[0] != "unimm" or len(parts) < 2 or parts[1] == room_of(path):
                continue
            if FLOOR[parts[1]] >= FLOOR[room_of(path)]:
                climbs.append(f"{path.name}:{node.lineno} {room_of(path)} -> {parts[1]}")
    assert not climbs
