import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import bkind3d_kernels
from bkind3d_kernels import backends

MODULES = [
    m.name
    for m in pkgutil.walk_packages(bkind3d_kernels.__path__, "bkind3d_kernels.")
    if not m.name.endswith(("._cpu", "._cuda"))  # libraries of torch, no modules of Python
]
WITH_EXAMPLES = {"geometry", "backends", *backends.OPERATIONS}
DOCS = Path(bkind3d_kernels.__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    if name.removeprefix("bkind3d_kernels.") in WITH_EXAMPLES:
        assert result.attempted > 0


@pytest.mark.parametrize("page", ["conventions.md", "ops.md"])
def test_examples_in_pages(page: str) -> None:
    result = doctest.testfile(str(DOCS / page), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    assert result.attempted > 0
