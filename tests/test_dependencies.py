"""The house: who may import whom, which rooms there are, how long a file may be, and what stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEAVES = {"errors", "checks", "spec", "assets", "metrics"}
# From the bottom to the top; a room may import leaves, itself and everything below it.
LAYERS = (
    {"formats", "kernels", "hadamard"},
    {"structure"},
    {"calibration"},
    {"stages"},
    {"engine"},
    {"models", "evaluation", "export"},
    {"scheme_weights", "scheme", "compose", "preflight", "session", "run", "measure", "progress", "sweep"}
    | {"rebuild", "noise"},
    {"cli", "command", "composition", "declaration", "doctor", "fill", "findings", "help", "shown", "taxonomy"}
    | {"__main__"},
)
BESIDE = {("export", "models"), ("evaluation", "models")}
"""Imports within one layer below the uppermost two: an export writes the model's own tokenizer along, decoding one
token at a time needs a cache that the model takes."""
RECORDS = {"evaluation", "export"}
"""Rooms that describe their results as the database's records, which are plain values."""

ROOMS = {
    "formats",
    "kernels",
    "structure",
    "calibration",
    "stages",
    "engine",
    "models",
    "evaluation",
    "export",
    "store",
}
HEAVY = {"torch", "transformers"}
LIGHT = [
    "qbench.errors",
    "qbench.spec",
    "qbench.assets",
    "qbench.store.database",
    "qbench.store.queries",
    "qbench.cli",
    *sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "analysis").rglob("*.py")
        if path.name != "__init__.py"
    ),
]


def _files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def _imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of what import statements name: modules, and for `from package import name` also package.name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _all_imports(path: Path) -> set[str]:
    return set(_imports(ast.walk(ast.parse(path.read_text()))))


def _room(name: str) -> str | None:
    """`qbench.store.records` -> "store"; None outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "qbench" and len(parts) > 1 else None


def _room_of(path: Path) -> str:
    return path.relative_to(ROOT / "qbench").parts[0].removesuffix(".py")


def _known() -> set[str]:
    return {_room_of(path) for path in _files("qbench")}


def _layer(room: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if room in rooms)


def _may_import(room: str, other: str, name: str) -> bool:
    if other == room or other == "errors":
        return True
    if room in LEAVES:
        return False
    if room == "store":
        return other == "spec"
    if other == "store":
        top = _layer(room) >= len(LAYERS) - 2
        return top or (room in RECORDS and name.startswith("qbench.store.records"))
    if other in LEAVES:
        return True
    mine, its = _layer(room), _layer(other)
    return its < mine or (its == mine and (mine >= len(LAYERS) - 2 or (room, other) in BESIDE))


@pytest.mark.parametrize("path", _files("qbench"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    if path == ROOT / "qbench" / "__init__.py":
        return
    known = _known()
    for name in _all_imports(path):
        other = _room(name)
        if other in known and name != "qbench.store":  # `from qbench.store import x` also yields qbench.store.x
            assert _may_import(_room_of(path), other, name), f"{path.relative_to(ROOT)} imports {name}"
        assert name.split(".")[0] not in ("tests", "experiments"), f"{path.relative_to(ROOT)} imports {name}"


def test_modules_of_the_uppermost_layers_do_not_import_in_circles():
    graph: dict[str, set[str]] = {}
    for path in _files("qbench"):
        rooms = {_room(name) for name in _all_imports(path)} & _known()
        graph.setdefault(_room_of(path), set()).update(rooms - {_room_of(path)})
    while graph:
        free = {room for room, needed in graph.items() if not needed & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {room: needed for room, needed in graph.items() if room not in free}


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_import_the_standard_library_alone_when_imported(name):
    tree = ast.parse((ROOT / "qbench" / f"{name}.py").read_text())
    top = {imported.split(".")[0] for imported in _imports(iter(tree.body))}
    assert top - {"qbench"} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", _files("analysis", "qbench/store"), ids=lambda path: str(path.relative_to(ROOT)))
def test_analysis_and_store_never_import_torch_or_transformers(path):
    assert not {name.split(".")[0] for name in _all_imports(path)} & HEAVY


@pytest.mark.parametrize("path", _files("analysis"), ids=lambda path: str(path.relative_to(ROOT)))
def test_analysis_reads_the_database_and_nothing_else_of_the_package(path):
    assert {_room(name) for name in _all_imports(path)} <= {None, "store", "spec", "errors", "metrics"}


def test_light_modules_do_not_load_torch_or_transformers_by_way_of_others():
    """In a fresh interpreter: what they import may import it."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    assert not set({sorted(HEAVY)!r}) & sys.modules.keys(), name\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path",
    _files("qbench", "analysis", "experiments", "tests", "hydra_plugins"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_package_has_the_rooms_of_its_design_and_no_others():
    found = {path.parent.relative_to(ROOT / "qbench").parts[0] for path in (ROOT / "qbench").glob("*/*.py")}
    assert found <= ROOMS
    files = {path.stem for path in (ROOT / "qbench").glob("*.py")} - {"__init__"}
    assert files <= LEAVES | {"hadamard"} | LAYERS[-1] | LAYERS[-2]


def test_every_room_has_a_layer():
    assert _known() - {"__init__"} <= LEAVES | {"store"} | set().union(*LAYERS)
