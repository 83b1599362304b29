"""Build of the native libraries; all metadata is in pyproject.toml.

``bkind3d_kernels/_cpu.so`` (csrc/schema.cpp and csrc/cpu) is a plain shared library over torch's stable ABI, loaded with
``torch.ops.load_library``: it holds no Python symbol, so one wheel tagged ``py3-none-<platform>`` serves every Python, and
every torch from 2.10 on. ninja compiles it, since the loops are compiled once per instruction set with flags of their own.

Environment: CXX names the compiler, BKIND3D_CXXFLAGS and BKIND3D_LDFLAGS are added at the end (sanitizers).
Without a compiler the package is installed without the library; ``python -m bkind3d_kernels.info`` then says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
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
    """The C++ compiler: $CXX, or the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


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


def write_ninja(folder: Path, target: Path, cxx: str) -> Path:
    """build.ninja for ``target``: every csrc/cpu/*_loops.cpp once per instruction set, the rest once."""
    from torch.utils.cpp_extension import include_paths, library_paths

    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = X86_SETS if x86 else {"baseline": []}
    flags = [*COMMON_FLAGS, *(["-DBKIND3D_HAS_X86"] if x86 else []), *(f"-isystem {path}" for path in include_paths())]
    flags.append(os.environ.get("BKIND3D_CXXFLAGS", ""))
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch", "-lm"]
    lines = [
        "ninja_required_version = 1.8",
        f"cxx = {cxx}",
        f"flags = {' '.join(flags)}",
        f"link = -shared -Wl,-z,defs {' '.join(libraries)} {os.environ.get('BKIND3D_LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $link -o $out",
    ]
    objects = []
    # The loops first: they take longest.
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"), key=lambda p: not p.stem.endswith("_loops"))
    for source in [*sources, ROOT / "csrc/schema.cpp"]:
        for name, options in sets.items() if source.stem.endswith("_loops") else [("", [])]:
            object_ = f"{source.stem}{'.' if name else ''}{name}.o"
            objects.append(object_)
            lines.append(f"build {object_}: compile {source}")
            if name:
                lines.append(f"  isa = -DBKIND3D_ISA={name} {' '.join(options)}")
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "build.ninja"
    path.write_text("\n".join(lines))
    return path


class BuildLibrary(build_ext):
    """Builds _cpu.so with ninja, and only what has changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        assert cxx
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        built = ROOT / "build" / "native" / target.name
        script = write_ninja(built.parent, built, cxx)
        subprocess.run([ninja(), "-f", str(script), "-C", str(script.parent)], check=True)
        # A new file in place of the old: overwriting a library that a process has loaded would crash it.
        copy = target.with_suffix(".new")
        shutil.copyfile(built, copy)
        copy.replace(target)


class AnyPython(bdist_wheel):
    """Tags the wheel py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", platform_tag


EXTENSIONS = [Extension("bkind3d_kernels._cpu", sources=[])]
if compiler() is None:
    print("setup.py: no C++ compiler found (CXX, c++, g++, clang++): installing without the C++ kernels", file=sys.stderr)
    EXTENSIONS = []

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython})
