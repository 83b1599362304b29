"""Build of the native libraries; all metadata is in pyproject.toml.

``bkind3d_kernels/_cpu.so`` (csrc/schema.cpp and csrc/cpu) and ``_cuda.so`` (csrc/cuda) are plain shared libraries over
torch's stable ABI, loaded with ``torch.ops.load_library``: they hold no Python symbol, so one wheel tagged
``py3-none-<platform>`` serves every Python, and every torch from 2.10 on. ninja compiles them: the loops for CPUs are
compiled once per instruction set, each with its own flags; nvcc compiles for several architectures at once. torch may
be a build without CUDA, and no GPU is asked for.

Environment: CXX names the compiler; BKIND3D_CXXFLAGS and BKIND3D_LDFLAGS are added at the end (for the CPU alone), and
BKIND3D_BUILD is the folder of the objects (sanitizers); MAX_JOBS limits the compilers that run at once. BKIND3D_CUDA is
auto (where there is nvcc), 1 (or fail) or 0; CUDA_HOME says where nvcc is, TORCH_CUDA_ARCH_LIST what it compiles for.
Without a compiler the package is installed without the libraries; ``python -m bkind3d_kernels.info`` then says so. A
compiler that fails is an error.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / (os.environ.get("BKIND3D_BUILD") or "build/native")
COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-unknown-pragmas",
]
X86 = platform.machine() in ("x86_64", "AMD64")
X86_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
# Machine code for these, and PTX of the last for what comes after.
RELEASED = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# What csrc/cuda takes of torch's CUDA library.
TORCH_CUDA_FUNCTIONS = (
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
)


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names; None where there is none."""
    if named := os.environ.get("CXX"):
        if shutil.which(shlex.split(named)[0]) is None:
            sys.exit(f"setup.py: CXX={named}: there is no such command")
        return named
    if sys.platform == "win32":
        return None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def ninja() -> str:
    """The ninja executable, of the Python package or of the system."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            sys.exit("setup.py: ninja is needed to build the C++ kernels: pip install ninja")
        return found


def ninja_text(words: list[str]) -> str:
    """A command line as a value in build.ninja."""
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path | str) -> str:
    """A path in a build statement of build.ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write(path: Path, lines: list[str]) -> Path:
    """A file of these lines, untouched if it is one already."""
    text = "\n".join([*lines, ""])
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def cuda_compiler() -> str | None:
    """nvcc: that of $CUDA_HOME, of PATH, or of /usr/local/cuda; None where there is none, or with BKIND3D_CUDA=0."""
    wanted = os.environ.get("BKIND3D_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"setup.py: BKIND3D_CUDA={wanted}: expected auto, 1 or 0")
    home = os.environ.get("CUDA_HOME")
    found = shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or (
        not home and shutil.which("/usr/local/cuda/bin/nvcc")
    )
    if wanted == "1" and not found:
        sys.exit("setup.py: BKIND3D_CUDA=1, but there is no nvcc: set CUDA_HOME")
    return found or None if wanted != "0" and sys.platform == "linux" else None


def cuda_architectures(nvcc: str) -> list[str]:
    """Such as "9.0" or "12.0+PTX": those of TORCH_CUDA_ARCH_LIST, or all that this nvcc knows of those of a release.

    The GPU of this machine, if there is one, plays no part.
    """
    if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        bad = [name for name in chosen if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]
        if bad:
            sys.exit(f"setup.py: TORCH_CUDA_ARCH_LIST: {' '.join(bad)}: expected numbers such as 9.0 or 12.0+PTX")
        return chosen
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    names = [name for name in RELEASED if f"compute_{name.replace('.', '')}" in known]
    return [*names[:-1], f"{names[-1]}+PTX"]


def generated_code(architectures: list[str]) -> list[str]:
    """nvcc's options: machine code for each architecture, and PTX where the name asks for it."""
    options = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def cpu_statements(target: Path) -> list[str]:
    """Of build.ninja for _cpu.so: every csrc/cpu/*_loops.cpp once per instruction set, the rest once."""
    sets = X86_SETS if X86 else {"baseline": []}
    lines, objects = [], []
    # The loops first: they take longest.
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"), key=lambda p: (not p.stem.endswith("_loops"), p.stem))
    for source in [*sources, ROOT / "csrc/schema.cpp"]:
        for name, options in sets.items() if source.stem.endswith("_loops") else [("", [])]:
            object_ = f"{source.stem}{'.' if name else ''}{name}.o"
            objects.append(object_)
            lines.append(f"build {object_}: compile {ninja_path(source)}")
            if name:
                lines.append(f"  own = {ninja_text([f'-DBKIND3D_ISA={name}', *options])}")
    return [*lines, f"build {ninja_path(target)}: link {' '.join(objects)}"]


def cuda_statements(target: Path, nvcc: str, cxx: str, torch_flags: list[str]) -> list[str]:
    """Of build.ninja for _cuda.so: every csrc/cuda/*.cu by nvcc, whose report of registers is kept beside the object,
    and every csrc/cuda/*.cpp, a face, by the C++ compiler, without CUDA's headers.

    It is linked against a libtorch_cuda.so made here, with nothing in it but the functions that are used: torch may be
    a build without CUDA, and the linker refuses what is not among them.
    """
    architectures = cuda_architectures(nvcc)
    host = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", f"-ffile-prefix-map={ROOT}/="]
    program = [word for word in shlex.split(cxx) if not word.startswith("-")][-1]  # of "ccache g++ -m64": g++
    flags = ["-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v", "--threads=2", *torch_flags, "-DUSE_CUDA"]
    flags += [f"-Xcompiler={','.join(host)}", *generated_code(architectures)]
    libraries = ["-L.", "-ltorch_cuda", "-cudart=static", "-ldl", "-lrt", "-lpthread", "-Xlinker=--exclude-libs=ALL"]
    lines = [
        f"nvcc = {ninja_text([nvcc, '-ccbin', program])}",
        f"cuda_flags = {ninja_text(flags)}",
        f"libraries_of_cuda = {ninja_text(libraries)}",
        "rule cuda",
        "  command = $nvcc -MD -MF $out.d $cuda_flags -c $in -o $out >$out.ptxas 2>&1 || { cat $out.ptxas; false; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cuda_link",
        "  command = $nvcc -shared -Xlinker=-z,defs,--no-as-needed $objects $libraries_of_cuda $libraries -o $out",
        "rule stub",
        "  command = $cxx -shared -fPIC -nostdlib -x c $in -Wl,-soname,$out -o $out",
    ]
    write(BUILD / "torch_cuda.c", [f"void {name}(void) {{}}" for name in TORCH_CUDA_FUNCTIONS])
    face_flags = ["-DUSE_CUDA", f'-DBKIND3D_ARCHITECTURES="{" ".join(architectures)}"']
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        objects.append(f"{source.stem}.cu.o")
        lines.append(f"build {objects[-1]}: cuda {ninja_path(source)}")
    for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
        objects.append(f"{source.stem}.cuda.o")
        lines.append(f"build {objects[-1]}: compile {ninja_path(source)}")
        lines.append(f"  own = {ninja_text(face_flags)}")
    lines += [
        "build libtorch_cuda.so: stub torch_cuda.c",
        f"build {ninja_path(target)}: cuda_link {' '.join(objects)} | libtorch_cuda.so",
        f"  objects = {' '.join(objects)}",
    ]
    return lines


def write_ninja(cxx: str, nvcc: str | None) -> Path:
    """build.ninja for the libraries."""
    from torch.utils.cpp_extension import include_paths, library_paths

    torch_flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10: nothing newer may be used
    torch_flags += [word for path in include_paths() for word in ("-isystem", path)]
    flags = [*COMMON_FLAGS, *torch_flags, f"-ffile-prefix-map={ROOT}/=", *(["-DBKIND3D_HAS_X86"] if X86 else [])]
    link_flags = ["-shared"] if sys.platform == "darwin" else ["-shared", "-Wl,-z,defs"]  # darwin: a default
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lm"]
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {ninja_text(shlex.split(cxx))}",
        f"flags = {ninja_text([*flags, *shlex.split(os.environ.get('BKIND3D_CXXFLAGS', ''))])}",
        f"link = {ninja_text(link_flags)}",
        f"libraries = {ninja_text([*libraries, *shlex.split(os.environ.get('BKIND3D_LDFLAGS', ''))])}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $own -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $link $in $libraries -o $out",
    ]
    if nvcc:  # first: nvcc takes longest
        lines += cuda_statements(BUILD / "_cuda.so", nvcc, cxx, torch_flags)
    lines += cpu_statements(BUILD / "_cpu.so")
    return write(BUILD / "build.ninja", lines)


