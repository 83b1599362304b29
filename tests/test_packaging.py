"""What an installation brings along, what importing a package loads, and what is in the wheel and its library."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import util
from pathlib import Path

import pytest

from bkind3d_kernels import backends

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_base_dependencies_are_torch_and_numpy() -> None:
    assert [line.split(">=")[0] for line in PROJECT["dependencies"]] == ["torch", "numpy"]
    assert not any("<" in line for line in PROJECT["dependencies"])


def test_no_extra_replaces_torch() -> None:
    """torchvision, timm and lightning pull a torch of their own choice over the one that is installed."""
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    assert not [line for line in lines if line.startswith(("torch", "timm", "lightning", "pytorch"))]


@pytest.mark.parametrize("package", ["bkind3d_kernels", "bkind3d_kernels.info"])
def test_kernels_import_torch_and_triton_alone(package: str) -> None:
    triton = "triton.language" if util.find_spec("triton") else "torch"
    code = (
        f"import sys, torch, {triton}; before = set(sys.modules); import {package}; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(sorted(name for name in new if not name.startswith('__editable__')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "['bkind3d_kernels']"


def test_kernels_name_no_higher_layer() -> None:
    for path in (ROOT / "bkind3d_kernels").rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.startswith(("import bkind3d.", "from bkind3d.", "from bkind3d "))], (
            path
        )


# ---- the wheel, built from the source distribution ----

COMPILER = next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c)), None)
LINUX = sys.platform == "linux"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_binutils = pytest.mark.skipif(
    not (LINUX and shutil.which("nm") and shutil.which("objdump")), reason="reads ELF files with binutils"
)


def environment(**changes: str) -> dict[str, str]:
    """Without what would change a build or an import, and without nvcc and optimisation, which take long.

    test_cuda_compile.py has the one, the fixture ``objects`` the other.
    """
    changing = ("BKIND3D_", "PYTHONPATH", "TORCH_CUDA_", "CUDA_", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(changing)}
    return kept | {"BKIND3D_CUDA": "0", "BKIND3D_CXXFLAGS": "-O0"} | changes


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the files that git knows, unpacked."""
    tree, unpacked = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment(), check=True, capture_output=True)
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    return unpacked / archive.name.removesuffix(".tar.gz")


def build_wheel(source: Path, name: str, **changes: str) -> Path:
    """``pip wheel`` into a folder of this name."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", name, "."]
    done = subprocess.run(command, cwd=source, env=environment(**changes), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    (wheel,) = (source / name).iterdir()
    return wheel


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    return build_wheel(source, "wheel")


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def run_installed(wheel: Path, folder: Path, *arguments: str) -> str:
    """What Python prints with nothing but the wheel and what the test run has installed, torch among it."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(folder), str(wheel)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(PYTHONPATH=str(folder)), check=True, capture_output=True, text=True
    ).stdout


CALL = """
import sys, torch, bkind3d_kernels as k
assert k.__file__.startswith(sys.argv[1]), k.__file__
x = torch.zeros(1, 1, 3, 3, 3, requires_grad=True)
k.soft_argmax3d(x, k.VoxelGrid.cube((1.0, 2.0, 3.0), 1.0, 3), backend=sys.argv[2]).sum().backward()
print(k.resolve("soft_argmax3d"), round(x.grad.abs().sum().item(), 4))
"""


