"""Times of tiny problems, with pytest-benchmark; nothing is asserted about them."""

from typing import Any

import pytest
import torch

from benchmarks.measure import Contestant
from benchmarks.problems import Case, competitors, operation
from bkind3d_kernels.backends import OPERATIONS

CASES = [
    (op, competitor)
    for op in OPERATIONS
    for competitor, reason in competitors(op, "cpu", torch.float32, operation(op).VARIANTS[0]).items()
    if reason is None and competitor != "compile"
]


@pytest.mark.parametrize(("op", "competitor"), CASES)
def test_training_step(op: str, competitor: str, benchmark: Any) -> None:
    module = operation(op)
    contestant = Contestant(Case(op, module.SMALLEST, module.VARIANTS[0], torch.float32, "cpu"), competitor)
    benchmark.group = op
    times = benchmark.pedantic(contestant.round, rounds=5, warmup_rounds=1)
    assert set(times) == {"forward", "backward", "both"}
