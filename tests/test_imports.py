"""Imports go one way: a folder or module of the package imports only those of earlier layers."""

import ast
from pathlib import Path

import pytest

import rotary_export

PACKAGE = Path(rotary_export.__file__).parent
LAYERS = (
    ("errors", "package", "compat", "types"),
    ("reference",),
    ("op",),
    ("bundle", "embedding"),
    ("rope",),
    ("graphs", "runtime"),
    ("proof", "serving"),
    ("exporters", "fusion", "measure"),
    ("models",),
    ("deploy",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
KITS = PACKAGE / "deploy" / "kits"  # each stands by itself
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if KITS not in path.parents]


def find_room(module: str) -> str:
    """Return the folder or module at the top of the package that a module is in."""
    return module.split(".")[1] if "." in module else "__init__"


def list_imports(path: Path) -> set[str]:
    """Return the rooms that a file imports, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {find_room(a.name) for a in node.names if a.name.startswith("rotary_export")}
        elif isinstance(node, ast.ImportFrom) and node.module == "rotary_export":
            rooms |= {a.name if a.name in RANKS else "__init__" for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rotary_export."):
            rooms.add(find_room(node.module))
    return rooms


def test_every_folder_and_module_has_a_layer():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == RANKS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in list_imports(path) - {room}:
        assert RANKS[other] < RANKS[room], f"{room} imports {other}"
