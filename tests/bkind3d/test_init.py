"""A project file from a folder: which videos belong together, what is asked for, and that nothing is overwritten."""

from pathlib import Path

import numpy as np
import pytest
from calibration_layouts import SIZE, anipose, jarvis, plain_json, rig
from command_line import refused
from small_rig import counted_frames, ring, write_video

from bkind3d.cameras import save_toml
from bkind3d.cli import main
from bkind3d.data import load_project
from bkind3d.errors import InputError
from bkind3d.init import group_videos, init_project

NAMES = ("cam_1", "cam_2", "cam_10")


def touch(folder: Path, *videos: str) -> None:
    for video in videos:
        (folder / video).parent.mkdir(parents=True, exist_ok=True)
        (folder / video).touch()


@pytest.mark.parametrize(
    ("pattern", "recordings"),
    [
        ("{rec}/{cam}.mp4", ["day1", "day2"]),
        ("{rec}_{cam}.avi", ["day1", "day2"]),
        ("{cam}-{rec}.MOV", ["day1", "day2"]),
        ("videos/{cam}/{rec}.mp4", ["videos-day1", "videos-day2"]),
        ("{rec}/{cam}/0.mp4", ["day1-0", "day2-0"]),
        ("vid {rec}-{cam}.mp4", ["vid-day1", "vid-day2"]),
    ],
)
def test_layouts_of_other_tools(pattern: str, recordings: list[str], tmp_path: Path) -> None:
    files = {
        (rec, cam): pattern.format(rec=rec, cam=written)
        for rec in ("day1", "day2")
        for cam, written in zip(NAMES, ("cam_1", "Cam02", "cam-10"))
    }
    touch(tmp_path, *files.values(), ".hidden/cam_1.mp4")
    found, left_out = group_videos(tmp_path, NAMES)
    assert list(found) == recordings
    for name, rec in zip(recordings, ("day1", "day2")):
        assert found[name] == {cam: tmp_path / files[rec, cam] for cam in NAMES}
    assert left_out == []


def test_what_fits_nowhere_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "a/cam_1.mp4", "a/cam_2.mp4", "a/cam_10.mp4", "b/cam_1.mp4", "a/cam_1.avi", "a/cam_100.mp4")
    found, left_out = group_videos(tmp_path, NAMES)
    assert list(found) == ["a"]
    assert sorted(line.removeprefix(f"{tmp_path}/") for line in left_out) == [
        "a/cam_1.mp4: " + f"{tmp_path}/a/cam_1.avi is of the same camera and recording",
        "a/cam_100.mp4, which no camera's name stands in",
        "b/cam_1.mp4: of camera 'cam_2' there is no such video",
    ]
    with pytest.raises(InputError, match=r"no recording has a video of each camera \(top, side\); found a/cam_1.avi, "):
        group_videos(tmp_path, ("top", "side"))


def test_a_folder_becomes_a_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poses = rig(("cam0", "cam1", "cam2"))
    for day in range(1, 7):
        for pose in poses:
            write_video(tmp_path / f"day{day}" / f"{pose.name}.mkv", counted_frames(2, SIZE))
    (tmp_path / "calibration").mkdir()
    jarvis(tmp_path / "calibration", poses)
    main(["init", str(tmp_path), "--name", "a rig: of three"])
    project = load_project(tmp_path / "project.yaml")
    assert (project.name, project.units, project.volume) == ("a rig: of three", "mm", None)
    assert [(row.name, row.split) for row in project.recordings] == [
        *((f"day{day}", "train") for day in range(1, 6)),
        ("day6", "test"),
    ]
    assert project.recordings[0].offsets == {"cam0": 0, "cam1": 0, "cam2": 0}
    assert project.cameras.image_size.tolist() == [list(SIZE)] * 3
    text = (tmp_path / "project.yaml").read_text()
    assert "#   center: [" in text
    assert "calibration: calibration/cam0.yaml   # JARVIS YAML" in text
    assert "day1/cam0.mkv" in text
    assert str(tmp_path) not in text
    assert "3 cameras, 6 recording(s)" in capsys.readouterr().out
    assert "exists, and is never overwritten" in refused(["init", str(tmp_path)], capsys)
    assert (tmp_path / "project.yaml").read_text() == text


def test_units_are_asked_for(tmp_path: Path) -> None:
    for pose in rig(("cam0", "cam1")):
        write_video(tmp_path / f"{pose.name}.mkv", counted_frames(2, SIZE))
    anipose(tmp_path, rig(("cam0", "cam1")))
    with pytest.raises(InputError, match=r"does not say its units; give them: --units m\|cm\|mm\|um"):
        init_project(tmp_path)
    with pytest.raises(InputError, match="--units: 'inch' is not a unit"):
        init_project(tmp_path, units="inch")
    assert not (tmp_path / "project.yaml").exists()
    init_project(tmp_path, units="mm")
    project = load_project(tmp_path / "project.yaml")
    assert [(row.name, row.split) for row in project.recordings] == [("take1", "both")]


def test_where_a_calibration_is_looked_for(tmp_path: Path) -> None:
    touch(tmp_path, "cam0.mp4", "cam1.mp4")
    with pytest.raises(InputError, match=r"neither it nor a folder 'calib...' in it holds a calibration"):
        init_project(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        init_project(tmp_path / "cam0.mp4")
    plain_json(tmp_path, rig(("cam0", "cam1")))
    save_toml(ring(2), tmp_path / "other.toml")
    with pytest.raises(InputError, match=r"holds 2 calibrations, calibration.json, other.toml"):
        init_project(tmp_path)
    with pytest.raises(InputError, match=r"no recording has a video of each camera \(a, b\)"):
        init_project(tmp_path, calibration=plain_json(tmp_path, rig(("a", "b"))))
    assert not (tmp_path / "project.yaml").exists()


def test_parallel_cameras_leave_the_volume_to_be_filled_in(tmp_path: Path) -> None:
    poses = rig(("cam0", "cam1"))
    poses[1].R, poses[1].t = poses[0].R, poses[0].t + np.array([100.0, 0, 0])
    for pose in poses:
        write_video(tmp_path / f"{pose.name}.mkv", counted_frames(2, SIZE))
    plain_json(tmp_path, poses)
    init_project(tmp_path)
    assert load_project(tmp_path / "project.yaml").volume is not None
