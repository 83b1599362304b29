"""The CUDA kernels compiled by nvcc: registers, spills and shared memory within their budgets, symbols, loading."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/native"
NVCC = shutil.which("nvcc") or shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")
BINUTILS = shutil.which("nm") and shutil.which("c++filt")
RUNS = NVCC and BINUTILS and sys.platform == "linux"
pytestmark = pytest.mark.skipif(not RUNS, reason="needs nvcc and binutils")
if os.environ.get("CI") == "true":
    assert RUNS, "CI compiles the CUDA kernels: nvcc and binutils are needed"

ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0"
REGISTERS, SHARED = 65536, 100 * 1024  # of a multiprocessor; the least shared memory is that of sm_86, 89 and 120


class Budget(NamedTuple):
    """What a kernel is designed for, as its file says: threads of a block, blocks at once on a multiprocessor."""

    threads: int
    blocks: int


BUDGETS = {
    "group_norm_act": {
        r"(statistics|apply|group)_kernel<\w+, [124]>": Budget(256, 3),
        r"(statistics|apply|group)_kernel<\w+, 8>": Budget(256, 2),
        r"(sums|gradient|group_backward)_kernel<\(Mask\)\d, \w+, [124]>": Budget(256, 3),
        r"(sums|gradient|group_backward)_kernel<\(Mask\)\d, \w+, 8>": Budget(256, 2),
        "finish_statistics_kernel": Budget(128, 16),
        "finish_sums_kernel": Budget(128, 16),
        "parameters_kernel": Budget(128, 16),
    },
    "rasterize_edges": {
        "prepare_kernel": Budget(128, 8),
        "forward_kernel<float": Budget(128, 5),  # 8 where there is more shared memory
        "forward_kernel<double": Budget(128, 3),
        "backward_kernel<float": Budget(128, 8),
        "backward_kernel<double": Budget(128, 5),
        "finish_edges_kernel": Budget(256, 6),
        "finish_points_kernel": Budget(128, 12),
    },
    "soft_argmax3d": {
        "forward_kernel<(?:true|false), (?!double)": Budget(256, 3),
        "forward_kernel<(?:true|false), double": Budget(256, 2),
        "finish_kernel": Budget(64, 12),
        "backward_kernel<(?!double)": Budget(256, 3),
        "backward_kernel<double": Budget(256, 2),
        "backward_strided_kernel<(?!double)": Budget(256, 3),
        "backward_strided_kernel<double": Budget(256, 2),
    },
    "unproject": {
        r"forward_kernel<float, \d, true, true": Budget(128, 4),
        r"forward_kernel<float, \d, \w+, false": Budget(128, 3),
        r"forward_kernel<b?float16, \d, true": Budget(128, 3),
        r"forward_kernel<b?float16, \d, false": Budget(128, 2),
        "forward_kernel<double": Budget(128, 2),
        "backward_kernel": Budget(128, 2),
        "sum_rows_kernel": Budget(256, 4),
        "from_fixed_kernel": Budget(256, 8),
    },
}

REPORT = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
    r"Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """A line of nvcc's report."""

    stem: str
    name: str
    architecture: str
    stack: int
    registers: int
    shared: int

    def fault(self, budget: Budget) -> str | None:
        """What is wrong, or None. Registers come 256 at a time to a warp."""
        if self.stack:
            return f"{self.stack} bytes of stack"
        registers = -(-self.registers * 32 // 256) * 256 * budget.threads // 32
        fit = min(REGISTERS // registers, SHARED // (self.shared + 1024))
        return f"{fit} blocks fit, {budget.blocks} are wanted" if fit < budget.blocks else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the libraries are, built again if a source has changed; nvcc's reports are in BUILD."""
    target = tmp_path_factory.mktemp("cuda")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BKIND3D_")}
    environment["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(target)]
    subprocess.run(command, cwd=ROOT, env=environment | {"BKIND3D_CUDA": "1"}, check=True)
    return target / "bkind3d_kernels"


@pytest.fixture(scope="module")
def kernels(folder: Path) -> list[Kernel]:
    found = []
    for path in BUILD.glob("*.cu.o.ptxas"):
        if not (ROOT / "csrc/cuda" / path.name.removesuffix(".o.ptxas")).exists():
            continue  # of a source that is gone
        text = subprocess.run(["c++filt"], input=path.read_text(), check=True, capture_output=True, text=True).stdout
        names = re.findall(r"Compiling entry function '(.*)' for 'sm_", text)
        lines = REPORT.findall(path.read_text())
        assert len(lines) == len(names) > 0
        for (_, architecture, stack, _, registers, rest), name in zip(lines, names):
            shared = re.search(r"(\d+) bytes smem", rest)
            own = re.sub(r"\(anonymous namespace\)::|bkind3d::|^void ", "", name)
            numbers = int(stack), int(registers), int(shared[1]) if shared else 0
            found.append(Kernel(path.name.split(".")[0], own, architecture, *numbers))
    return found


def test_no_kernel_spills_or_crowds_out_others(kernels: list[Kernel]) -> None:
    faults = []
    for kernel in kernels:
        (budget,) = [b for pattern, b in BUDGETS[kernel.stem].items() if re.match(pattern, kernel.name)]
        if fault := kernel.fault(budget):
            faults.append(f"{kernel.name} {kernel.architecture}: {fault}")
    assert faults == []


def test_every_budget_is_of_a_kernel(kernels: list[Kernel]) -> None:
    for stem, budgets in BUDGETS.items():
        for pattern in budgets:
            assert any(re.match(pattern, kernel.name) for kernel in kernels if kernel.stem == stem), pattern


def names(path: Path, *options: str) -> list[str]:
    command = ["nm", "-D", *options, str(path)]
    return [
        line.split()[-1]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    ]


def test_library_asks_for_torchs_c_functions_and_the_system_alone(folder: Path) -> None:
    """No symbol of Python, none of torch's C++, and none of CUDA, whose runtime is linked in."""
    undefined = names(folder / "_cuda.so", "--undefined-only")
    allowed = r"(aoti_)?torch_\w+|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+TMCloneTable|__gmon_start__"
    assert [name for name in undefined if not re.fullmatch(allowed, name)] == []
    assert {name for name in undefined if "cuda" in name} == {
        "aoti_torch_device_type_cuda",
        "aoti_torch_get_current_cuda_stream",
        "torch_c10_cuda_check_msg",
        "torch_c10_cuda_free_error_msg",
    }
    cpu = names(folder / "_cpu.so", "--undefined-only")
    assert [name for name in cpu if "cuda" in name] == ["aoti_torch_device_type_cuda"]


def test_library_gives_nothing_that_could_clash(folder: Path) -> None:
    defined = names(folder / "_cuda.so", "--defined-only")
    allowed = r"_ZZ?(TI|TS|TV|N|NK)?St\w+|_edata|_end|__bss_start|_init|_fini"
    assert [name for name in defined if not re.fullmatch(allowed, name)] == []


LOAD = """
import ctypes, sys, torch
ctypes.CDLL(sys.argv[1])
for name in ("_cpu", "_cuda"):
    torch.ops.load_library(f"{sys.argv[2]}/{name}.so")
print(torch.ops.bkind3d.cuda_architectures())
for op in ("unproject", "soft_argmax3d", "rasterize_edges", "group_norm_act"):
    for name in (op, f"{op}_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bkind3d::{name}", "CUDA")
"""


def test_library_loads_and_registers_its_kernels(folder: Path) -> None:
    """Beside an empty libtorch_cuda.so where torch has none: nothing is called."""
    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build")
    command = [sys.executable, "-c", LOAD, str(BUILD / "libtorch_cuda.so"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ARCHITECTURES.replace(';', ' ')}\n"
