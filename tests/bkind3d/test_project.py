import dataclasses

import numpy as np
import pytest
import torch
import yaml
from small_rig import ring, write_project

from bkind3d.cameras import save_toml
from bkind3d.data import Truth, Volume, load_project, load_truth, save_project, save_truth
from bkind3d.errors import InputError


@pytest.fixture
def project_file(tmp_path):
    return write_project(tmp_path / "rig", frames=2)


def edited(path, **changes):
    """The project file with keys replaced; a key set to None is removed."""
    content = yaml.safe_load(path.read_text())
    content.update(changes)
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def edited_recording(path, **changes):
    content = yaml.safe_load(path.read_text())
    recording = {**content["recordings"][0], **changes}
    return edited(path, recordings=[{key: value for key, value in recording.items() if value is not None}])


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        load_project(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_load(project_file) -> None:
    folder = project_file.parent
    edited_recording(project_file, offsets={"cam1": 1}, frames=1, split="both")
    project = load_project(edited(project_file, up=[0, -1, 0]))
    assert project.path == project_file
    assert (project.name, project.units, project.up) == ("rig", "m", (0.0, -1.0, 0.0))
    assert project.cameras.names == ("cam0", "cam1", "cam2")
    assert project.volume == Volume((0, 0, 0), (1, 1, 0.5))
    assert project.working_volume() == project.volume
    recording = project.recording("take")
    assert recording.videos == {name: folder / f"{name}.mkv" for name in project.cameras.names}
    assert [recording.offset(name) for name in project.cameras.names] == [0, 1, 0]
    assert (recording.frames, recording.split, recording.truth) == (1, "both", None)
    with pytest.raises(InputError, match="there is no recording 'other'; it has take"):
        project.recording("other")


def test_defaults(project_file) -> None:
    project = load_project(edited(project_file, volume=None))
    assert project.up == (0, 0, 1)
    assert project.volume is None
    assert project.working_volume().size[0] > 0
    assert project.recordings[0].frames is None


def test_round_trip(project_file, tmp_path) -> None:
    edited_recording(project_file, offsets={"cam1": 1}, frames=1)
    project = load_project(project_file)
    copy = tmp_path / "elsewhere" / "copy.yaml"
    copy.parent.mkdir()
    save_project(project, copy)
    again = load_project(copy)
    resolved = {camera: video.resolve() for camera, video in project.recordings[0].videos.items()}
    assert again.recordings[0] == dataclasses.replace(project.recordings[0], videos=resolved)
    assert (again.name, again.units, again.up, again.volume) == (project.name, "m", project.up, project.volume)
    torch.testing.assert_close(again.cameras.intrinsics, project.cameras.intrinsics)


def test_saved_paths_are_relative_so_that_the_folder_may_move(project_file, tmp_path) -> None:
    save_project(load_project(project_file), project_file)
    project_file.parent.rename(tmp_path / "moved")
    moved = load_project(tmp_path / "moved" / "project.yaml")
    assert moved.recordings[0].videos["cam0"] == tmp_path / "moved" / "cam0.mkv"


def test_unknown_keys_name_the_nearest(project_file) -> None:
    assert "unknown key 'unit'; did you mean 'units'?" in refused(edited(project_file, unit="m"))
    assert "unknown key 'zzz'; known keys are name, units" in refused(edited(project_file, unit=None, zzz=1))
    nested = edited(project_file, zzz=None, volume={"centre": [0, 0, 0], "size": [1, 1, 1]})
    assert "volume: unknown key 'centre'; did you mean 'center'?" in refused(nested)
    nested = edited_recording(edited(project_file, volume=None), offset={"cam0": 1})
    assert "recordings[0]: unknown key 'offset'; did you mean 'offsets'?" in refused(nested)


@pytest.mark.parametrize("key", ["name", "units", "calibration", "recordings"])
def test_required_keys(project_file, key: str) -> None:
    assert f"the key {key!r} is required" in refused(edited(project_file, **{key: None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": "inch"}, "units: 'inch' is not a unit of length; expected one of m, cm, mm, um"),
        ({"units": "mm"}, "calibration.toml: says units 'm', but 'mm' was asked for"),
        ({"calibration": "lost.toml"}, "lost.toml does not exist; paths are relative to the project file"),
        ({"up": [0, 0, 0]}, "up must be a direction"),
        ({"up": "z"}, "up must be three numbers"),
        ({"recordings": []}, "expected a list of at least one recording"),
        ({"recordings": ["take"]}, "recordings[0]: expected the keys name, split, calibration, videos"),
        ({"volume": {"center": [0, 0, 0], "size": [1, 0, 1]}}, "every side of size [1.0, 0.0, 1.0] must be greater"),
        ({"volume": {"center": [0, 0, ".nan"], "size": [1, 1, 1]}}, "center must be three finite numbers"),
        ({"volume": {"center": [0, 0, 0]}}, "the key 'size' is required"),
        ({"calibration": "~nosuchuser/calibration.toml"}, "calibration: '~nosuchuser/calibration.toml' is not a path"),
    ],
)
def test_bad_values(project_file, changes: dict, message: str) -> None:
    text = refused(edited(project_file, **changes))
    assert message in text
    assert str(project_file.parent) in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "validation"}, "recording 'take': split 'validation' must be one of train, test, both"),
        ({"name": "a/b"}, "name 'a/b' names files"),
        ({"videos": ["cam0.mkv"]}, "expected 'camera: value' pairs"),
        ({"offsets": {"cam9": 1}}, "offsets: camera 'cam9' is not in the calibration (cam0, cam1, cam2)"),
        ({"offsets": {"cam1": -2}}, "the offset of camera 'cam1' must be a whole number of frames, 0 or more, not -2"),
        ({"offsets": {"cam1": 0.5}}, "the offset of camera 'cam1' must be a whole number"),
        ({"frames": 0}, "frames must be a whole number of at least 1, not 0"),
        ({"truth": "truth.npz"}, "truth.npz does not exist"),
    ],
)
def test_bad_recordings(project_file, changes: dict, message: str) -> None:
    assert message in refused(edited_recording(project_file, **changes))


