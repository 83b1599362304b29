"""Calibrations of other tools: where OpenCV projects points from each, and mistakes of convention, which show there."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from calibration_layouts import LAYOUTS, SIZE, Layout, Pose, anipose, caliscope, dannce, rig
from command_line import refused
from small_rig import DISTORTION, ring, write_project

from bkind3d.calib import calibration_lines, convert_calibration
from bkind3d.cameras import Cameras, load_calibration, read_calibration, save_toml
from bkind3d.cli import main
from bkind3d.data import load_project
from bkind3d.data.remap import Remap, network_cameras
from bkind3d.errors import InputError

POINTS = np.random.default_rng(0).uniform(-300, 300, (40, 3))


def poses_of(layout: Layout) -> list[Pose]:
    distortion = DISTORTION if layout.last else (*DISTORTION[:4], 0.0)
    return rig(layout.names, layout.skew, distortion=distortion)


def read(layout: Layout, path: Path) -> Cameras:
    calibration = read_calibration(path, layout.subject)
    assert (calibration.format, calibration.units) == (layout.format, layout.units)
    return calibration.cameras(None if layout.units else "mm", None if layout.sized else SIZE)


def worst(cameras: Cameras, poses: list[Pose]) -> float:
    """Greatest distance in pixels between where the cameras and where the tool's formula see the points."""
    assert cameras.names == tuple(pose.name for pose in poses)
    pixels, _ = cameras.project(torch.from_numpy(POINTS))
    return max(np.abs(pixels[place].numpy() - pose.project(POINTS)).max() for place, pose in enumerate(poses))


