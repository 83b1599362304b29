import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bkind3d_kernels
from bkind3d_kernels import BackendUnavailable, VoxelGrid, backends, soft_argmax3d, triton_ops

ROOT = Path(__file__).parents[2]
GRID = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 2)
LOGITS = torch.zeros(1, 1, 2, 2, 2)


@pytest.fixture(autouse=True)
def _as_outside_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BKIND3D_BACKEND", raising=False)
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)


def test_names_and_order() -> None:
    assert list(backends.BACKENDS) == ["cuda", "cpp", "triton", "reference"]
    for op in backends.OPERATIONS:
        assert [line.backend for line in backends.explain(op)] == list(backends.BACKENDS)


@pytest.mark.parametrize("op", backends.OPERATIONS)
def test_auto_is_the_first_available(op: str) -> None:
    for device in ("cpu", torch.device("cuda", 0)):
        available = [line.backend for line in backends.explain(op, device=device) if line.available]
        assert backends.resolve(op, device=device) == available[0]


@pytest.mark.parametrize("op", backends.OPERATIONS)
def test_the_order_is_that_of_the_table_everywhere(op: str) -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.float16, torch.float64):
            explained = backends.explain(op, device=device, dtype=dtype)
            assert [line.backend for line in explained] == list(backends.BACKENDS)


def test_an_operation_without_kernels_of_a_backend_says_so() -> None:
    line = backends.explain("linear_soft_argmax3d", device="cuda")[0]
    assert (line.backend, line.available) == ("cuda", False)
    assert line.reason == "this operation has no CUDA kernels for CUDA tensors"


def test_absent_backend_says_why() -> None:
    for line in backends.explain("unproject"):
        if not line.available:
            with pytest.raises(BackendUnavailable) as caught:
                backends.resolve("unproject", line.backend)
            assert str(caught.value) == f"backend '{line.backend}' cannot run unproject: {line.reason}"
            assert "\n" not in line.reason


def test_dtype_outside_the_contract_has_a_reason() -> None:
    line = backends.explain("unproject", dtype=torch.int32)[-1]
    assert not line.available
    assert "torch.int32 is not one of" in line.reason
    with pytest.raises(BackendUnavailable, match=r"no backend can run unproject on cpu with torch\.int32"):
        backends.resolve("unproject", dtype=torch.int32)


def test_variable_is_read_at_call_time_and_argument_wins(
    monkeypatch: pytest.MonkeyPatch, fake_backend: list[str]
) -> None:
    assert backends.resolve("soft_argmax3d") == "cpp"
    monkeypatch.setenv("BKIND3D_BACKEND", "reference")
    soft_argmax3d(LOGITS, GRID)
    assert fake_backend == []
    soft_argmax3d(LOGITS, GRID, backend="cpp")
    assert fake_backend == ["soft_argmax3d"]
    monkeypatch.setenv("BKIND3D_BACKEND", "cpp")
    assert backends.resolve("soft_argmax3d", "reference") == "reference"
    monkeypatch.setenv("BKIND3D_BACKEND", "")
    assert backends.resolve("soft_argmax3d") == "cpp"


def test_variable_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BKIND3D_BACKEND", "referense")
    with pytest.raises(ValueError, match="BKIND3D_BACKEND 'referense': expected one of auto, cuda, cpp, triton, refer"):
        soft_argmax3d(LOGITS, GRID)
    monkeypatch.setenv("BKIND3D_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="BKIND3D_BACKEND 'cuda' cannot run soft_argmax3d: "):
        soft_argmax3d(LOGITS, GRID)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="backend 'gpu': expected one of auto, "):
        soft_argmax3d(LOGITS, GRID, backend="gpu")
    for module in (bkind3d_kernels.Unproject, bkind3d_kernels.SoftArgmax3d):
        with pytest.raises(ValueError, match="backend 'gpu': expected one of auto, "):
            module(backend="gpu")
    with pytest.raises(ValueError, match="op 'splat': expected one of unproject, "):
        backends.resolve("splat")
    with pytest.raises(ValueError, match="op 'splat': expected one of unproject, "):
        backends.explain("splat")


FAKE = """
calls = []

def unavailable(device, dtype):
    return None if device == "cpu" else f"made for CPU tensors, not {device}"

def run(*arguments):
    from bkind3d_kernels.reference import soft_argmax3d
    calls.append("soft_argmax3d")
    return soft_argmax3d.run(*arguments)
"""


@pytest.fixture
def fake_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A backend of one operation, made by adding files alone; its list of calls."""
    folder = tmp_path / backends.BACKENDS["cpp"].folder
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "soft_argmax3d.py").write_text(FAKE)
    name = f"bkind3d_kernels.{folder.name}"
    for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(bkind3d_kernels, "__path__", [str(tmp_path), *bkind3d_kernels.__path__])
    monkeypatch.setattr(backends, "_MODULES", {})
    backends.load()
    yield sys.modules[f"{name}.soft_argmax3d"].calls
    for module in (name, f"{name}.soft_argmax3d"):
        sys.modules.pop(module, None)


def test_backend_is_added_by_adding_files(fake_backend: list[str]) -> None:
    assert backends.resolve("soft_argmax3d") == "cpp"
    assert backends.resolve("unproject") == "reference"
    assert soft_argmax3d(LOGITS, GRID).tolist() == [[[0.0, 0.0, 0.0]]]
    assert fake_backend == ["soft_argmax3d"]
    with pytest.raises(BackendUnavailable, match="made for CPU tensors, not cuda"):
        backends.resolve("soft_argmax3d", "cpp", device="cuda")


def test_package_imports_torch_alone() -> None:
    root = Path(bkind3d_kernels.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton", "bkind3d_kernels"} | sys.stdlib_module_names, f"{path}: {name}"


def test_info_prints_versions_picks_and_reasons() -> None:
    environment = os.environ | {"BKIND3D_BACKEND": "reference", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bkind3d_kernels.info"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"torch    {torch.__version__}" in text
    assert "BKIND3D_BACKEND  reference" in text
    for op in backends.OPERATIONS:
        assert f"{op} on cpu, float32: reference\n" in text
        for line in backends.explain(op):
            assert f"{line.backend:<10} {line.reason}" in text


def test_info_shows_a_bad_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from bkind3d_kernels import info

    monkeypatch.setenv("BKIND3D_BACKEND", "cuda")
    assert "unproject on cpu, float32: error: BKIND3D_BACKEND 'cuda' cannot run unproject" in info.report()