class BuildLibraries(build_ext):
    """Builds the libraries with ninja, and only what has changed."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        """Write build.ninja, run it, and put the libraries into their places."""
        from filelock import FileLock  # torch depends on it

        cxx = compiler()
        assert cxx
        BUILD.mkdir(parents=True, exist_ok=True)
        with FileLock(BUILD / "lock"):  # one build at a time: processes that share the tests want one each
            self.build_libraries(cxx)

    def build_libraries(self, cxx: str) -> None:
        """The same, with the folder of the objects for itself."""
        targets = [Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions]
        command = [ninja(), "--quiet", "-f", str(write_ninja(cxx, cuda_compiler())), "-C", str(BUILD)]
        command += [str(BUILD / target.name) for target in targets]
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run([*command, *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError:
            raise CompileError(f"{cxx} could not build the C++ kernels; its messages are above") from None
        # What an earlier build with nvcc left there would be packed.
        for stale in {targets[0].with_name("_cuda.so")} - set(targets):
            stale.unlink(missing_ok=True)
        for target in targets:
            # A new file in place of the old: overwriting a library that a process has loaded would crash it.
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = target.with_suffix(".new")
            shutil.copyfile(BUILD / target.name, copy)
            copy.replace(target)


class AnyPython(bdist_wheel):
    """Tags the wheel py3-none-<platform>, and py3-none-any without the library."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python, this platform."""
        return "py3", "none", super().get_tag()[2]


EXTENSIONS = [Extension("bkind3d_kernels._cpu", sources=[])]
if compiler() is None:
    print("setup.py: no C++ compiler (CXX, c++, g++, clang++): installing without the C++ kernels", file=sys.stderr)
    EXTENSIONS = []
elif cuda_compiler():
    EXTENSIONS.append(Extension("bkind3d_kernels._cuda", sources=[]))

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython})