def test_camera_without_video_and_video_without_camera(project_file) -> None:
    videos = {"cam0": "cam0.mkv", "cam1": "cam1.mkv"}
    message = refused(edited_recording(project_file, videos=videos))
    assert "recording 'take': camera 'cam2' of the calibration has no video; add it under 'videos'" in message
    videos |= {"cam2": "cam2.mkv", "cam3": "cam2.mkv"}
    message = refused(edited_recording(project_file, videos=videos))
    assert "camera 'cam3' has a video but is not in the calibration (cam0, cam1, cam2)" in message


def test_missing_video(project_file) -> None:
    (project_file.parent / "cam1.mkv").unlink()
    message = refused(project_file)
    assert "video of camera 'cam1'" in message
    assert "cam1.mkv does not exist" in message


def test_unreadable_project_files(tmp_path) -> None:
    assert "lost.yaml: cannot be read (No such file or directory)" in refused(tmp_path / "lost.yaml")
    (tmp_path / "bad.yaml").write_text("name: [1,\nunits: m")
    assert "not a YAML file" in refused(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "the key 'name' is required" in refused(tmp_path / "empty.yaml")


def test_recordings_need_different_names(project_file) -> None:
    recording = yaml.safe_load(project_file.read_text())["recordings"][0]
    assert "two recordings are named 'take'" in refused(edited(project_file, recordings=[recording, recording]))


def test_impossible_calibration_names_file_and_camera(project_file) -> None:
    calibration = project_file.parent / "calibration.toml"
    text = calibration.read_text()
    calibration.write_text(text.replace("[0.0, 0.0, 1.0]]", "[0.0, 1.0, 1.0]]", 1))
    assert f"{calibration}: camera 'cam0': the last row of K is 0 1 1" in refused(project_file)
    save_toml(ring(2), calibration)
    assert "camera 'cam2' has a video but is not in the calibration (cam0, cam1)" in refused(project_file)


def test_unwritable_project(project_file) -> None:
    with pytest.raises(InputError, match="the project file cannot be written"):
        save_project(load_project(project_file), project_file / "below" / "a file.yaml")


def test_truth(project_file) -> None:
    folder = project_file.parent
    points = np.random.default_rng(0).normal(size=(2, 3, 3))
    points[0, 1] = np.nan
    truth = Truth(points, ["nose", "neck", "tail"], np.array([[0, 1], [1, 2]]), 30.0)
    save_truth(folder / "truth.npz", truth, "m")
    project = load_project(edited_recording(project_file, truth="truth.npz"))
    read = load_truth(project.recordings[0], project)
    np.testing.assert_array_equal(read.points3d, points)
    assert (read.names, read.edges.tolist(), read.fps) == (["nose", "neck", "tail"], [[0, 1], [1, 2]], 30.0)


def test_bad_truth(project_file) -> None:
    truth = project_file.parent / "truth.npz"
    points, names, edges = np.zeros((2, 2, 3)), np.array(["a", "b"]), np.zeros((0, 2), int)
    np.savez(truth, points3d=points, names=names, edges=edges, fps=30, units="mm")
    project = load_project(edited_recording(project_file, truth="truth.npz"))
    recording = project.recordings[0]
    with pytest.raises(InputError, match="its units are 'mm', the project's are 'm'"):
        load_truth(recording, project)
    np.savez(truth, points3d=points[:, :1], names=names, edges=edges, fps=30, units="m")
    with pytest.raises(InputError, match=r"points3d \(2, 1, 3\) must be \(frames, 2 names, 3\)"):
        load_truth(recording, project)
    np.savez(truth, points3d=points)
    with pytest.raises(InputError, match="lacks 'names'; expected points3d, names, edges, fps"):
        load_truth(recording, project)
    truth.write_text("not an archive")
    with pytest.raises(InputError, match="not an npz file of arrays"):
        load_truth(recording, project)
    with pytest.raises(InputError, match="recording 'take' has no 'truth'"):
        load_truth(dataclasses.replace(recording, truth=None), project)


@pytest.mark.parametrize("name", ["cam/1", "top cam", "..", "=cam"])
def test_camera_names_that_name_no_file(project_file, name: str) -> None:
    """They are in the names of pictures and tables that the check and the report write."""
    calibration = project_file.parent / "calibration.toml"
    calibration.write_text(calibration.read_text().replace('"cam1"', f'"{name}"'))
    text = refused(project_file)
    assert f"calibration.toml: camera {name!r} names files: use at most 100 letters, digits" in text
