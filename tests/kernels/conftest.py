import os
from collections.abc import Iterator

import pytest
import torch

from bkind3d_kernels import backends, library, triton_ops

# Tests of the C++ kernels are skipped where there is no compiler, those of the Triton kernels where there is no Triton;
# in CI there are both.
if os.environ.get("CI") == "true":
    assert library.reason("_cpu") is None, library.reason("_cpu")
    assert triton_ops.MISSING is None, triton_ops.MISSING


def runnable(op: str) -> list[str]:
    """The backends of an operation that run on the CPU here, Triton's interpreter among them."""
    return [line.backend for line in backends.explain(op, device="cpu") if line.available]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The argument ``backend`` is each that runs the operation of the test's file, or all of the operations."""
    if "backend" in metafunc.fixturenames:
        stem = metafunc.module.__name__.removeprefix("test_")
        ops = [stem] if stem in backends.OPERATIONS else backends.OPERATIONS
        found = [name for name in backends.BACKENDS if all(name in runnable(op) for op in ops)]
        metafunc.parametrize("backend", found)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty and its like is filled with NaN, so an element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
