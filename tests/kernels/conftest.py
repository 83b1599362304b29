import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from native import emulation
from switches import INSTRUCTION_SETS

from bkind3d_kernels import backends, library, triton_ops

# Tests of the C++ kernels are skipped where there is no compiler, those of the Triton kernels where there is no Triton;
# in CI there are both. The CUDA kernels run as C++ on the CPU where there is g++ (native/cuda_emulation.h).
if os.environ.get("CI") == "true":
    assert library.reason("_cpu") is None, library.reason("_cpu")
    assert triton_ops.MISSING is None, triton_ops.MISSING
    assert emulation.MISSING is None, emulation.MISSING

if triton_ops.INTERPRETED:
    import interpreter

    interpreter.install()

EMULATED = "cuda (emulated)"


def runnable(op: str) -> list[str]:
    """The backends of an operation that run on the CPU here, Triton's interpreter among them."""
    return [line.backend for line in backends.explain(op, device="cpu") if line.available]


def families(op: str) -> list[str]:
    """The families of operators (registration.py) that have the operation and run it on CPU tensors here."""
    found = {name: name in runnable(op) for name in ("cpp", "triton")}
    found[EMULATED] = emulation.MISSING is None and op in emulation.OPERATIONS
    return [name for name, runs in found.items() if runs]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The argument ``backend`` is each that runs the operation of the test's file, or all that it has.

    The argument ``operators`` is each family of operators that has the operation of the file test_<stem>_operators.py.
    """
    stem = metafunc.module.__name__.removeprefix("test_")
    if "operators" in metafunc.fixturenames:
        metafunc.parametrize("operators", families(stem.removesuffix("_operators")), indirect=True)
    if "backend" in metafunc.fixturenames:
        found = []
        for name in backends.BACKENDS:
            ops = [stem] if stem in backends.OPERATIONS else backends.operations_of(name)
            if all(name in runnable(op) for op in ops):
                found.append(name)
        if emulation.MISSING is None and (stem in emulation.OPERATIONS or stem not in backends.OPERATIONS):
            found.append(EMULATED)
        metafunc.parametrize("backend", found, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name for the argument of the operations; "cuda" may be the emulation for as long as the test runs."""
    if request.param != EMULATED:
        return request.param
    for op in emulation.OPERATIONS:
        monkeypatch.setitem(backends._MODULES, (op, "cuda"), emulation.backend(op))
    return "cuda"


NAMESPACES = {"cpp": "bkind3d", "triton": triton_ops.NAMESPACE, EMULATED: emulation.NAMESPACE}


@pytest.fixture
def operators(request: pytest.FixtureRequest) -> Any:
    """The operators of one family: ``operators.unproject``, ``operators.unproject_backward`` and the rest."""
    if request.param == EMULATED:
        emulation.load()
    return getattr(torch.ops, NAMESPACES[request.param])


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, with which the C++ kernels run as long as the test does."""
    with library.use_instruction_set(request.param):
        yield request.param


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
