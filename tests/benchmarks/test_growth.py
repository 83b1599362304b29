"""How a step grows: planted exponents, and a project with some of its cameras."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import growth
from bkind3d.data import load_project
from bkind3d.sims.simulate import simulate_rig


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growth") / "rig"
    return simulate_rig(folder, views=4, frames=40, test_frames=4, image_size=(144, 144), workers=1, progress=False)


def test_exponents_that_were_planted() -> None:
    assert growth.exponent([2, 4, 8], [0.3 * value**1.5 for value in (2, 4, 8)]) == pytest.approx(1.5)
    assert growth.exponent([1, 10], [0.7, 0.7]) == pytest.approx(0)


def test_a_project_with_some_of_its_cameras(project: Path, tmp_path: Path) -> None:
    found = load_project(growth.with_views(project, 3, tmp_path))
    assert all(len(recording.videos) == 3 for recording in found.recordings)
    with pytest.raises(SystemExit, match=r"--views 5: .*project\.yaml has 4 cameras"):
        growth.with_views(project, 5, tmp_path)


def test_every_factor_has_its_rows(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--pairs", "--keypoints", "--views", "2", "--processes", "1"]
    arguments = ["--project", str(project), *sizes, "--steps", "1", "--out", str(tmp_path / "growth.csv")]
    monkeypatch.setattr(sys, "argv", ["growth", *arguments])
    growth.main()
    rows = list(csv.DictReader((tmp_path / "growth.csv").open()))
    assert [(row["factor"], row["value"]) for row in rows] == [("views", "2"), ("processes", "1")]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert "processes" in capsys.readouterr().out
