import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_rig import DISTORTION, counted_frames, ring, write_project, write_video

from bkind3d.check import check_project
from bkind3d.data import Project, Truth, Volume, load_project, save_truth
from bkind3d.errors import InputError


def open_project(folder: Path, **options: object) -> Project:
    return load_project(write_project(folder, **options))  # type: ignore[arg-type]


def test_report(tmp_path: Path, capsys) -> None:
    project = open_project(tmp_path, recording={"split": "both"}, cameras=ring(4))
    report = check_project(project, gap="0.1 s", voxels=9)
    assert report.gaps == {"take": 3}
    assert report.recordings["take"].frames == 12
    assert report.voxels == (9, 9, 5)
    assert sum(report.seen_by) == pytest.approx(1)
    assert len(report.seen_by) == 5
    assert report.seen_by_two == pytest.approx(1)
    assert [camera.name for camera in report.cameras] == list(project.cameras.names)
    distance = np.hypot(3.0, 1.0)
    for camera in report.cameras:
        assert camera.distance == pytest.approx(distance)
        assert camera.nearest == pytest.approx(3.0 * 2**0.5)
        assert (camera.width, camera.height) == (64, 48)
        assert 0.9 < camera.share <= 1
    assert (report.pictures, report.warnings) == ([], [])
    report.print()
    printed = capsys.readouterr().out
    for text in ("project rig: 4 cameras", "take", "3 frames = 0.100 s", "64×48", "3.162 m", "9×9×5"):
        assert text in printed
    assert "proposed" not in printed


def test_effective_gap_is_reported(tmp_path: Path) -> None:
    lines = check_project(open_project(tmp_path), gap="0.12 s", voxels=4).lines()
    assert any("4 frames = 0.13" in line for line in lines)


def test_windows_that_follow_the_body(tmp_path: Path) -> None:
    """The voxels are a cube around the body; what is seen is still of the volume."""
    project = open_project(tmp_path, recording={"split": "both"}, cameras=ring(4))
    whole, window = (check_project(project, gap="0.1 s", voxels=9, window=side) for side in (0, 24))
    assert (whole.voxels, window.voxels) == ((9, 9, 5), (9, 9, 9))
    assert window.seen_by == whole.seen_by
    assert any(
        line.startswith("voxels: 9×9×9 around the body; those of the volume are seen by 0") for line in window.lines()
    )
    assert any(line.startswith("voxels: 9×9×5; seen by 0 cameras") for line in whole.lines())


def test_share_of_voxels_seen(tmp_path: Path) -> None:
    """Two cameras look along x at the same half of a long box."""
    cameras = ring(2)
    project = open_project(tmp_path, cameras=cameras, volume={"center": [0, 0, 0], "size": [30, 1, 1]})
    report = check_project(project, voxels=16, gap=1)
    points = project.working_volume().points(16)
    expected = cameras.in_view(points).sum(0)
    assert report.seen_by == [pytest.approx((expected == count).double().mean().item()) for count in range(3)]
    assert 0 < report.seen_by_two < 0.5


def test_proposed_volume_is_said_to_be_one(tmp_path: Path) -> None:
    report = check_project(open_project(tmp_path, volume=None), gap=1, voxels=8)
    assert any("proposed from the cameras' common view" in line for line in report.lines())


