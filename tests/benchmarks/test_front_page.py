"""The table and the chart of the README are those that the committed results give."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import front_page
from benchmarks.front_page import CHART, MARKS, WORKLOADS, Run, block, competitors, label, milliseconds, runs, table
from benchmarks.machine import ROOT

COLUMNS = ("op", "workload", "variant", "mode", "status", "dtype", "competitor", "median_s")


def run(folder: Path, *rows: tuple[str, str, str, str, str], gpu: str | None = None) -> Run:
    """A results folder of training steps: (op, workload, variant, competitor, seconds)."""
    folder.mkdir()
    machine = {"gpu": gpu, "cpu": "Intel(R) Xeon(R) Processor", "threads": 2, "date": "2026-01-02T03:04:05+00:00"}
    (folder / "machine.json").write_text(json.dumps(machine))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for op, workload, variant, competitor, seconds in rows:
            status = "measured" if seconds else "skipped"
            writer.writerow([op, workload, variant, "both", status, "float32", competitor, seconds])
            writer.writerow([op, workload, variant, "forward", status, "float32", competitor, seconds and "9"])
    return Run(folder)


def test_readme_holds_the_committed_numbers() -> None:
    page = (ROOT / "README.md").read_text()
    assert page.split(MARKS[0])[1].split(MARKS[1])[0].strip() == block(runs()), "python -m benchmarks.front_page"


def test_chart_holds_the_committed_numbers() -> None:
    found = runs()
    times = [run.time(op, name) for run in found for op in WORKLOADS for name in competitors(op, found)]
    drawn = Counter(re.findall(r"<!-- (.*) -->", CHART.read_text()))
    expected = Counter(label(time) for time in times if time)
    assert expected
    assert expected <= drawn, "python -m benchmarks.front_page"
    assert drawn["not measured"] == times.count(None)
    assert CHART.stat().st_size < 150_000


def test_a_row_of_each_operation_and_no_number_that_was_not_measured(tmp_path: Path) -> None:
    cpu = run(
        tmp_path / "cpu",
        ("unproject", "paper", "channels-last", "reference", "0.3876"),
        ("unproject", "paper", "channels-last", "cpp", "0.0444"),
        ("unproject", "paper", "channels-last", "compile", ""),
        ("unproject", "paper", "mean", "cpp", "0.03"),
        ("unproject", "paper", "mean", "voxelpose", "0.4"),
        ("unproject", "paper", "mean", "reference", "7"),
        ("unproject", "fine", "channels-last", "compile", "8"),
    )
    gpu = run(
        tmp_path / "gpu",
        ("unproject", "paper", "channels-last", "triton", "0.002"),
        ("unproject", "paper", "channels-last", "cuda", "0.001"),
        ("unproject", "paper", "channels-last", "published", "0.0035"),
        gpu="NVIDIA H200",
    )
    lines = table([cpu, gpu])
    assert len(lines) == 2 + len(WORKLOADS)
    _, _, ours, reference, compiled, peers, _ = (cell.strip() for cell in lines[2].split("|"))
    assert ours == "**44.4 · 1**"
    assert reference == "388 · –"
    assert compiled == "– · –"
    assert peers == "BKinD-3D – · 3.5<br>VoxelPose 400 · – (variant *mean*, this library 30 · –)"
    assert not re.search(r"\d", lines[3].split("|", 2)[2])
    assert cpu.name == "2 cores of an Intel Xeon"
    assert gpu.name == "NVIDIA H200"
    voxelpose = cpu.time("unproject", "voxelpose")
    assert voxelpose is not None
    assert label(voxelpose) == "13.3×"
    front_page.draw([cpu, gpu], tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("13.3×", "8.73×", "3.5×", "not measured", "VoxelPose"))


def test_text_goes_between_the_marks() -> None:
    page = f"a\n{MARKS[0]}\nold\n{MARKS[1]}\nb\n"
    assert front_page.replaced(page, "new") == f"a\n{MARKS[0]}\nnew\n{MARKS[1]}\nb\n"


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (0.00053451, "0.535"), (0.91148, "911"), (10.5, "10500")])
def test_milliseconds(seconds: float | None, text: str) -> None:
    assert milliseconds(seconds) == text
