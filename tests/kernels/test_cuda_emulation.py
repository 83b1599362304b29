"""The emulation of CUDA (native/cuda_emulation.h): what it computes, and that it finds what it is there to find."""

import subprocess

import pytest
from native import emulation, sanitize

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))


def probe(name: str, sanitizer: str = "") -> subprocess.CompletedProcess[str]:
    command = [*sanitize.fixed_addresses(), str(emulation.build("probe", sanitizer)), name]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def numbers(name: str, sanitizer: str = "") -> list[int]:
    done = probe(name, sanitizer)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("sanitizer", emulation.SANITIZERS)
def test_right_kernels(sanitizer: str) -> None:
    assert numbers("sum", sanitizer) == [64 * 65 // 2] * 128
    assert numbers("count", sanitizer)[:2] == [4, -1]  # from -1
    assert numbers("atomics", sanitizer) == [64, 32, 384, 63]


def test_lanes() -> None:
    out = numbers("lanes")
    assert out[:10] == [0b1001001001] * 10
    assert out[16:32] == [i + 3 if i % 8 < 5 else i for i in range(16, 32)]
    assert out[10] == out[9] + out[16]
    assert out[11] == 9 + 31 + 0xF00
    assert out[12:16] == [-1] * 4


@pytest.mark.parametrize("name", ["no barrier", "race of blocks"])
def test_races_are_found(name: str) -> None:
    done = probe(name, "thread")
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_an_access_beyond_shared_memory_is_found() -> None:
    done = probe("beyond", "address")
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: use-after-poison" in done.stderr


def test_a_missing_barrier_reads_nothing_sensible() -> None:
    assert numbers("no barrier") != numbers("sum")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent", "emulated launch: 32 threads wait at a barrier or shuffle that the others do not reach"),
        ("outside", "emulated launch: the lane is not in the mask of its shuffle"),
    ],
)
def test_faults_of_a_kernel_are_errors(name: str, message: str) -> None:
    assert message in probe(name).stdout
