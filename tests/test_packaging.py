"""What an installation brings along, and what importing a package loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_base_dependencies_are_torch_and_numpy() -> None:
    assert [line.split(">=")[0] for line in PROJECT["dependencies"]] == ["torch", "numpy"]
    assert not any("<" in line for line in PROJECT["dependencies"])


def test_no_extra_replaces_torch() -> None:
    """torchvision, timm and lightning pull a torch of their own choice over the one that is installed."""
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    assert not [line for line in lines if line.startswith(("torch", "timm", "lightning", "pytorch"))]


@pytest.mark.parametrize("package", ["bkind3d_kernels", "bkind3d_kernels.info"])
def test_kernels_import_torch_alone(package: str) -> None:
    code = (
        f"import sys, torch; before = set(sys.modules); import {package}; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(sorted(name for name in new if not name.startswith('__editable__')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "['bkind3d_kernels']"


def test_kernels_name_no_higher_layer() -> None:
    for path in (ROOT / "bkind3d_kernels").rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.startswith(("import bkind3d.", "from bkind3d.", "from bkind3d "))], (
            path
        )
