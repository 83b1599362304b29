"""The Triton kernels compiled ahead of time for three architectures: they spill nothing and leave room for others."""

import csv
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import triton_resources
from bkind3d_kernels import backends, triton_ops

pytestmark = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/triton.md"


@pytest.fixture(scope="module")
def rows() -> list[triton_resources.Row]:
    """Compiled in a process of its own, where nothing is interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.triton_resources", "--csv"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout, run.stderr
    types = triton_resources.Row.__annotations__
    return [
        triton_resources.Row(**{key: int(value) if types[key] == "int" else value for key, value in row.items()})
        for row in csv.DictReader(run.stdout.splitlines())
    ]


def test_no_variant_spills_or_crowds_out_others(rows: list[triton_resources.Row]) -> None:
    assert [f"{row.kernel} {row.variant} sm_{row.arch}: {row.fault}" for row in rows if row.fault] == []


def test_every_operation_is_compiled_forward_and_backward(rows: list[triton_resources.Row]) -> None:
    for op in backends.operations_of("triton"):
        assert len({row.kernel for row in rows if row.op == op}) >= 2, op


def test_the_page_has_these_numbers(rows: list[triton_resources.Row]) -> None:
    if metadata.version("triton") != "3.6.0":
        assert os.environ.get("CI") != "true"
        pytest.skip("the page is of Triton 3.6.0")
    assert PAGE.read_text() == triton_resources.renewed(PAGE.read_text(), rows)
