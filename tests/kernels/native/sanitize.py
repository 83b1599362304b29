"""``make sanitize``: builds the C++ kernels with sanitizers, beside the installed ones, and runs exercise.py with each;
then the CUDA kernels as C++ (cuda_emulation.h), with exercise_cuda.py. ``sanitize.py NAME`` runs one of the two alone.

- address, undefined: AddressSanitizer and UndefinedBehaviorSanitizer, which end the run at the first report;
- thread: ThreadSanitizer, over OpenMP regions on threads that it can follow (openmp_threads.cpp).

What each shows and what not: csrc/README.md. Needs g++, which brings the sanitizers' libraries along.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock  # torch depends on it

if __package__:
    from . import emulation
else:
    import emulation  # type: ignore[import-not-found, no-redef]

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FOLDER = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX") or "g++"
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -D_GLIBCXX_ASSERTIONS",
    "thread": "-fsanitize=thread",
}
THREADS = {"address": ("1", "3"), "thread": ("3",)}  # of the calls; one thread alone has no races
OPTIONS = {
    # Python and torch leave memory behind when they end.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"},
}


def runtime(name: str) -> str:
    path = subprocess.run([CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"sanitize: {CXX} has no {name}; g++ brings it along")
    return path


def build(name: str) -> Path:
    """The package with its library instrumented: a folder for PYTHONPATH."""
    target = FOLDER / name / "lib"
    environment = os.environ | {
        "CXX": CXX,
        "BKIND3D_BUILD": str(FOLDER / name / "native"),
        "BKIND3D_CUDA": "0",
        "BKIND3D_CXXFLAGS": f"{FLAGS[name]} -O1 -g1 -fno-omit-frame-pointer",
        "BKIND3D_LDFLAGS": FLAGS[name],
    }
    # build_py would keep a module that has been removed.
    shutil.rmtree(target, ignore_errors=True)
    place = ["--build-lib", str(target)]
    command = [sys.executable, "setup.py", "-q", "build_py", *place, "build_ext", *place]
    with FileLock(FOLDER / "lock"):  # setuptools writes beside setup.py
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return target


def preloaded(name: str) -> list[str]:
    if name == "address":
        return [runtime("libasan.so"), runtime("libubsan.so")]
    library = FOLDER / "libopenmp_threads.so"
    source = HERE / "openmp_threads.cpp"
    command = [CXX, "-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-fsanitize=thread", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return [runtime("libtsan.so"), str(library)]


def fixed_addresses() -> list[str]:
    """ThreadSanitizer cannot start where the kernel places libraries too randomly; this turns that off if it may."""
    command = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    return []


def run(name: str, environment: dict[str, str], script: str, *arguments: str) -> None:
    command = [*fixed_addresses(), sys.executable, str(HERE / script), *arguments]
    if code := subprocess.run(command, cwd=ROOT, env=environment).returncode:
        sys.exit(f"sanitizer {name}: {script} failed with exit status {code}")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or FLAGS:
        target = build(name)
        environment = os.environ | OPTIONS[name] | {"PYTHONPATH": str(target), "LD_PRELOAD": ":".join(preloaded(name))}
        print(f"sanitizer {name}:", flush=True)
        run(name, environment, "exercise.py", str(target), *THREADS[name])
        run(name, environment, "exercise_cuda.py", str(emulation.build("emulation.so", name)))


if __name__ == "__main__":
    main()
