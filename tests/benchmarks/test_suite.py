"""The benchmark suite itself: baselines, floors, rows, refusals."""

import csv
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import machine, numerics, plots
from benchmarks.measure import Contestant, Truth, largest_error, repeats
from benchmarks.problems import (
    MODES,
    Case,
    Floor,
    Peer,
    Workload,
    competitors,
    function,
    known_competitors,
    operation,
)
from benchmarks.suite import RAW_COLUMNS, RESULT_COLUMNS, Settings, Suite, cases, quartiles
from benchmarks.workers import Worker
from bkind3d_kernels import unproject
from bkind3d_kernels.backends import OPERATIONS

RATES = {"copy": 1e10, "read": 1e10, "fill": 1e10, "fill_fresh": 2e9, "flops": 1e11}
ALL = [(op, variant) for op in OPERATIONS for variant in operation(op).VARIANTS]
PUBLISHED = [(op, variant) for op in OPERATIONS for variant in operation(op).PUBLISHED]
PEERS = [
    (op, name, variant)
    for op in OPERATIONS
    for name, peer in operation(op).PEERS.items()
    for variant in peer.variants
    if peer.reason is None
]


def smallest(op: str, variant: str | None = None) -> Case:
    module = operation(op)
    return Case(op, module.SMALLEST, variant or module.VARIANTS[0], torch.float32, "cpu")


@pytest.mark.parametrize(("op", "variant"), PUBLISHED)
def test_published_algorithm_agrees(op: str, variant: str) -> None:
    case = smallest(op, variant)
    truth = Truth.of(case)
    contestant = Contestant(case, "published")
    contestant.round()
    errors = contestant.errors(truth)
    # Its edges are rows of dots: exact at the dots alone.
    tolerance = 0.2 if op == "rasterize_edges" else 1e-4
    assert errors["error_output"] < tolerance
    if op != "rasterize_edges":
        assert errors["error_gradient"] < tolerance


@pytest.mark.parametrize(("op", "name", "variant"), PEERS)
def test_peers_compute_the_same_function(op: str, name: str, variant: str) -> None:
    """In float64, outputs and all gradients."""
    case = Case(op, operation(op).SMALLEST, variant, torch.float64, "cpu")
    contestant = Contestant(case, name)
    contestant.round()
    errors = contestant.errors(Truth.of(case))
    # VoxelPose adds 1e-6 to the number of views, AutoLink 1e-8 to a squared length.
    assert errors["error_output"] < 2e-6
    assert errors["error_gradient"] < 2e-6


@pytest.mark.parametrize(("name", "variant"), [("learnable-triangulation", "channels-first"), ("voxelpose", "mean")])
def test_peers_leave_out_what_a_view_does_not_see(name: str, variant: str) -> None:
    """Cameras inside the volume: behind some voxels, beside others."""
    module = operation("unproject")
    workload = Workload("inside", {"N": 2, "M": 3, "C": 4, "map": (9, 13), "volume": (7, 6, 5)})
    inputs = module.make(workload, variant, torch.float64, "cpu").inputs
    inputs["projections"][:, 1, 2, 3] -= module.RADIUS - 0.1
    inputs["projections"][:, 2, :2] *= 3
    (exact,) = module.apply(inputs, workload, "reference")
    (found,) = module.PEERS[name].make(inputs, workload)()
    assert largest_error([found], [exact]) < 2e-6
    _, counts = unproject(inputs["features"], inputs["projections"], inputs["grid"], return_counts=True)
    assert set(counts.unique().tolist()) == {1, 2}


def test_peers_take_part_where_they_compute_the_variant() -> None:
    assert "voxelpose" not in competitors("unproject", "cpu", torch.float32, "channels-last")
    means = competitors("unproject", "cpu", torch.float32, "mean")
    assert "voxelpose" in means
    assert not {"published", "learnable-triangulation"} & set(means)
    assert set(plots.COLOURS) == set(known_competitors())


def test_a_peer_whose_package_is_absent_says_so() -> None:
    peer = Peer("Nobody", lambda inputs, workload: list, lambda workload: 0, (), package="no_such_package")
    assert peer.reason == "no_such_package is not installed"


@pytest.mark.parametrize("size", [16, 64])
def test_published_edges_are_within_half_a_gap_of_the_segment(size: int) -> None:
    module = operation("rasterize_edges")
    case = Case("rasterize_edges", Workload("w", {"N": 2, "J": 5, "sizes": (size,)}), "plain", torch.float64, "cpu")
    problem = case.make()
    (exact,), (found,) = (function(case, name, problem)() for name in ("reference", "published"))
    # A segment is at most 0.8·√2 maps long, and the nearest dot half a gap from the nearest point.
    gap = 0.8 * math.sqrt(2) * size / (size - 1)
    assert (found <= exact + 1e-12).all()
    assert (found >= exact * math.exp(-((gap / 2 / module.SIGMAS[size]) ** 2)) - 1e-12).all()


