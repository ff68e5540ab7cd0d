"""Rooms import from floors below their own, as docs/design.md draws the house."""

import ast
import re
from pathlib import Path

import pytest

import fisherop

ROOT = Path(fisherop.__file__).parent
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
FLOORS = {name: int(floor) for floor, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", DESIGN.read_text(), re.MULTILINE)}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Yield the rooms that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fisherop":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [name.name for name in node.names]


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_room_imports_only_from_floors_below(path):
    own = room(path)
    others = {name for name in imported(path) if name in FLOORS and name != own}
    assert not {name for name in others if FLOORS[name] >= FLOORS[own]}
