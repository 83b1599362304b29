"""The formulas of csrc/common as Python modules: compiled with ninja when a source has changed, without torch."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
from filelock import FileLock  # torch depends on it

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "tests" / "native"
COMPILER = next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c)), None)
STEMS = ("unproject", "soft_argmax3d", "rasterize_edges", "group_norm_act")
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-shared",
    "-Wall",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
]


def write_ninja() -> Path:
    includes = [str(ROOT), str(HERE), pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = shlex.join([*FLAGS, *(word for path in includes for word in ("-I", path))])
    lines = [
        "rule module",
        f"  command = {COMPILER} -MD -MF $out.d {flags} $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {stem}.so: module {HERE / stem}.cpp" for stem in STEMS),
        "",
    ]
    path = FOLDER / "build.ninja"
    path.write_text("\n".join(lines))
    return path


@cache
def load(stem: str) -> ModuleType:
    """The module of one operation."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / "lock"):  # the processes of a test run share the folder
        place = ["-C", str(FOLDER), "-f", str(write_ninja())]
        subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "--quiet", *place, f"{stem}.so"], check=True)
    spec = importlib.util.spec_from_file_location(stem, FOLDER / f"{stem}.so")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
