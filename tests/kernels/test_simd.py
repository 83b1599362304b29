"""The vectors of csrc/cpu/simd.h, for every instruction set: exponentials to the ulp, the half formats bit by bit."""

import ast
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from bkind3d_kernels.library import INSTRUCTION_SETS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / p for p in ("tests/kernels/native_simd/simd.cpp", "csrc/cpu/simd.h", "csrc/common/portable.h")]
X86 = platform.machine() in ("x86_64", "AMD64")
COMPILER = next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c)), None)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def build_flags() -> tuple[list[str], dict[str, list[str]]]:
    """COMMON_FLAGS and X86_SETS of setup.py, which cannot be imported: it would run."""
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("COMMON_FLAGS", "X86_SETS")
    }
    return constants["COMMON_FLAGS"], constants["X86_SETS"]


def runs_here(name: str) -> bool:
    """Whether this processor has the instruction set."""
    if name == "baseline":
        return True
    cpu = torch.backends.cpu.get_cpu_capability()
    return X86 and cpu in ({"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}[name])


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def simd(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The library of native_simd/simd.cpp for one instruction set, compiled when its sources have changed."""
    if not runs_here(request.param):
        pytest.skip(f"this processor has no {request.param}")
    common, sets = build_flags()
    command = [str(COMPILER), *common, *(sets[request.param] if X86 else []), f"-DBKIND3D_ISA={request.param}"]
    command += [f"-I{ROOT}", "-shared", str(SOURCES[0])]
    key = hashlib.sha256(" ".join(command).encode() + b"".join(p.read_bytes() for p in SOURCES)).hexdigest()[:16]
    target = ROOT / "build" / "tests" / f"simd-{request.param}-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(target)
    return ctypes.CDLL(str(target))


FLOATS = {"float": np.float32, "double": np.float64}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def call(simd: ctypes.CDLL, name: str, x: np.ndarray, result: np.dtype | type | None = None) -> np.ndarray:
    """y = name(x), elementwise."""
    padded = np.zeros(-(-x.size // 64) * 64, x.dtype)
    padded[: x.size] = x
    y = np.empty(padded.size, result or x.dtype)
    getattr(simd, name)(pointer(padded), pointer(y), ctypes.c_long(padded.size))
    return y[: x.size]


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    assert x.flags.c_contiguous
    return ctypes.c_void_p(x.ctypes.data)


# ---- exponentials ----


def test_exp_float_within_its_claim(simd: ctypes.CDLL) -> None:
    low, high = np.float32(-87.3365), np.float32(88.7228)
    # Every 307th float of the range, which visits all exponents and low bits, and both ends without gaps.
    patterns = np.concatenate([np.arange(0, bits(abs(end)), 307, np.uint32) | sign for end, sign in ends(low, high)])
    dense = [np.arange(bits(abs(e)) - 4096, bits(abs(e)) + 1, dtype=np.uint32) | s for e, s in ends(low, high)]
    x = np.concatenate([patterns, *dense]).view(np.float32)
    x = x[(x >= low) & (x <= high)]
    exact = np.exp(x.astype(np.float64))
    error = np.abs(call(simd, "exp_float", x) - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64)
    print(f"float: {error.max():.4f} ulp at {x[error.argmax()]!r}")
    assert error.max() <= 1.02


def test_powers_of_two_of_nonpositive_floats(simd: ctypes.CDLL) -> None:
    """Within the claim where the result is normal; below, what is left of it or 0."""
    low = -126.0
    x = -np.arange(0, bits(np.float32(-low)) + 1, 307, np.uint32).view(np.float32)
    truth = np.exp2(x.astype(np.float64))
    error = np.abs(call(simd, "exp2_float", x) - truth) / np.spacing(truth.astype(np.float32)).astype(np.float64)
    print(f"float: {error.max():.4f} ulp at {x[error.argmax()]!r}")
    assert error.max() <= 1.25
    x = np.array([0.0, -0.0, -np.inf, np.nan, -1e30, -151, -1e-30, -3e38], np.float32)
    np.testing.assert_array_equal(call(simd, "exp2_float", x), np.array([1, 1, 0, np.nan, 0, 0, 1, 0], np.float32))
    x = np.linspace(1.3 * low, low + 0.01, 10_000, dtype=np.float32)
    assert np.abs(call(simd, "exp2_float", x) - np.exp2(x.astype(np.float64))).max() < 2.0**-126


def bits(x: np.float32) -> int:
    return int(np.float32(x).view(np.uint32))


def ends(low: np.float32, high: np.float32) -> list[tuple[np.float32, np.uint32]]:
    return [(high, np.uint32(0)), (low, np.uint32(1 << 31))]


def test_exp_double_within_its_claim(simd: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    near = np.arange(-40, 41)[:, None] * np.log(2) / 2 + generator.normal(size=(81, 50)) * 1e-3
    x = np.concatenate([generator.uniform(-708, 709.7827, 20000), generator.uniform(-2, 2, 10000), near.ravel()])
    got = call(simd, "exp_double", x)
    with mpmath.workprec(120):
        exact = [mpmath.exp(mpmath.mpf(float(v))) for v in x]
        error = np.array([float(abs(mpmath.mpf(float(g)) - e) / np.spacing(float(e))) for g, e in zip(got, exact)])
    print(f"double: {error.max():.4f} ulp at {x[error.argmax()]!r}")
    assert error.max() <= 1.02


@pytest.mark.parametrize("name", FLOATS)
def test_exp_special_values(simd: ctypes.CDLL, name: str) -> None:
    dtype = FLOATS[name]
    x = np.array([0.0, -0.0, -np.inf, np.inf, np.nan, -1e30, 1e30, -800.0, 800.0, -5e-324, 1e-30], dtype)
    expected = np.array([1.0, 1.0, 0.0, np.inf, np.nan, 0.0, np.inf, 0.0, np.inf, 1.0, 1.0], dtype)
    np.testing.assert_array_equal(call(simd, f"exp_{name}", x), expected)
    low, high = {"float": (-87.34, 88.73), "double": (-708.0001, 709.7828)}[name]
    np.testing.assert_array_equal(call(simd, f"exp_{name}", np.array([low, high], dtype)), np.array([0, np.inf], dtype))
    curve = call(simd, f"exp_{name}", np.linspace(low, high, 100_000, dtype=dtype))
    assert np.all(curve[1:] >= curve[:-1])


# ---- bfloat16 and float16 ----


@pytest.mark.parametrize("name", HALVES)
def test_every_half_is_widened_exactly_and_comes_back(simd: ctypes.CDLL, name: str) -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(HALVES[name]).float().numpy()
    wide = call(simd, f"widen_{name}", patterns, np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(wide), nan)
    np.testing.assert_array_equal(wide.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    back = call(simd, f"narrow_{name}", wide, np.uint16)
    np.testing.assert_array_equal(back[~nan], patterns[~nan])
    assert np.isnan(call(simd, f"widen_{name}", back, np.float32)[nan]).all()


def hard_floats(dtype: torch.dtype) -> np.ndarray:
    """Every half, the midpoint above it and their neighbours, overflow, random patterns, NaNs of all kinds."""
    half = np.arange(65536, dtype=np.uint16).view(np.int16)
    wide = torch.from_numpy(half).view(dtype).float().numpy()
    finite = wide[np.isfinite(wide)]
    order = np.unique(finite)
    middles = ((order[:-1].astype(np.float64) + order[1:]) / 2).astype(np.float32)
    largest = order[-1].astype(np.float64)
    overflow = np.array([largest + (largest - order[-2]) / 2, largest * 2, 3.4028235e38], np.float64)
    overflow = np.minimum(overflow, 3.4028235e38).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    values = np.concatenate([finite, middles, overflow, random, nans, np.array([np.inf], np.float32)])
    with np.errstate(over="ignore", invalid="ignore"):
        steps = [np.nextafter(values, np.float32(end)) for end in (np.inf, -np.inf)]
    values = np.concatenate([values, *steps])
    return np.concatenate([values, -values])


@pytest.mark.parametrize("name", HALVES)
def test_floats_are_rounded_as_torch_does(simd: ctypes.CDLL, name: str) -> None:
    x = hard_floats(HALVES[name])
    expected = torch.from_numpy(x).to(HALVES[name]).view(torch.int16).numpy().view(np.uint16)
    got = call(simd, f"narrow_{name}", x, np.uint16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    assert np.isnan(call(simd, f"widen_{name}", got[nan], np.float32)).all()


# ---- the rest ----


@pytest.mark.parametrize("name", [*FLOATS, *HALVES])
def test_parts_of_a_vector(simd: ctypes.CDLL, name: str) -> None:
    dtype = FLOATS.get(name, np.uint16)
    lanes = getattr(simd, f"lanes_{name if name in FLOATS else 'float'}")()
    values = np.arange(1, lanes + 1).astype(np.float32)
    source = values.astype(dtype) if name in FLOATS else call(simd, f"narrow_{name}", values, np.uint16)
    for count in range(lanes + 1):
        target = np.zeros(lanes + 2, dtype)
        getattr(simd, f"copy_first_{name}")(pointer(source), pointer(target), ctypes.c_int(count))
        np.testing.assert_array_equal(target[:count], source[:count])
        assert not target[count:].any()


@pytest.mark.parametrize("name", FLOATS)
def test_floor_minimum_maximum_and_reductions(simd: ctypes.CDLL, name: str) -> None:
    dtype = FLOATS[name]
    lanes = getattr(simd, f"lanes_{name}")()
    x = np.concatenate([np.linspace(-5, 5, 201), [-0.0, 1e9, -1e9, 1e20, -np.inf, np.inf, np.nan]]).astype(dtype)
    np.testing.assert_array_equal(call(simd, f"floor_{name}", x), np.floor(x))

    nan, one = np.full(lanes, np.nan, dtype), np.arange(lanes, dtype=dtype)
    y = np.empty(2 * lanes, dtype)
    for function, numpy in (("min", np.fmin), ("max", np.fmax)):
        run = getattr(simd, f"{function}_{name}")
        other = one[::-1].copy()
        for a, b, expected in ((one, other, numpy(one, other)), (one, nan, one), (nan, one, nan)):
            run(pointer(a), pointer(b), pointer(y))
            np.testing.assert_array_equal(y[:lanes], expected)

    getattr(simd, f"reduce_{name}")(pointer(one), pointer(y))
    assert y[:2].tolist() == [one.sum(), one.max()]
    for lane in range(lanes):
        assert getattr(simd, f"first_lane_{name}")(pointer(np.where(one >= lane, one + 1, 0).astype(dtype))) == lane
    assert getattr(simd, f"first_lane_{name}")(pointer(np.zeros(lanes, dtype))) == -1

    scalar = {"float": ctypes.c_float, "double": ctypes.c_double}[name]
    for value in (2.5, -0.0, float("inf"), float("-inf"), float("nan")):
        getattr(simd, f"special_{name}")(scalar(value), pointer(y))
        np.testing.assert_array_equal(y, np.concatenate([one, np.full(lanes, value, dtype)]))
        assert np.isnan(value) or np.all(np.signbit(y[lanes:]) == np.signbit(value))
