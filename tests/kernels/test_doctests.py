import doctest
import importlib
import pkgutil

import pytest

import bkind3d_kernels

MODULES = [m.name for m in pkgutil.walk_packages(bkind3d_kernels.__path__, "bkind3d_kernels.")]
# The functions share their modules' names, so the modules are imported by path.
WITH_EXAMPLES = {"geometry", "backends", "unproject", "soft_argmax3d", "rasterize_edges"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    if name.removeprefix("bkind3d_kernels.") in WITH_EXAMPLES:
        assert result.attempted > 0