def test_pictures_show_the_volume_where_it_is(tmp_path: Path) -> None:
    cameras = ring(3, (320, 240), DISTORTION)
    project = open_project(tmp_path, cameras=cameras, frames=2)
    for name in cameras.names:
        write_video(project.recordings[0].videos[name], np.zeros((2, 240, 320, 3), dtype=np.uint8))
    report = check_project(project, gap=1, voxels=8, out=tmp_path / "out" / "pictures")
    assert [path.name for path in report.pictures] == ["volume_cam0.png", "volume_cam1.png", "volume_cam2.png"]
    corners, _ = cameras.project(project.working_volume().corners())
    for path, pixels in zip(report.pictures, corners):
        picture = np.array(Image.open(path).convert("RGB")).astype(int)
        scale = picture.shape[1] / 320
        drawn = (picture[..., 1] > 150) & (picture.min(-1) < 100)  # cyan or yellow, not the white label
        for index, (x, y) in enumerate(pixels.tolist()):
            column, row = (round((value + 0.5) * scale - 0.5) for value in (x, y))
            near = np.s_[max(row - 4, 0) : row + 5, max(column - 4, 0) : column + 5]
            assert drawn[near].any(), f"corner {index} of {path.name}"
            lower = index >> 2 == 0
            yellow = (picture[near][..., 0] > 150) & (picture[near][..., 2] < 100)
            assert yellow.any() == lower, f"corner {index} of {path.name}: the lower face is yellow"
        assert drawn.mean() < 0.1


def test_unwritable_pictures(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    with pytest.raises(InputError, match=r"volume_cam0.png: the picture cannot be written \(Not a directory\)"):
        check_project(project, gap=1, voxels=4, out=tmp_path / "project.yaml" / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap": 0}, "gap: 0 is 0 frames at .* the two frames of a pair must differ"),
        ({"gap": "0 s"}, "the two frames of a pair must differ"),
        ({"gap": 12}, "gap: 12 is 12 frames, but the recording has only 12"),
        ({"gap": 1, "voxels": 1}, "at least 2 are needed"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_project(open_project(tmp_path), **options)


def test_bad_volume(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    far = dataclasses.replace(project, volume=Volume((900, 0, 0), (1, 1, 1)))
    with pytest.raises(InputError, match=r"0.0% of its voxels are seen by two or more cameras; check its center"):
        check_project(far, gap=1)
    cameras = dataclasses.replace(
        project.cameras, rotation=torch.eye(3).repeat(3, 1, 1), translation=torch.eye(3, dtype=torch.float64)
    )
    behind = dataclasses.replace(project, cameras=cameras, volume=Volume((0, 0, -9), (1, 1, 1)))
    with pytest.raises(InputError, match="lies behind all 3 cameras"):
        check_project(behind, gap=1)


def test_video_of_another_size_than_its_calibration(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    write_video(project.recordings[0].videos["cam1"], counted_frames(12, (32, 24)))
    with pytest.raises(InputError, match=r"camera 'cam1': .*cam1.mkv is 32×24, but its calibration is for 64×48"):
        check_project(project, gap=1)


def test_truth_must_have_the_recordings_frames(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    save_truth(tmp_path / "truth.npz", Truth(np.zeros((11, 1, 3)), ["a"], np.zeros((0, 2), int), 30.0), "m")
    path.write_text(path.read_text().replace("split: train", "split: train\n  truth: truth.npz"))
    with pytest.raises(InputError, match=r"truth.npz: holds 11 frames, recording 'take' has 12"):
        check_project(load_project(path), gap=1)


def test_warnings(tmp_path: Path) -> None:
    project = open_project(tmp_path, recording={"split": "test"})
    assert check_project(project, gap=1).warnings == [
        "no recording has the split 'train' or 'both': there is nothing to train on"
    ]
    tiny = dataclasses.replace(project, volume=Volume((0, 0, 0), (0.01, 0.01, 0.01)))
    assert any(
        "316 volume sides away: are the units of both the same?" in text for text in check_project(tiny).warnings
    )
    cameras = project.cameras
    twice = dataclasses.replace(
        cameras,
        rotation=cameras.rotation[:1].repeat(3, 1, 1),
        translation=cameras.translation[:1].repeat(3, 1) + torch.tensor([[0.0], [0.1], [0.1]]),
    )
    warnings = check_project(dataclasses.replace(project, cameras=twice)).warnings
    assert "camera 'cam2' stands where another one stands: together they give no depth" in warnings
    assert "all cameras look from within 5 degrees: depth is hardly resolved" in warnings
