"""The demo by way of Rat7M's layout, and what a subject cannot do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bkind3d.data import load_project, load_truth
from bkind3d.errors import InputError
from bkind3d.experiments.demo import demo, through_rat7m
from bkind3d.experiments.subjects import SUBJECTS
from bkind3d.run import open_run


def test_a_subject_by_way_of_rat7m_is_the_same_in_millimetres(rig: Path, tmp_path: Path) -> None:
    here = load_project(rig)
    there = load_project(through_rat7m(here, tmp_path))
    assert there.units == "mm"
    assert {recording.split for recording in there.recordings} == {"train", "test"}
    assert there.volume is not None
    assert here.volume is not None
    np.testing.assert_allclose(there.volume.center, np.array(here.volume.center) * 1000)
    assert max(there.volume.size) == pytest.approx(1000 * max(here.volume.size))
    for one, other in zip(here.recordings, there.recordings, strict=True):
        truth, imported = load_truth(one, here), load_truth(other, there)
        np.testing.assert_allclose(imported.points3d, 1000 * truth.points3d, rtol=1e-6)
        cameras, points = there.cameras_of(other), torch.from_numpy(truth.points3d)
        pixels, _ = here.cameras.project(points)
        imported_pixels, _ = cameras.project(1000 * points)
        torch.testing.assert_close(imported_pixels, pixels, atol=1e-5, rtol=0)


def test_the_demo_by_way_of_rat7m(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = demo(out=tmp_path / "run", layout="rat7m", frames=24, test_frames=12, steps=1, progress=False)
    assert report.is_file()
    assert open_run(tmp_path / "run").project == tmp_path / "run-data" / "imported" / "project.yaml"
    assert sorted(path.name for path in (tmp_path / "run-data" / "rat7m").rglob("*.mat")) == [
        "mocap-s1-d1.mat", "mocap-s5-d1.mat",
    ]  # fmt: skip
    assert "units mm" in capsys.readouterr().out


def test_what_a_subject_cannot_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for arguments, named in (
        ({"subject": "animal", "source": tmp_path}, "source"),
        ({"subject": "human", "frames": 10}, "frames"),
        ({"subject": "human", "views": 3}, "views"),
        ({"subject": "human", "layout": "rat7m"}, "layout"),
    ):
        with pytest.raises(InputError, match=f"^{named}:"):
            demo(out=tmp_path / "run", progress=False, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_every_subject_trains_with_its_own_settings(tmp_path: Path) -> None:
    for name, subject in SUBJECTS.items():
        config = subject.config(tmp_path / "project.yaml", seed=3)
        assert (config.train.seed, config.train.steps) == (3, subject.steps), name
        config.model.keypoints = 2
        assert subject.config(tmp_path / "project.yaml", seed=3).model.keypoints != 2, "settings are shared"