@pytest.mark.parametrize("name", LAYOUTS)
def test_points_lie_where_opencv_projects_them(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    poses = poses_of(layout)
    cameras = read(layout, layout.write(tmp_path, poses))
    assert worst(cameras, poses) < 1e-6
    assert cameras.image_size.tolist() == [list(SIZE)] * len(poses)
    for wrong in layout.wrongs:
        path = layout.write(tmp_path, poses, wrong)
        assert worst(read(layout, path), poses) > 0.4, wrong


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_stands_for_the_calibration_in_it(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    path = layout.write(tmp_path, poses_of(layout))
    (tmp_path / "notes.txt").write_text("cam 2 was bumped on Monday")
    (tmp_path / "project.yaml").write_text("name: rig\n")
    given, found = (read_calibration(place, layout.subject) for place in (path, tmp_path))
    assert set(given.files) == set(found.files)
    assert [lens.name for lens in given.lenses] == [lens.name for lens in found.lenses]


@pytest.mark.parametrize("name", LAYOUTS)
def test_converted_cameras_are_the_same(name: str, tmp_path: Path) -> None:
    layout, out = LAYOUTS[name], tmp_path.with_suffix(".toml")
    poses = poses_of(layout)
    path = layout.write(tmp_path, poses)
    units, sizes = None if layout.units else "mm", None if layout.sized else "640,480"
    convert_calibration(path, out, units=units, sizes=sizes, subject=layout.subject)
    assert worst(load_calibration(out), poses) < 1e-6
    shown = calibration_lines(read_calibration(path, layout.subject))
    assert f"{layout.format}, units {layout.units or 'not said'}" in shown[0]
    for pose, line in zip(poses, shown[2:], strict=True):
        assert line.split()[:2] == [pose.name, "640×480" if layout.sized else "not"]
        assert " ".join(f"{value:.4g}" for value in -pose.R.T @ pose.t) in line


def test_calib_asks_for_what_a_format_does_not_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(dannce(tmp_path, rig(("a", "b")))), tmp_path / "rig.toml"
    convert = ["calib", "convert", path, str(out)]
    assert "does not say its units; give them: --units m|cm|mm|um" in refused([*convert, "--sizes=640,480"], capsys)
    assert "no size for the images of 'a'; give it: --sizes W,H" in refused([*convert, "--units=mm"], capsys)
    assert not out.exists()
    main([*convert, "--units=mm", "--sizes=640,480"])
    assert f"{out}: 2 cameras of DANNCE .mat, units mm" in capsys.readouterr().out
    assert "exists; give --force" in refused([*convert, "--units=mm", "--sizes=640,480"], capsys)
    main(["calib", "show", str(out)])
    assert "Anipose TOML, units mm" in capsys.readouterr().out


def test_what_the_format_says_is_not_asked_for_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = LAYOUTS["json"]
    path = str(layout.write(tmp_path, poses_of(layout)))
    out = str(tmp_path / "out.toml")
    assert "says units 'mm', but 'm' was asked for" in refused(["calib", "convert", path, out, "--units=m"], capsys)
    assert "leave --sizes out" in refused(["calib", "convert", path, out, "--sizes=640,480"], capsys)
    assert "--sizes: expected W,H" in refused(["calib", "convert", path, out, "--sizes=640x480"], capsys)


def test_a_project_names_any_format(tmp_path: Path) -> None:
    """Sizes come from the videos, units from the project; a folder may be named, and a recording's own calibration."""
    poses = rig(("Camera1", "Camera2", "Camera3"))
    path = write_project(tmp_path, ring(3, SIZE, units="mm"), frames=2, volume=None)
    for folder in (tmp_path, tmp_path / "own"):
        folder.mkdir(exist_ok=True)
        dannce(folder, poses)
    text = path.read_text().replace("calibration.toml", "label3d_dannce.mat").replace("cam", "Camera")
    for old in (2, 1, 0):  # the videos keep their names
        text = text.replace(f"Camera{old}: Camera{old}", f"Camera{old + 1}: cam{old}")
    path.write_text(text.replace("split: train", "split: train\n  calibration: own"))
    project = load_project(path)
    assert project.cameras.image_size.tolist() == [list(SIZE)] * 3
    assert worst(project.cameras, poses) < 1e-6
    assert worst(project.cameras_of(project.recordings[0]), poses) < 1e-6


def test_cameras_ignored_and_not_yet_placed(tmp_path: Path) -> None:
    path = caliscope(tmp_path, rig(("cam_0", "cam_1")))
    assert [lens.name for lens in read_calibration(path).lenses] == ["cam_0", "cam_1"]
    path.write_text(path.read_text().replace("ignore = true", "ignore = false"))
    with pytest.raises(InputError, match=r"\[cameras.9\] \(camera 'cam_9'\) lacks 'matrix'"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.toml", b"[tool]\nname = 1\n", "not a calibration; those that are read are Anipose TOML"),
        ("a.txt", b"three cameras\n", "not a calibration"),
        ("a.toml", "name = 'caf\u00e9'".encode("latin-1"), "not a calibration"),
        ("a.mp4", b"\0\0\0 ftypisom" + bytes(200), "not a calibration"),
        ("a.json", b'{"cameras": [', r"not a readable JSON file \(Expecting value"),
        ("a.json", b'{"cameras": []}', "not a calibration"),
        ("a.yaml", b"%YAML:1.0\n---\nK_1: !!opencv-matrix\n  rows: 3\n", "not a readable YAML file"),
        ("a.xml", b"<calibration>", "not a readable XML file"),
        ("a.mat", b"MATLAB 5.0 MAT-file".ljust(128) + b"?" * 64, "not a readable MAT file"),
        ("a.pickle", b"\x80\x04K\x01.", "a pickle .* is not read"),
        ("transforms.json", b'{"frames": [{"transform_matrix": [[1]]}]}', "nerfstudio's transforms.json is not read"),
        ("intri.yml", b"%YAML:1.0\n---\nK_1: 3\n", "the other one is not beside it"),
        ("cameras.txt", b"1 OPENCV 640 480 1 1 0 0 0 0 0 0\n", "images.txt is not beside it"),
        (
            "a.json",
            b'{"cameras": [{"K": 1, "name": "a"}]}',
            r"a.json \(camera 'a'\) lacks 'dist'; expected K, dist, R, t",
        ),
        ("a.json", b'{"cameras": [{"K": 1}]}', "lacks 'name'"),
        ("a.toml", b"[cameras.1]\nmatrix = 1\nignore = true\n", "Caliscope TOML without a camera"),
    ],
)
def test_what_is_no_calibration_is_told_so(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_calibration(path)
    assert str(caught.value).startswith(str(path))


def test_damaged_matlab_files_are_told_so(tmp_path: Path) -> None:
    """32 bytes of every 512 of an HDF5 file, one place at a time."""
    layout = LAYOUTS["dannce73"]
    path = layout.write(tmp_path, poses_of(layout))
    whole, told = path.read_bytes(), 0
    for place in range(0, len(whole), 512):
        path.write_bytes(whole[:place] + b"\xa5" * 32 + whole[place + 32 :])
        try:
            read(layout, path)
        except InputError as error:
            told += str(error).startswith(str(path))
    assert told > 5


def test_folders_with_none_or_two(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no calibration; those that are read are"):
        read_calibration(tmp_path)
    anipose(tmp_path, rig(("a", "b")))
    dannce(tmp_path, rig(("a", "b")))
    with pytest.raises(InputError, match=r"holds 2 calibrations, calibration.toml, label3d_dannce.mat; name the one"):
        read_calibration(tmp_path)


def test_subjects_of_human36m(tmp_path: Path) -> None:
    layout = LAYOUTS["h36m"]
    path = layout.write(tmp_path, poses_of(layout))
    with pytest.raises(InputError, match=r"stood elsewhere for each of S1, S5: .* --subject NAME"):
        read_calibration(path)
    with pytest.raises(InputError, match="has no cameras of S7, only of S1, S5"):
        read_calibration(path, "S7")


# --- fisheye --------------------------------------------------------------------------------------------------------

FISHEYE = np.array([0.08, -0.03, 0.01, -0.002])


def fisheye(count: int = 2) -> Cameras:
    """The ring with short lenses of OpenCV's fisheye model."""
    cameras = ring(count, SIZE, (*FISHEYE, 0.0), radius=1500.0, skew=0.0, units="mm")
    scale = torch.tensor([[0.4, 1, 1], [1, 0.4, 1], [1, 1, 1]])
    return dataclasses.replace(
        cameras, intrinsics=cameras.intrinsics * scale, fisheye=torch.ones(count, dtype=torch.bool)
    )


def test_fisheye_equals_opencv() -> None:
    cameras = fisheye()
    points = np.random.default_rng(0).uniform(-900, 900, (60, 3))
    pixels, _ = cameras.project(torch.from_numpy(points))
    for place in range(2):
        vector, shift = cv2.Rodrigues(cameras.rotation[place].numpy())[0], cameras.translation[place].numpy()
        K = cameras.intrinsics[place].numpy()
        expected, _ = cv2.fisheye.projectPoints(points[:, None], vector, shift, K, FISHEYE)
        np.testing.assert_allclose(pixels[place], expected[:, 0], atol=1e-6)
        raw = np.random.default_rng(1).uniform([40, 40], [600, 440], (50, 2))
        straight = cv2.fisheye.undistortPoints(raw[:, None], K, FISHEYE, P=K)[:, 0]
        one = cameras.select([f"cam{place}"])
        np.testing.assert_allclose(one.undistort_points(torch.from_numpy(raw)[None])[0], straight, atol=1e-4)
        back = one.distort_points(torch.from_numpy(straight)[None])[0]
        np.testing.assert_allclose(back, raw, atol=1e-4)
    mixed = dataclasses.replace(cameras, fisheye=torch.tensor([True, False]))
    assert (mixed.project(torch.from_numpy(points))[0][0] == pixels[0]).all()
    assert (mixed.project(torch.from_numpy(points))[0][1] - pixels[1]).abs().max() > 1


def test_fisheye_in_a_file_and_back(tmp_path: Path) -> None:
    cameras = fisheye()
    save_toml(cameras, tmp_path / "a.toml")
    text = (tmp_path / "a.toml").read_text()
    assert text.count("fisheye = true") == 2
    again = load_calibration(tmp_path / "a.toml", "mm")
    assert again.fisheye.tolist() == [True, True]
    torch.testing.assert_close(again.distortion, cameras.distortion)
    (tmp_path / "a.toml").write_text(text.replace(", -0.002]", ", -0.002, 0.5]"))
    with pytest.raises(InputError, match="more than the fisheye model of k1 k2 k3 k4"):
        load_calibration(tmp_path / "a.toml", "mm")
    assert not cameras.pinhole().fisheye.any()


def test_folded_fisheye_is_not_in_view() -> None:
    """θ - θ³/3 grows up to one radian."""
    cameras = dataclasses.replace(fisheye(1), distortion=torch.tensor([[-1 / 3, 0, 0, 0, 0]]))
    angles = torch.linspace(0, 1.5, 100, dtype=torch.float64)
    rays = torch.stack([torch.tan(angles), torch.zeros_like(angles), torch.ones_like(angles)], -1)
    seen = cameras.in_view(cameras.centers[0] + rays @ cameras.rotation[0])[0]
    assert seen[angles < 0.99].all()
    assert not seen[angles > 1.01].any()


def test_fisheye_frames_are_undistorted_as_opencv_does_it() -> None:
    """A smooth picture through the frame cache's remapping and through OpenCV's."""
    camera = fisheye(1)
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]]
    picture = np.stack([127 + 100 * np.sin(columns / 40), 127 + 100 * np.cos(rows / 30), (rows + columns) / 5], -1)
    picture = np.rint(picture).astype(np.uint8)
    K = camera.intrinsics[0].numpy()
    expected = cv2.fisheye.undistortImage(picture, K, FISHEYE, Knew=K)
    network = network_cameras(camera, [(0, 0, *SIZE)], SIZE[1], SIZE[0])
    got = Remap(camera, network)(picture)
    inside = np.s_[60:-60, 60:-60]
    assert np.abs(got[inside].astype(int) - expected[inside]).max() <= 3
    assert np.abs(picture[inside].astype(int) - expected[inside]).max() > 50


def test_what_a_message_quotes_of_a_file_is_cut(tmp_path: Path) -> None:
    (tmp_path / "cameras.txt").write_text(
        "# Camera list with one line of data per camera:\n1 OPENCV 64 48 90 90 32 24 0 0 0 0"
    )
    images = tmp_path / "images.txt"
    images.write_text(f"# Image list with two lines of data per image:\n1 {'a.' * 5000} 0 0 0 0 0 3 1 a.png\n")
    with pytest.raises(InputError, match=r"images\.txt: ") as caught:
        read_calibration(images)
    assert len(str(caught.value)) <= 600