@needs_compiler
def test_wheel_has_the_library_and_fits_every_python(wheel: Path) -> None:
    platform = re.sub("[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"bkind3d-{PROJECT['version']}-py3-none-{platform}.whl"
    names = names_in(wheel)
    assert "bkind3d_kernels/_cpu.so" in names
    assert {name.split("/")[0] for name in names} == {
        "bkind3d",
        "bkind3d_kernels",
        f"bkind3d-{PROJECT['version']}.dist-info",
    }
    modules = [name for name in names if ".dist-info/" not in name]
    assert {Path(name).suffix for name in modules} == {".py", ".so", ".j2"}
    assert sum(name.endswith(".so") for name in modules) == 1


@needs_compiler
def test_wheel_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    assert run_installed(wheel, tmp_path, "-c", CALL, str(tmp_path), "cpp") == "cpp 0.5556\n"
    text = subprocess.run(
        [sys.executable, "-m", "bkind3d_kernels.info"],
        cwd="/",
        env=environment(PYTHONPATH=str(tmp_path)),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"C++      {tmp_path / 'bkind3d_kernels' / '_cpu.so'}\n" in text
    assert "instruction set " in text
    assert "soft_argmax3d on cpu, float32: cpp" in text


@needs_compiler
def test_wheel_needs_no_compiler(wheel: Path, tmp_path: Path) -> None:
    """By the program with which ``make wheel`` tries a release; it looks at the version too."""
    run_installed(wheel, tmp_path, "-c", "import bkind3d_kernels")
    command = [sys.executable, str(ROOT / "tests/try_wheel.py"), PROJECT["version"]]
    done = subprocess.run(
        command, env=environment(PYTHONPATH=str(tmp_path), PATH="/nowhere"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": cpp agrees with the reference\n") == len(backends.OPERATIONS)


def test_changelog_knows_the_version(source: Path) -> None:
    for folder in (ROOT, source):
        assert f"\n## [{PROJECT['version']}] - 20" in (folder / "CHANGELOG.md").read_text()


@needs_compiler
def test_second_build_compiles_nothing(source: Path, wheel: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in (source / "build" / "native").glob("*.o")}
    assert len(times) > 5
    build_wheel(source, "again")
    assert times == {path: path.stat().st_mtime_ns for path in times}


@needs_compiler
def test_a_compiler_that_fails_is_an_error(source: Path, wheel: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "wheel", "again"))
    with pytest.raises(RuntimeError, match="false could not build the C\\+\\+ kernels; its messages are above"):
        build_wheel(copy, "wheel", CXX="false")
    with pytest.raises(RuntimeError, match="CXX=no-such-compiler: there is no such command"):
        build_wheel(copy, "wheel", CXX="no-such-compiler")


NVCC = """#!/bin/sh
echo "$@" >>"$0.log"
case "$*" in *-list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit;; esac
for word; do
  case "$before" in -o) out=$word;; -MF) echo "$out: " >"$word";; esac
  case "$word" in -c|-shared) kind=$word;; esac
  before=$word
done
echo "int f;" | cc -fPIC $kind -x c - -o "$out"
"""


@needs_compiler
@needs_binutils
def test_with_nvcc(source: Path, wheel: Path, tmp_path: Path) -> None:
    """One that writes down what it is asked to do, and compiles nothing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    home = {"BKIND3D_CUDA": "auto", "CUDA_HOME": str(tmp_path)}
    libraries = [name for name in names_in(build_wheel(source, "with-nvcc", **home)) if name.endswith(".so")]
    assert sorted(libraries) == ["bkind3d_kernels/_cpu.so", "bkind3d_kernels/_cuda.so"]
    (compilation, *_) = [
        line for line in (tmp_path / "bin/nvcc.log").read_text().splitlines() if "soft_argmax3d.cu" in line
    ]
    assert re.findall("-gencode=arch=(\\S+)", compilation) == [
        "compute_80,code=sm_80",
        "compute_90,code=sm_90",
        "compute_90,code=compute_90",
    ]
    libraries = [name for name in names_in(build_wheel(source, "without-nvcc")) if name.endswith(".so")]
    assert libraries == ["bkind3d_kernels/_cpu.so"]
    with pytest.raises(RuntimeError, match="TORCH_CUDA_ARCH_LIST: Ampere: expected numbers"):
        build_wheel(source, "bad", **home, TORCH_CUDA_ARCH_LIST="8.0;Ampere")
    with pytest.raises(RuntimeError, match="BKIND3D_CUDA=yes: expected auto, 1 or 0"):
        build_wheel(source, "bad", BKIND3D_CUDA="yes")
    with pytest.raises(RuntimeError, match="BKIND3D_CUDA=1, but there is no nvcc"):
        build_wheel(source, "bad", BKIND3D_CUDA="1", CUDA_HOME="/nowhere")


def test_without_a_compiler(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if COMPILER:
        request.getfixturevalue("wheel")  # so that a library is there already: it must not be packed
        shutil.copyfile(source / "build" / "native" / "_cpu.so", source / "bkind3d_kernels" / "_cpu.so")
    changes = {"PATH": "/nowhere", "CXX": ""}
    wheel = build_wheel(source, "pure", **changes)
    assert wheel.name == f"bkind3d-{PROJECT['version']}-py3-none-any.whl"
    assert not [name for name in names_in(wheel) if name.endswith(".so")]
    text = run_installed(wheel, tmp_path, "-m", "bkind3d_kernels.info")
    assert "C++      _cpu.so is not built: " in text
    assert "install g++ or clang++" in text
    assert "soft_argmax3d on cpu, float32: reference" in text
    assert run_installed(wheel, tmp_path, "-c", CALL, str(tmp_path), "auto") == "reference 0.5556\n"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_installed(wheel, tmp_path, "-c", CALL, str(tmp_path), "cpp")
    assert "BackendUnavailable: backend 'cpp' cannot run soft_argmax3d: _cpu.so is not built: " in caught.value.stderr


# ---- what the library asks for and gives ----


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and name, as nm prints them."""
    lines = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout.splitlines()
    return [(fields[-2], fields[-1]) for fields in map(str.split, lines) if len(fields) >= 2]


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the library that make has built here, optimised as in a release; built again if a source has changed."""
    place = ["--build-lib", str(tmp_path_factory.mktemp("library"))]
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *place], cwd=ROOT, check=True)
    return ROOT / "build" / "native"


def compiled(objects: Path) -> list[Path]:
    """The object files of today's sources, those of nvcc left out."""
    names = re.findall(r"^build (\S+\.o): compile ", (objects / "build.ninja").read_text(), re.MULTILINE)
    assert len(names) > 5
    return [objects / name for name in names]


@needs_compiler
@needs_binutils
def test_library_asks_for_torchs_c_functions_and_the_system_alone(objects: Path) -> None:
    """No symbol of Python, and none of torch's C++: those differ from version to version."""
    undefined = [name for _, name in symbols(objects / "_cpu.so", "-D", "--undefined-only")]
    # Functions of C; symbols that carry the version of a system library; what the linker looks for if it is there.
    allowed = r"(aoti_)?torch_\w+|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+TMCloneTable|__gmon_start__"
    assert [name for name in undefined if not re.fullmatch(allowed, name)] == []
    assert "aoti_torch_get_sizes" in undefined
    assert not [name for name in undefined if re.match(r"_?Py|_ZNK?(2at|3c10|5torch)", name)]


@needs_compiler
@needs_binutils
def test_library_gives_nothing_that_could_clash(objects: Path) -> None:
    """Its functions are hidden; what is left are marks of the linker and parts of libstdc++."""
    defined = [name for _, name in symbols(objects / "_cpu.so", "-D", "--defined-only")]
    allowed = r"_ZZ?(TI|TS|TV|N|NK)?St\w+|_edata|_end|__bss_start|_init|_fini"
    assert [name for name in defined if not re.fullmatch(allowed, name)] == []


LOOPS = re.compile(r"\w+_loops\.(\w+)\.o")


@needs_compiler
@needs_binutils
def test_loops_share_no_function_between_instruction_sets(objects: Path) -> None:
    """An inline function of a header, compiled with AVX-512, must not be the one that the linker keeps for everyone."""
    found = set()
    for path in compiled(objects):
        if not (loops := LOOPS.fullmatch(path.name)):
            continue
        isa = loops[1]
        found.add(isa)
        for kind, name in symbols(path, "--defined-only", "--extern-only"):
            assert kind not in "WVu", (path.name, name)
            assert name.startswith(f"_ZN7bkind3d{len(isa)}{isa}"), (path.name, name)
    assert "baseline" in found


REGISTERS = {"baseline": "[yz]mm", "avx2": "zmm", "avx512": None}


@needs_compiler
@needs_binutils
def test_wide_registers_are_used_by_their_loops_alone(objects: Path) -> None:
    for path in compiled(objects):
        loops = LOOPS.fullmatch(path.name)
        forbidden = REGISTERS[loops[1] if loops else "baseline"]
        if forbidden:
            code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
            assert not re.search(f"%{forbidden}[0-9]", code), path.name
