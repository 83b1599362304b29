"""The host's time of every call, with the floors beside it."""

import csv
import json
import sys
from pathlib import Path

import pytest

from benchmarks import host_time
from bkind3d_kernels import backends, library


@pytest.mark.skipif(library.reason("_cpu") is not None, reason=str(library.reason("_cpu")))
def test_every_operation_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, raw = tmp_path / "times.csv", tmp_path / "raw.json"
    arguments = [f"here@{host_time.ROOT}", "--rounds", "2", "--repeats", "3", "--out", str(table), "--raw", str(raw)]
    monkeypatch.setattr(sys, "argv", ["host_time", *arguments])
    host_time.main()
    rows = list(csv.DictReader(table.open()))
    assert {row["call"].split(",")[0] for row in rows} == {"mul", "function", *backends.OPERATIONS}
    assert all(float(row["both_us"]) > float(row["forward_us"]) > 0 for row in rows)
    assert [float(row["to_mul"]) for row in rows if row["call"] == "mul"] == [1.0]
    seconds = json.loads(raw.read_text())["here"]
    assert all(len(turns) == 2 for turns in seconds.values())


def test_a_folder_without_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["host_time", f"other@{tmp_path}"])
    with pytest.raises(SystemExit, match=r"other@.*: expected a checkout of this repository"):
        host_time.main()
