"""What runs on a machine with a GPU, tried on the CPU: the script as a whole, and that each check can fail."""

import csv
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import device_checks, gpu_report, largest_volume, measure, numerics, parts, plots, problems
from benchmarks.device_checks import Subject, Wrong
from benchmarks.problems import Workload, competitors, operation
from benchmarks.suite import Settings, Suite, cases
from bkind3d_kernels import library
from bkind3d_kernels.backends import OPERATIONS, Availability

ROOT = Path(__file__).parents[2]
OP = "soft_argmax3d"
compiled = pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def wheel(folder: Path) -> Path:
    """The kernels of this tree, with their library, as pip would install them."""
    path = folder / "bkind3d-0.0.1-py3-none-any.whl"
    files = [file for file in (ROOT / "bkind3d_kernels").rglob("*") if file.suffix in (".py", ".so")]
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: bkind3d\nVersion: 0.0.1\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(ROOT))
        for name, text in about.items():
            archive.writestr(f"bkind3d-0.0.1.dist-info/{name}", text)
    return path


def test_the_script_with_a_wheel_on_the_cpu(tmp_path: Path) -> None:
    """The tests' environment has this tree's kernels too, and PYTHONPATH names them: the wheel's are taken."""
    out, carried = tmp_path / "out", wheel(tmp_path)
    environment = os.environ | {
        "DEVICE": "cpu",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WHEEL": str(tmp_path / "bkind3d-*.whl"),
        "ARGS": "--competitor reference cpp",
    }
    command = [str(ROOT / "benchmarks/gpu_check.sh"), str(out)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
    stages = read(out / "stages.csv")
    names = ["install", "info", "numerics", "checks", "sanitizer-cases", "training", "times", "largest-volume"]
    assert [row["stage"] for row in stages] == names
    assert {row["outcome"] for row in stages} == {"passed"}
    information = (out / "info.txt").read_text()
    assert "commit   " in information
    assert f"tested   {carried}\n" in information
    assert f"bkind3d  0.0.1, {out / 'venv'}" in information
    assert f"torch {torch.__version__.split('+')[0]}" in information
    assert json.loads((out / "times/machine.json").read_text())["kernels"].startswith(str(out / "venv"))
    checked = read(out / "checks.csv")
    assert {row["status"] for row in checked if row["check"] in ("CUDA graph", "second stream", "huge")} <= {"skipped"}
    assert all(row["competitor"] != "triton" for row in read(out / "times/results.csv"))
    assert {row["device"] for row in read(out / "largest_volume.csv")} == {"cpu"}
    assert {row["status"] for row in read(out / "training.csv")} == {"measured"}
    report = (out / "report.txt").read_text()
    for op in OPERATIONS:
        assert any(line.startswith(op) and "reference" in line and " ms" in line for line in report.splitlines()), op
    assert report in ended.stdout
    assert not (out / "work").exists()
    # What is there is kept.
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 2


def test_the_script_goes_on_when_stages_fail(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no torch here\nexit 3\n")
    broken.chmod(0o755)
    environment = os.environ | {"DEVICE": "cpu", "PYTHON": str(broken)}
    command = [str(ROOT / "benchmarks/gpu_check.sh"), str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    stages = read(tmp_path / "out/stages.csv")
    assert [row["outcome"] for row in stages if row["stage"] != "info"] == ["failed with status 3"] * 6
    assert "FAILED: info numerics checks sanitizer-cases training times largest-volume" in ended.stdout


# That each check fails when it should


def install(monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], Tensor]) -> Subject:
    """Make of 3D soft-argmax another function, of one tensor."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 5, 6, generator=generator, dtype=torch.float64)
    scene = numerics.Scene(OP, "fake", {"logits": logits}, lambda backend, logits: call(logits), ("logits",))
    monkeypatch.setattr(numerics, "scenes", lambda: iter([scene]))

    def apply(inputs: dict[str, Any], workload: Workload, backend: str) -> list[Tensor]:
        return [2 * inputs["logits"] if backend == "reference" else call(inputs["logits"])]

    monkeypatch.setattr(operation(OP), "apply", apply)
    return Subject(OP, "cpp", "cpu")


def half_written(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., :-1] = 2 * x[..., :-1]
    return y


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sizes": (lambda x: 2.02 * x, "off by"),
    "determinism": (lambda x: 2 * x + 1e-6 * torch.rand_like(x), "differs in"),
    "poison": (half_written, "not written"),
    "strides": (lambda x: 2 * x.as_strided(x.shape, torch.empty(x.shape).stride()), "off by"),
    "empty batch": (lambda x: 2 * x if len(x) else x.new_zeros(1, *x.shape[1:]) + x.sum(), "not \\(0, 2"),
    "autocast": (lambda x: x @ x.mT, "off|differs|bfloat16"),
    "compile": (lambda x: (3 if torch.compiler.is_compiling() else 2) * x, "off by"),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_check_passes_and_fails(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, words = FAULTS[check]
    device_checks.CHECKS[check](install(monkeypatch, lambda x: 2 * x))
    with pytest.raises(Wrong, match=words):
        device_checks.CHECKS[check](install(monkeypatch, fault))


def test_parts_of_a_huge_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, a problem that is called huge."""
    monkeypatch.setattr(device_checks, "HUGE_ELEMENTS", 1000)
    workload = Workload("huge", {"N": 1, "J": 40, "volume": (6, 6, 6)})
    device_checks.repeated(Subject(OP, "reference", "cpu"), workload, torch.bfloat16, "J")
    subject = install(monkeypatch, lambda x: torch.cat([2 * x[:, :-1], 3 * x[:, -1:]], dim=1))
    with pytest.raises(Wrong, match="part 39 of 40"):
        device_checks.repeated(subject, workload, torch.float32, "J")
    with pytest.raises(Wrong, match="too few elements"):
        device_checks.repeated(subject, Workload("small", {"N": 1, "J": 3, "volume": (6, 6, 6)}), torch.float32, "J")


@pytest.mark.parametrize("op", OPERATIONS)
def test_huge_workloads_are_huge_along_independent_parts(op: str) -> None:
    module = operation(op)
    for workload, dtype, parameter in getattr(module, "HUGE", ()):
        assert dtype in module.DTYPES
        assert parameter in module.SLICES
        assert module.floor(workload, module.VARIANTS[0], "backward", 1).read > 2**31


@compiled
def test_rows_of_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(subject: Subject) -> None:
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setitem(device_checks.CHECKS, "sizes", broken)
    chosen = ("--backend", "cpp", "--op", OP, "--check", "sizes", "huge", "empty batch")
    assert device_checks.main([*chosen, "--out", str(tmp_path / "checks.csv")]) == 1
    rows = read(tmp_path / "checks.csv")
    assert [row["status"] for row in rows] == ["failed", "skipped", "passed"]
    assert rows[0]["reason"] == "RuntimeError: out of order"
    assert "needs a GPU" in capsys.readouterr().out
    # The GPU is lost: what follows is not run.
    monkeypatch.setattr(device_checks, "_usable", lambda: False)
    found = list(device_checks.rows([Subject(OP, "cpp", "cuda")], ["sizes", "poison"]))
    assert [row["status"] for row in found] == ["failed", "failed"]
    assert found[1]["reason"] == "not run: the GPU was lost in sizes"


def test_parts_that_crash_or_take_too_long() -> None:
    identity = {"op": OP, "quantity": "all"}
    wrong = parts.Part(("--device", "tpu"), identity)
    (row,) = parts.rows("benchmarks.numerics", [wrong], 2, 120)
    assert row["status"] == "failed"
    assert "status 2" in row["reason"]
    assert "tpu" in row["reason"]
    (row,) = parts.rows("benchmarks.numerics", [parts.Part((), identity)], 2, 0.01)
    assert (row["op"], row["status"]) == (OP, "failed")
    assert "no time was left" in row["reason"]
    right = parts.Part(("--scene", "10", "--backend", "reference", "--dtype", "float32"), identity)
    rows = list(parts.rows("benchmarks.numerics", [right], 1, 120))
    assert {row["status"] for row in rows} == {"passed"}


@compiled
def test_every_check_is_in_one_group(tmp_path: Path) -> None:
    assert [check for group in device_checks.GROUPS for check in group] == list(device_checks.CHECKS)
    out = tmp_path / "checks.csv"
    chosen = ["empty batch", "autocast", "huge"]
    assert (
        device_checks.main(["--op", OP, "--backend", "cpp", "--jobs", "3", "--out", str(out), "--check", *chosen]) == 0
    )
    assert {row["check"]: row["status"] for row in read(out)} == dict(zip(chosen, ("passed", "passed", "skipped")))


# The largest volume


class Fits(largest_volume.Search):
    """A side fits up to a limit, in a given time."""

    limit_side, cost = 144, 0.0

    def _fits(self, case: problems.Case) -> bool:
        side = case.workload.volume[0]
        if side <= self.limit_side:
            self.peak, self.seconds = side**3, self.cost
        return side <= self.limit_side


@pytest.mark.parametrize("side", [16, 32, 144, 496, 512, 2048])
def test_largest_volume_by_bisection(side: int) -> None:
    search = Fits("reference", torch.float32, "cpu", 10**15, 60)
    search.limit_side = side
    row = search.run()
    assert (row["status"], row["side"], row["peak_bytes"]) == ("measured", side, side**3)
    assert row["too_large"] == (side + 16 if side < 2048 else "")


def test_largest_volume_without_time_or_memory_or_right_values(monkeypatch: pytest.MonkeyPatch) -> None:
    search = Fits("reference", torch.float32, "cpu", 10**15, 60)
    search.cost = 10.0
    assert (search.run()["status"], search.best) == ("lower bound", 32)  # 64 would take 80 s
    search = Fits("reference", torch.float32, "cpu", 2 * 32 * 48**3 * 4, 60)
    assert search.run()["side"] == 48  # the volume and its gradient fill the memory

    def shifted(case: problems.Case, competitor: str, problem: problems.Problem) -> Callable[[], list[Tensor]]:
        return lambda: [torch.roll(problems.function(case, competitor, problem)()[0], 1, dims=-1)]

    right = largest_volume.Search("reference", torch.float32, "cpu", 2 * 32 * 32**3 * 4, 60)
    assert right.run()["side"] == 32
    monkeypatch.setattr(largest_volume, "function", shifted)
    wrong = largest_volume.Search("reference", torch.float32, "cpu", 2 * 32 * 32**3 * 4, 60).run()
    assert wrong["status"] == "failed"
    assert "last voxels" in wrong["reason"]


# What is measured, and how


def test_interpreted_kernels_are_no_competitor(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [Availability("triton", True, ""), Availability("reference", True, "")]
    monkeypatch.setattr(problems, "explain", lambda *_, **__: lines)
    assert "interpreted" in str(competitors(OP, "cpu", torch.float32)["triton"])
    assert competitors(OP, "cuda", torch.float32)["triton"] is None


def test_workloads_of_a_gpu() -> None:
    everything = [case.workload for case in cases(Settings(ops=OPERATIONS, device="cuda"))]
    usual = [case.workload for case in cases(Settings(ops=OPERATIONS))]
    made_for_it = {workload.name for workload in everything} - {workload.name for workload in usual}
    assert made_for_it >= {"batch-8", "batch-64"}
    named = cases(Settings(ops=OPERATIONS, workloads=("batch-8",)))
    assert [case.workload.shape for case in named] == ["N=8 M=4 C=32 map=64x64 volume=64x64x64"]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As much of torch.cuda as a clock needs, on CPU tensors; the log of its calls. Events tick at each record."""
    log: list[str] = []

    class Event:
        ticks = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.ticks += 1
            self.at = Event.ticks
            log.append("event")

        def elapsed_time(self, end: Any) -> float:
            assert "synchronize" in log
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(measure, "_flush_buffer", lambda: SimpleNamespace(zero_=lambda: log.append("flush")))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 300)
    return log


def test_clock_of_a_gpu(fake_gpu: list[str]) -> None:
    """Events are read after everything has been enqueued, and the cache is cold at each call."""
    log, clock = fake_gpu, measure.Clock("cuda")
    marks, results = clock(lambda _: 1, lambda x: x + 1)
    assert results == [1, 2]
    assert log == ["flush", "event", "event", "flush", "event", "event"]
    assert clock.seconds(marks) == [1e-3, 1e-3]

    case = problems.Case(OP, operation(OP).SMALLEST, "plain", torch.float32, "cpu")
    contestant = measure.Contestant(case, "reference")
    contestant.clock = clock
    assert contestant.round(3) == pytest.approx({"forward": 1e-3, "backward": 1e-3, "both": 2e-3})


def test_suite_on_a_gpu(fake_gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are made once, compilation and do_bench have their columns, lack of memory is a skipped row."""
    made = []

    def make(case: problems.Case) -> problems.Problem:
        made.append(case)
        return case.module.make(case.workload, case.variant, case.dtype, "cpu")

    def probe(contestant: measure.Contestant, limit: int) -> measure.Probe:
        if contestant.competitor == "published":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(contestant, limit)

    original = measure.Contestant.probe
    monkeypatch.setattr(problems.Case, "make", make)
    monkeypatch.setattr(measure.Contestant, "probe", probe)
    monkeypatch.setattr(measure.Contestant, "do_bench", lambda contestant: 2e-3)
    rates = {"copy": 1e12, "read": 1e12, "fill": 1e12, "fill_fresh": 1e12, "flops": 1e13}
    settings = Settings(device="cuda", ops=(OP,), competitors=("reference", "published"), rounds=4)
    suite = Suite(settings, rates, tmp_path, time.monotonic())
    suite.run([problems.Case(OP, operation(OP).SMALLEST, "plain", torch.float32, "cuda")])
    assert len(made) == 1
    rows = read(tmp_path / "results.csv")
    measured = {row["mode"]: row for row in rows if row["competitor"] == "reference"}
    assert {row["status"] for row in measured.values()} == {"measured"}
    assert (measured["forward"]["median_s"], measured["both"]["median_s"]) == ("0.001", "0.002")
    assert (measured["forward"]["do_bench_s"], measured["both"]["do_bench_s"]) == ("0.002", "")
    assert measured["forward"]["peak_bytes"] == "200"
    assert float(measured["both"]["error_gradient"]) < 1e-5
    skipped = {row["reason"] for row in rows if row["competitor"] == "published"}
    assert skipped == {"out of GPU memory"}


def test_streams_and_graphs_of_a_gpu(fake_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors every stream is one stream, and a graph that replays nothing is found out."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda other: nullcontext(),
        "_sleep": lambda cycles: None,
        "graph": lambda graph: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: fake_gpu.append("replay")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, other: None)
    monkeypatch.setattr(Subject, "cuda", True)
    monkeypatch.setattr(operation(OP), "WORKLOADS", (operation(OP).SMALLEST,))
    subject = Subject(OP, "reference", "cpu")
    device_checks.second_stream(subject)
    with pytest.raises(Wrong, match="off by nan"):
        device_checks.cuda_graph(subject)
    assert fake_gpu.count("replay") == 1


def test_do_bench_is_asked_where_there_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda call, **options: (call(), 2.5)[1])
    case = problems.Case(OP, operation(OP).SMALLEST, "plain", torch.float32, "cpu")
    assert measure.Contestant(case, "reference").do_bench() == 2.5e-3
    monkeypatch.setitem(sys.modules, "triton.testing", None)
    assert measure.Contestant(case, "reference").do_bench() is None


def test_report_of_a_folder(tmp_path: Path) -> None:
    assert gpu_report.report(tmp_path) == ""
    (tmp_path / "checks.csv").write_text(
        "device,op,backend,check,status,reason,seconds\n"
        "cuda,unproject,triton,huge,failed,part 3 is off,1\ncuda,unproject,triton,sizes,passed,,1\n"
    )
    (tmp_path / "largest_volume.csv").write_text(
        "dtype,competitor,status,side,reason\nfloat32,triton,measured,512,\nfloat32,reference,lower bound,256,\n"
    )
    (tmp_path / "times").mkdir()
    (tmp_path / "times/machine.json").write_text('{"rates": {"copy": 1e12}}')
    columns = "op,workload,variant,sweep,competitor,mode,status,reason,median_s,floor_bytes,ratio_to_reference\n"
    rows = [
        f"unproject,paper,plain,0,{name},{mode},measured,,{seconds},{10**8},{ratio}\n"
        for name, mode, seconds, ratio in (
            ("reference", "forward", 0.01, 1), ("reference", "both", 0.03, 1), ("compile", "forward", 0.01, 1),
            ("compile", "both", 0.02, 0.667), ("triton", "forward", 0.0002, 0.02), ("triton", "both", 0.001, 0.0333),
        )
    ]  # fmt: skip
    rows += [f"unproject,paper,plain,0,cuda,{mode},failed,out of order,,1,\n" for mode in ("forward", "both")]
    (tmp_path / "times/results.csv").write_text(columns + "".join(rows))
    lines = gpu_report.report(tmp_path).splitlines()
    assert lines[0] == "device checks: 1 passed, 1 failed, 0 skipped"
    assert lines[1] == "  failed: unproject, triton, huge: part 3 is off"
    assert lines[2] == "largest volume that trains (float32): triton 512³, reference ≥ 256³"
    assert "copy: 1000 GB/s" in lines[3]
    assert " ".join(lines[-2].split()) == "unproject paper, plain triton 0.2 ms 1 ms 0.0333 0.05 50%"
    assert lines[-1].endswith("failed: out of order")


def test_label_of_what_has_no_reference() -> None:
    row = {"status": "measured", "reason": "", "needed_bytes": ""}
    assert plots._why(row) == "no reference to compare with"


def test_plots_are_left_out_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import __main__ as command

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command.summary, "write", lambda folder: None)
    (tmp_path / "results.csv").write_text("op\n")
    command.draw(tmp_path)
    assert "--redraw" in capsys.readouterr().out
