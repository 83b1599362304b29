import os
from collections.abc import Iterator

import pytest
import torch

from bkind3d_kernels import backends, library

# Tests of the C++ kernels are skipped where there is no compiler; in CI there is one.
if os.environ.get("CI") == "true":
    assert library.reason("_cpu") is None, library.reason("_cpu")

RUNNABLE = [line.backend for line in backends.explain("unproject", device="cpu") if line.available]


@pytest.fixture(params=RUNNABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on the CPU here."""
    return request.param


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
