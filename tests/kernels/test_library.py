"""The library of C++ kernels: why it is not there, and which instruction set it uses."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bkind3d_kernels import BackendUnavailable, VoxelGrid, backends, library, soft_argmax3d, triton_ops

built = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
GRID = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 4)
MISSING = "_cpu.so is not built: a reason"


def run(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BKIND3D_BACKEND", raising=False)
    monkeypatch.setattr(library, "_REASONS", {"_cpu": MISSING, "_cuda": MISSING})
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)  # as it is outside of tests


# ---- reasons ----


def test_missing_file_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = library._load(tmp_path / "_cpu.so")
    assert reason is not None
    assert reason.startswith("_cpu.so is not built: ")
    assert "install g++ or clang++, then run pip install --no-build-isolation" in reason
    assert "\n" not in reason
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Windows" in str(library._load(tmp_path / "_cpu.so"))


@pytest.mark.parametrize("content", [b"", b"no library\n" * 100])
def test_broken_file_gives_the_words_of_the_loader(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "_cpu.so"
    path.write_bytes(content)
    reason = library._load(path)
    assert reason is not None
    assert reason.startswith(f"_cpu.so cannot be loaded into torch {torch.__version__}: {path}: ")
    assert "\n" not in reason


@pytest.mark.parametrize("op", backends.OPERATIONS)
@pytest.mark.usefixtures("missing")
def test_without_the_library_cpp_raises_and_auto_goes_on(op: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        backends.resolve(op, "cpp")
    assert str(caught.value) == f"backend 'cpp' cannot run {op}: {MISSING}"
    assert backends.resolve(op) == "reference"
    assert library.instruction_set() is None
    assert library.describe() == [f"C++      {MISSING}", f"CUDA     {MISSING}"]
    with pytest.raises(RuntimeError, match="is not built"), library.use_instruction_set("baseline"):
        pass


@built
@pytest.mark.parametrize("op", backends.OPERATIONS)
def test_with_the_library_auto_takes_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BKIND3D_BACKEND", raising=False)
    assert backends.resolve(op) == "cpp"
    assert library.cpp_unavailable("cpu", torch.float32) is None
    assert library.cpp_unavailable("cuda", torch.float32) == "made for CPU tensors, not cuda"
    assert library.cpp_unavailable("cpu", torch.int32) == (
        "torch.int32 is not one of float32, bfloat16, float16, float64"
    )


@built
def test_first_call_of_a_process_may_be_compiled() -> None:
    code = """
import torch
from bkind3d_kernels import VoxelGrid, soft_argmax3d
grid = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 4)
f = torch.compile(lambda x: soft_argmax3d(x, grid, backend="cpp"), fullgraph=True, backend="eager")
print(f(torch.zeros(1, 1, 4, 4, 4)).tolist())
"""
    assert run(code) == "[[[0.0, 0.0, 0.0]]]\n"


# ---- the CUDA kernels ----


def test_cuda_needs_a_cuda_build_of_torch_and_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "_cuda.so"
    monkeypatch.setattr(torch.version, "cuda", None)
    path.write_bytes(b"not even looked at")
    assert library._load_cuda(path, None) == f"the CUDA kernels need a CUDA build of torch, not {torch.__version__}"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert library._load_cuda(path, MISSING) == f"_cuda.so needs the C++ kernels: {MISSING}"
    assert str(library._load_cuda(path, None)).startswith(
        f"_cuda.so cannot be loaded into torch {torch.__version__}: {path}: "
    )
    path.unlink()
    assert str(library._load_cuda(path, None)).startswith(
        "_cuda.so is not built: it is when bkind3d is installed where"
    )


@pytest.mark.parametrize(
    ("architectures", "runs"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)]),
        ("8.6", [(8, 6), (8, 9)]),
        ("9.0", [(9, 0)]),
        ("8.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]),
        ("8.0 9.0a+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]),
        ("10.0 12.0", [(10, 0), (12, 0), (12, 1)]),
    ],
)
def test_which_gpus_an_architecture_runs_on(architectures: str, runs: list[tuple[int, int]]) -> None:
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]
    assert [gpu for gpu in gpus if library.runs_on(architectures, *gpu)] == runs


def test_reasons_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_REASONS", {"_cuda": None})
    monkeypatch.setattr(library, "_ARCHITECTURES", "8.0 9.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert library.cuda_unavailable("cuda", torch.float32) == "there is no CUDA device"
    assert library.cuda_unavailable("cpu", torch.float32) == "made for CUDA tensors, not cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert library.cuda_unavailable("cuda", torch.float32) is None
    assert library.cuda_unavailable("cuda", torch.int32) == (
        "torch.int32 is not one of float32, bfloat16, float16, float64"
    )
    gpu.major, gpu.minor = 7, 5
    assert library.cuda_unavailable("cuda", torch.float32) == "_cuda.so was built for 8.0 9.0, and this GPU is 7.5"


# ---- instruction sets ----


@built
def test_instruction_set_for_a_while() -> None:
    before = library.instruction_set()
    assert before in library.INSTRUCTION_SETS
    with library.use_instruction_set("baseline"):
        assert library.instruction_set() == "baseline"
        assert soft_argmax3d(torch.zeros(1, 1, 4, 4, 4), GRID, backend="cpp").tolist() == [[[0.0, 0.0, 0.0]]]
    assert library.instruction_set() == before
    with pytest.raises(ZeroDivisionError), library.use_instruction_set("baseline"):
        raise ZeroDivisionError
    assert library.instruction_set() == before


@built
def test_unknown_instruction_set() -> None:
    before = library.instruction_set()
    with (
        pytest.raises(RuntimeError, match="name 'sse9': expected baseline, avx2 or avx512"),
        library.use_instruction_set("sse9"),
    ):
        pass
    assert library.instruction_set() == before


@built
def test_instruction_set_beyond_the_processor() -> None:
    best = library.INSTRUCTION_SETS.index(run(SHOW, BKIND3D_CPU_ISA="").strip())
    for name in library.INSTRUCTION_SETS[best + 1 :]:
        with (
            pytest.raises(RuntimeError, match=f"name '{name}': this processor or build has"),
            library.use_instruction_set(name),
        ):
            pass


SHOW = "from bkind3d_kernels import library; print(library.instruction_set())"


@built
def test_variable_names_the_instruction_set() -> None:
    assert run(SHOW, BKIND3D_CPU_ISA="baseline") == "baseline\n"
    assert run(SHOW, BKIND3D_CPU_ISA="") == run(
        "import os; del os.environ['BKIND3D_CPU_ISA']; " + SHOW, BKIND3D_CPU_ISA=""
    )


@built
def test_bad_variable_is_an_error_at_every_call() -> None:
    code = """
import torch
from bkind3d_kernels import VoxelGrid, info, soft_argmax3d
for _ in range(2):
    try:
        soft_argmax3d(torch.zeros(1, 1, 4, 4, 4), VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 4))
    except RuntimeError as error:
        print(error)
print(info.report())
"""
    text = run(code, BKIND3D_CPU_ISA="sse9", BKIND3D_BACKEND="")
    assert text.count("BKIND3D_CPU_ISA 'sse9': expected baseline, avx2 or avx512") == 3
    assert "instruction set error: " in text


@built
def test_description() -> None:
    first, second, *_ = library.describe()
    assert first == f"C++      {Path(library.FOLDER) / '_cpu.so'}"
    variable = os.environ.get("BKIND3D_CPU_ISA") or "unset"
    assert second == f"         instruction set {library.instruction_set()} (BKIND3D_CPU_ISA {variable})"