def test_every_size_of_map_has_a_width() -> None:
    module = operation("rasterize_edges")
    assert set(module.SIGMAS) >= {size for workload in module.WORKLOADS for size in workload.sizes}


def test_views_see_most_of_the_volume() -> None:
    module = operation("unproject")
    for workload in module.WORKLOADS[:5]:
        small = Workload("small", workload.parameters | {"C": 1, "volume": tuple(s // 4 for s in workload.volume)})
        inputs = module.make(small, "channels-last", torch.float32, "cpu").inputs
        _, counts = unproject(inputs["features"], inputs["projections"], inputs["grid"], return_counts=True)
        assert counts.double().mean() / workload.M > 0.9


@pytest.mark.parametrize(("op", "variant"), ALL)
def test_floors(op: str, variant: str) -> None:
    module = operation(op)
    for workload in module.WORKLOADS:
        floors = {mode: module.floor(workload, variant, mode, 4) for mode in MODES}
        for floor in floors.values():
            assert floor.operations > 0
            assert floor.read + floor.written > 0
            assert floor.seconds(RATES) > 0
        assert floors["both"] == floors["forward"] + floors["backward"]
        assert module.published_bytes(workload) > 0
        assert all(peer.needed_bytes(workload) > 0 for peer in module.PEERS.values())


def test_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert Floor(10**10, 0, 1).seconds(RATES) == pytest.approx(1)
    assert Floor(0, 1, 10**11).seconds(RATES) == pytest.approx(1)
    assert Floor(0, 10**10, 1).fresh_seconds(RATES) == pytest.approx(5)


def test_paper_floor_of_unproject() -> None:
    module = operation("unproject")
    floor = module.floor(module.WORKLOADS[0], "channels-last", "forward", 4)
    assert floor.written == 32 * 64**3 * 4
    assert floor.read == 4 * 32 * 64**2 * 4


@pytest.mark.parametrize("op", OPERATIONS)
def test_names_are_unique_and_sweeps_pass_through_the_base(op: str) -> None:
    module = operation(op)
    names = [workload.name for workload in module.WORKLOADS]
    assert len(set(names)) == len(names)
    shapes = [workload.shape for workload in module.WORKLOADS]
    assert len(set(shapes)) == len(shapes)
    assert any(workload.parameters == module.BASE for workload in module.WORKLOADS)


def test_cases_begin_with_the_first_workload_of_each_operation() -> None:
    listed = cases(Settings(ops=OPERATIONS))
    assert [case.workload.name for case in listed[:4]] == ["paper", "paper", "paper", "paper-one"]
    assert not listed[0].workload.sweep
    assert listed[-1].workload.sweep
    assert [case.variant for case in cases(Settings(ops=("unproject",), workloads=("room",)))] == ["channels-last"]
    assert {case.op for case in cases(Settings(ops=OPERATIONS, quick=True))} == set(OPERATIONS)


def test_peak_memory_of_the_published_unprojection() -> None:
    module = operation("unproject")
    workload = next(w for w in module.WORKLOADS if w.name == "volume-32")
    worker = Worker(Case("unproject", workload, "channels-last", torch.float32, "cpu"), "published", 1)
    try:
        probe = worker.probe(10**9, 60)
    finally:
        worker.close()
    expected = module.published_bytes(workload)
    assert 0.9 * expected < probe.peak["both"] < 1.5 * expected
    assert probe.peak["forward"] <= probe.peak["both"]


def run(out: Path, *arguments: str) -> int:
    return command.main(["--out", str(out), "--threads", "1", "--rounds", "3", *arguments])


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "rates", lambda device: RATES)
    out = tmp_path / "results"
    chosen = ("--op", "rasterize_edges", "--workload", "keypoints-4", "size-16", "--competitor")
    assert run(out, *chosen, "reference", "published", "cuda", "--memory-limit-gb", "0.002") == 0
    rows, raw = read(out / "results.csv"), read(out / "raw.csv")
    assert tuple(rows[0]) == RESULT_COLUMNS
    assert tuple(raw[0]) == RAW_COLUMNS
    assert len(rows) == 2 * 3 * 3  # workloads, competitors, modes

    measured = [row for row in rows if row["status"] == "measured"]
    assert {row["competitor"] for row in measured} == {"reference", "published"}
    for row in measured:
        assert float(row["q1_s"]) <= float(row["median_s"]) <= float(row["q3_s"])
        assert float(row["floor_s"]) > 0
        rounds = [r for r in raw if all(r[key] == row[key] for key in ("workload", "competitor", "mode"))]
        assert len(rounds) == int(row["rounds"]) == 3
    exact = [row for row in measured if row["competitor"] == "reference"]
    assert all(float(row["error_output"]) < 1e-4 for row in exact if row["mode"] == "forward")
    assert all(float(row["ratio_to_reference"]) == 1 for row in exact)
    assert all("weights" in row["error_gradients"] for row in exact if row["mode"] == "backward")

    skipped = [row for row in rows if row["status"] == "skipped"]
    assert {row["competitor"] for row in skipped} == {"published", "cuda"}
    assert all(row["reason"] and not row["median_s"] for row in skipped)
    too_large = next(row for row in skipped if row["competitor"] == "published")
    assert too_large["workload"] == "size-16" or int(too_large["needed_bytes"]) > 2_000_000

    # An existing folder is kept, unless told otherwise.
    before = (out / "results.csv").read_bytes()
    assert run(out, "--quick") == 2
    assert "holds results already" in capsys.readouterr().err
    assert (out / "results.csv").read_bytes() == before

    summary = (out / "summary.md").read_text()
    for name in ("summary.md", "machine.json"):
        (out / name).unlink()
    assert command.main(["--redraw", str(out)]) == 0
    assert "| keypoints-4 | reference |" in (out / "summary.md").read_text()
    assert "| keypoints-4 | reference |" in summary


def test_no_time_left_is_said_in_every_row(tmp_path: Path) -> None:
    suite = Suite(Settings(ops=OPERATIONS, budget=-1.0), RATES, tmp_path, time.monotonic())
    listed = cases(Settings(ops=OPERATIONS))[:4]
    suite.run(listed)
    rows = read(tmp_path / "results.csv")
    assert {(row["op"], row["workload"]) for row in rows} == {(case.op, case.workload.name) for case in listed}
    assert all(row["status"] == "skipped" for row in rows)
    assert all(row["reason"].startswith(("budget", "needs")) for row in rows)


def test_a_competitor_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Worker, *_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(Worker, "probe", broken)
    suite = Suite(Settings(ops=("soft_argmax3d",), competitors=("reference",)), RATES, tmp_path, time.monotonic())
    suite.run([smallest("soft_argmax3d")])
    rows = read(tmp_path / "results.csv")
    assert {row["status"] for row in rows} == {"failed"}
    assert "out of order" in rows[0]["reason"]
    assert suite.failed == 1


def test_dtypes_that_an_operation_does_not_take(tmp_path: Path) -> None:
    settings = Settings(ops=("rasterize_edges",), dtype=torch.bfloat16)
    suite = Suite(settings, RATES, tmp_path, time.monotonic())
    suite.run(cases(settings)[:1])
    assert {row["status"] for row in read(tmp_path / "results.csv")} == {"skipped"}


def test_small_helpers() -> None:
    assert quartiles([2.0]) == (2, 2, 2)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2, 2.5)
    assert repeats(1.0) == 1
    assert repeats(0.001) == 20
    assert largest_error([torch.tensor([1.0, 2.5])], [torch.tensor([1.0, 2.0])]) == pytest.approx(0.25)
    assert math.isnan(largest_error([torch.tensor([math.nan, 1.0])], [torch.tensor([1.0, 1.0])]))


def test_numerics_pass_and_see_a_wrong_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ("--backend", "reference", "cpp", "--dtype", "float32")  # interpreted kernels have tests of their own
    chosen = [scene for scene in numerics.scenes() if scene.op != "unproject"]
    monkeypatch.setattr(numerics, "scenes", lambda: iter(chosen))
    assert numerics.main([*compiled, "--out", str(tmp_path / "numerics.csv")]) == 0
    rows = read(tmp_path / "numerics.csv")
    assert {row["status"] for row in rows} == {"passed"}
    assert {row["quantity"] for row in rows} >= {
        "output 0",
        "gradient of logits",
        "gradient of weight",
        "gradient of keypoints",
        "gradient of residual",
    }

    drawn = next(scene for scene in reversed(chosen) if scene.op == "rasterize_edges")
    draw = drawn.call
    drawn.call = lambda backend, **inputs: [
        m if inputs["keypoints"].dtype == torch.float64 else 1.01 * m for m in draw(backend, **inputs)
    ]
    assert numerics.main([*compiled]) == 1
