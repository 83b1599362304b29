"""Imports run one way: from the command to experiments, to what is beside the core, to the core, to the kernels."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, KERNELS = "core", "bkind3d_kernels"
# A room, and the rooms that it imports beside itself. Folders of the package that are not named here are core.
ARROWS = {
    CORE: {KERNELS},
    "sims": {CORE, KERNELS},
    "evaluation": {CORE, KERNELS},
    "report": {CORE, KERNELS, "evaluation"},
    "experiments": {CORE, KERNELS, "sims", "evaluation", "report"},
    "cli": {CORE, KERNELS, "sims", "evaluation", "report", "experiments"},
}


def modules_of(package: str) -> dict[str, Path]:
    """Name and file of every module; a package's is its ``__init__.py``."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules_of("bkind3d")


def imported_by(name: str, path: Path) -> set[str]:
    """All modules that a file names in its imports, also inside functions and for type checking.

    ``from package import name`` counts as the module of that name where there is one, and as the package else.
    """
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {
                f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in MODULES else origin for alias in node.names
            }
    return found


IMPORTS = {name: imported_by(name, path) for name, path in MODULES.items()}


def room_of(name: str) -> str:
    """The room of a module of either package."""
    package, *rest = name.split(".")
    if package == KERNELS:
        return KERNELS
    if rest == ["__main__"]:
        return "cli"
    return rest[0] if rest and rest[0] in ARROWS else CORE


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_import_along_the_arrows(room: str) -> None:
    inside = [name for name in MODULES if room_of(name) == room]
    assert inside
    for name in inside:
        ours = {other for other in IMPORTS[name] if other.split(".")[0] in ("bkind3d", KERNELS)}
        astray = {other for other in ours if room_of(other) not in ARROWS[room] | {room}}
        assert not astray, f"{name} imports {', '.join(sorted(astray))}"


def test_no_import_circle() -> None:
    try:
        TopologicalSorter({name: found & set(MODULES) for name, found in IMPORTS.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_kernels_import_torch_alone() -> None:
    """Beside the standard library, and Triton where it is installed."""
    for name, path in modules_of(KERNELS).items():
        packages = {other.split(".")[0] for other in imported_by(name, path)}
        assert packages - set(sys.stdlib_module_names) <= {"torch", "triton", KERNELS}, name


def test_every_folder_is_a_package() -> None:
    for name, path in MODULES.items():
        assert (path.parent / "__init__.py").is_file(), name


def test_no_test_imports_another() -> None:
    """What two tests need has a file of its own."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    found = {str(path.relative_to(ROOT)): imported_by(path.stem, path) & tests for path in files}
    assert len(tests) > 50
    assert {name: names for name, names in found.items() if names} == {}
