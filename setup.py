"""Build of the native libraries; all metadata is in pyproject.toml.

``bkind3d_kernels/_cpu.so`` (csrc/schema.cpp and csrc/cpu) is a plain shared library over torch's stable ABI, loaded
with ``torch.ops.load_library``: it holds no Python symbol, so one wheel tagged ``py3-none-<platform>`` serves every
Python, and every torch from 2.10 on. ninja compiles it: the loops are compiled once per instruction set, each with its
own flags.

Environment: CXX names the compiler; BKIND3D_CXXFLAGS and BKIND3D_LDFLAGS are added at the end, and BKIND3D_BUILD is the
folder of the objects (sanitizers); MAX_JOBS limits the compilers that run at once.
Without a compiler the package is installed without the library; ``python -m bkind3d_kernels.info`` then says so. A
compiler that fails is an error.
"""

from __future__ import annotations

import os
import platform
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
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # torch 2.10: nothing newer may be used
]
X86_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


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


def write_ninja(folder: Path, target: Path, cxx: str) -> Path:
    """build.ninja for ``target``: every csrc/cpu/*_loops.cpp once per instruction set, the rest once."""
    from torch.utils.cpp_extension import include_paths, library_paths

    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = X86_SETS if x86 else {"baseline": []}
    compile_flags = [*COMMON_FLAGS, f"-ffile-prefix-map={ROOT}/=", *(["-DBKIND3D_HAS_X86"] if x86 else [])]
    for path in include_paths():
        compile_flags += ["-isystem", path]
    link_flags = ["-shared"] if sys.platform == "darwin" else ["-shared", "-Wl,-z,defs"]  # darwin: a default
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-ltorch", "-lm"]
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {ninja_text(shlex.split(cxx))}",
        f"flags = {ninja_text([*compile_flags, *shlex.split(os.environ.get('BKIND3D_CXXFLAGS', ''))])}",
        f"link = {ninja_text(link_flags)}",
        f"libraries = {ninja_text([*libraries, *shlex.split(os.environ.get('BKIND3D_LDFLAGS', ''))])}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $link $in $libraries -o $out",
    ]
    objects = []
    # The loops first: they take longest.
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"), key=lambda p: (not p.stem.endswith("_loops"), p.stem))
    for source in [*sources, ROOT / "csrc/schema.cpp"]:
        for name, options in sets.items() if source.stem.endswith("_loops") else [("", [])]:
            object_ = f"{source.stem}{'.' if name else ''}{name}.o"
            objects.append(object_)
            lines.append(f"build {object_}: compile {ninja_path(source)}")
            if name:
                lines.append(f"  isa = {ninja_text([f'-DBKIND3D_ISA={name}', *options])}")
    lines += [f"build {ninja_path(target)}: link {' '.join(objects)}", f"default {ninja_path(target)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text("\n".join(lines))
    return path


class BuildLibrary(build_ext):
    """Builds _cpu.so with ninja, and only what has changed."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of a Python version."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Write build.ninja, run it, and put the library into its place."""
        cxx = compiler()
        assert cxx
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        built = BUILD / target.name
        script = write_ninja(BUILD, built, cxx)
        command = [ninja(), "--quiet", "-f", str(script), "-C", str(BUILD)]
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run([*command, *(["-j", jobs] if jobs else [])], check=True)
        except subprocess.CalledProcessError:
            raise CompileError(f"{cxx} could not build the C++ kernels; its messages are above") from None
        # A new file in place of the old: overwriting a library that a process has loaded would crash it.
        copy = target.with_suffix(".new")
        shutil.copyfile(built, copy)
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

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
