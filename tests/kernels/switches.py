"""What tests switch for a while: deterministic algorithms, and the instruction set of the C++ kernels."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from bkind3d_kernels import library

BEST_SET = library.instruction_set()
# Those that run here, the best of them last; none without the C++ kernels.
INSTRUCTION_SETS = library.INSTRUCTION_SETS[: library.INSTRUCTION_SETS.index(BEST_SET) + 1] if BEST_SET else ()


def each_instruction_set(operators: Any) -> list[AbstractContextManager[None]]:
    """To run with each instruction set what the C++ operators do, and once what those of another family do."""
    if operators.name != "bkind3d":
        return [nullcontext()]
    return [library.use_instruction_set(name) for name in INSTRUCTION_SETS]


@contextmanager
def deterministic(enabled: bool = True) -> Iterator[None]:
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
