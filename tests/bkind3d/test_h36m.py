"""Human3.6M: read from files of its layout, made by formulas of their own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import centers_of_blobs, farthest, open_dataset
from layouts import (
    H36M,
    H36M_CAMERAS,
    H36M_DRAWN,
    HEIGHT,
    TEST_FRAMES,
    TRAIN_FRAMES,
    WIDTH,
    h36m_camera,
    joints,
    write_h36m_layout,
)

from bkind3d.check import check_project
from bkind3d.data import FrameCache, PairDataset, load_project, load_truth, probe_recording
from bkind3d.data.h36m import h36m_project
from bkind3d.errors import InputError

CLOSE = 0.3  # px at the raw size; images are JPEG
DRAWN = tuple(H36M_DRAWN)


def refused(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def h36m(tmp_path_factory: pytest.TempPathFactory) -> tuple[H36M, Path]:
    """The written data set, and the project read from it."""
    folder = tmp_path_factory.mktemp("h36m")
    written = write_h36m_layout(folder / "data", ("S1/Walking-1", "S9/Walking-1", "S9/TakingPhoto-2"))
    return written, h36m_project(folder / "data", folder / "out")


def test_everything_that_the_files_say_is_read(h36m) -> None:
    written, path = h36m
    project = load_project(path)
    assert [(row.name, row.split) for row in project.recordings] == [
        ("S1-Walking-1", "train"),
        ("S9-TakingPhoto-2", "test"),
        ("S9-Walking-1", "test"),
    ]
    assert (project.units, project.cameras.names) == ("mm", H36M_CAMERAS)
    assert [file.name for file in project.rigs()] == ["S1.toml", "S9.toml"]
    for recording in project.recordings:
        subject, action = recording.name.split("-", 1)
        cameras = project.cameras_of(recording)
        assert cameras.image_size.tolist() == [[WIDTH, HEIGHT]] * 4
        centers = np.stack([h36m_camera(number, subject).T for number in range(4)])
        np.testing.assert_allclose(cameras.centers, centers, atol=1e-6)
        truth = load_truth(recording, project)
        expected = written.points[f"{subject}/{action}"][
            :, [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27]
        ]
        np.testing.assert_allclose(truth.points3d, expected, atol=1e-6)
        assert truth.names[:3] == ["Hip", "RHip", "RKnee"]
        assert len(truth.edges) == len(truth.names) - 1 == 16
        assert truth.behaviours == ["TakingPhoto", "Walking"]
        assert {truth.behaviours[number] for number in truth.behaviour} == {action[:-2]}
        index = probe_recording(recording, cameras).index
        frames = written.frames[f"{subject}/{action}"]
        np.testing.assert_array_equal(index.clock, frames)
        np.testing.assert_array_equal(index.frames, np.repeat(frames[:, None], 4, axis=1))
        assert index.fps == 50.0
    assert not list(path.parent.rglob("*.jpg")), "images stay where they are"


def test_blobs_lie_where_the_cameras_project_the_joints(h36m) -> None:
    _, path = h36m
    assert farthest(path, DRAWN) < CLOSE
    report = check_project(load_project(path), gap=10, voxels=8, out=path.parent / "check")
    assert report.warnings == []
    assert report.gaps == {"S1-Walking-1": 10}
    assert len(report.pictures) == 4


@pytest.mark.parametrize("calibration", ["json", "h5"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [("R", "mm beside those of the other cameras"), ("t", "mm beside those of"), ("subject", "or of another subject")],
)
def test_extrinsics_that_the_cameras_do_not_agree_on(
    tmp_path: Path, calibration: str, wrong: str, message: str
) -> None:
    """R left transposed, the sign of t, another subject's cameras."""
    write_h36m_layout(tmp_path / "data", wrong=wrong, calibration=calibration)
    text = refused(h36m_project, tmp_path / "data", tmp_path / "out")
    assert message in text
    assert "annot.h5: the joints of camera" in text


def test_other_mistakes(tmp_path: Path) -> None:
    """K left transposed, and frames counted from 0."""
    write_h36m_layout(tmp_path / "K", wrong="K")
    assert "a transposed K is a usual cause" in refused(h36m_project, tmp_path / "K", tmp_path / "out")
    write_h36m_layout(tmp_path / "late", ("S1/Walking-1",), wrong="late")
    assert farthest(h36m_project(tmp_path / "late", tmp_path / "out"), DRAWN) > 4 * CLOSE


def test_intrinsics_of_other_images(tmp_path: Path) -> None:
    def enlarged(arrays: dict[str, np.ndarray]) -> None:
        arrays["pose/2d"] = 2 * arrays["pose/2d"]

    write_h36m_layout(tmp_path / "data", ("S1/Walking-1",), change=enlarged)
    message = refused(h36m_project, tmp_path / "data", tmp_path / "out")
    assert "px beside their annotated pixels; the calibration's intrinsics are of other images" in message


def test_both_forms_of_the_calibration_are_the_same(h36m, tmp_path: Path) -> None:
    written, path = h36m
    write_h36m_layout(tmp_path / "data", ("S1/Walking-1", "S9/Walking-1"), calibration="h5")
    one, other = load_project(path), load_project(h36m_project(tmp_path / "data", tmp_path / "out"))
    for subject in ("S1", "S9"):
        rigs = [project.cameras_of(project.recording(f"{subject}-Walking-1")) for project in (one, other)]
        for key in ("intrinsics", "distortion", "rotation", "translation"):
            torch.testing.assert_close(getattr(rigs[0], key), getattr(rigs[1], key))
    above = tmp_path / "processed"
    above.mkdir()
    for subject in ("S1", "S9"):
        (above / subject).symlink_to(tmp_path / "data" / subject)
    assert "no camera-parameters.json or cameras.h5 there or above" in refused(h36m_project, above, tmp_path / "b")
    (tmp_path / "camera-parameters.json").write_bytes((written.root / "camera-parameters.json").read_bytes())
    assert len(load_project(h36m_project(above, tmp_path / "c")).recordings) == 2
    named = h36m_project(above, tmp_path / "d", calibration=tmp_path / "data" / "cameras.h5")
    assert len(load_project(named).recordings) == 2


def test_pairs_show_the_joints_a_gap_apart(h36m) -> None:
    """Frames were left out; the images of a pair show the joints 10 frames apart, or 11 where frame t + 10 is gone."""
    _, path = h36m
    _, cache = open_dataset(path)
    entry = cache.recording("S1-Walking-1")

    def expected(frames: np.ndarray) -> np.ndarray:
        points = joints(32, frames, 1100.0, 900.0)[:, list(H36M_DRAWN.values())]
        return entry.cameras.project(torch.from_numpy(points))[0].transpose(0, 1).numpy()

    def farthest_of_pairs(recording) -> float:
        pairs = PairDataset(FrameCache({"take": recording}, "k"), ["take"], 10)
        found = centers_of_blobs(torch.stack([images for images, _ in pairs]).numpy().transpose(0, 1, 2, 4, 5, 3))
        rows = np.array([pairs.locate(k)[1:] for k in range(len(pairs))])
        gaps = np.diff(recording.clock[rows], axis=1)
        assert len(gaps)
        assert set(gaps.ravel()) <= {10, 11}
        early = entry.clock[rows[:, 0]]
        return float(np.abs(found - np.stack([expected(early), expected(early + gaps[:, 0])], axis=1)).max())

    assert farthest_of_pairs(entry) < CLOSE
    by_rows = dataclasses.replace(entry, clock=np.arange(len(entry)))
    assert farthest_of_pairs(by_rows) > 4 * CLOSE


def test_subjects_actions_and_moments_can_be_chosen(h36m, tmp_path: Path) -> None:
    root = h36m[0].root

    def names(out: str, **options: object) -> list[str]:
        project = load_project(h36m_project(root, tmp_path / out, **options))  # type: ignore[arg-type]
        return [row.name for row in project.recordings]

    assert names("a", subjects=["S9"]) == ["S9-TakingPhoto-2", "S9-Walking-1"]
    assert names("b", actions=["Walking"]) == ["S1-Walking-1", "S9-Walking-1"]
    assert names("c", actions=["TakingPhoto-2"]) == ["S9-TakingPhoto-2"]
    assert "subjects: 'S5' is not there; found S1, S9" in refused(h36m_project, root, tmp_path / "x", subjects=["S5"])
    assert "actions: 'Eating' is not there; found TakingPhoto, Walking, TakingPhoto-2, Walking-1" in refused(
        h36m_project, root, tmp_path / "x", actions=["Eating"]
    )
    thin = load_project(h36m_project(root, tmp_path / "d", every=20, gap=10))
    clocks = [probe_recording(row, thin.cameras_of(row)).index.clock.tolist() for row in thin.recordings[::2]]
    assert clocks == [[1, 11, 21, 31], [1]]
    assert TRAIN_FRAMES[0] == TEST_FRAMES[0] == 1
    assert thin.volume.size == (7500.0,) * 3
    np.testing.assert_allclose(thin.volume.center, (60, 340, 420), atol=2)  # where the cameras look
    lower = load_project(h36m_project(root, tmp_path / "e", center=(0, 0, 900), side=2000))
    assert (lower.volume.center, lower.volume.size) == ((0, 0, 900), (2000,) * 3)


def test_a_take_without_a_camera_is_left_out_and_said_so(tmp_path: Path, capsys) -> None:
    """As S11's Directions-2, whose video of one camera is corrupt."""

    def lose_a_camera(arrays: dict[str, np.ndarray]) -> None:
        kept = arrays["camera"] != 54138969
        for key in arrays:
            arrays[key] = arrays[key][kept]

    written = write_h36m_layout(tmp_path / "data", ("S11/Directions-2",), change=lose_a_camera)
    assert "no take S#/<Action>-#/annot.h5 with all cameras" in refused(h36m_project, written.root, tmp_path / "out")
    write_h36m_layout(tmp_path / "data", ("S11/Directions-1",))
    capsys.readouterr()
    project = load_project(h36m_project(written.root, tmp_path / "out"))
    assert [row.name for row in project.recordings] == ["S11-Directions-1"]
    assert "Directions-2, which has nothing of camera 54138969" in capsys.readouterr().out


def test_moments_that_one_camera_lacks_are_left_out(tmp_path: Path) -> None:
    def lose_frames(arrays: dict[str, np.ndarray]) -> None:
        kept = ~((arrays["camera"] == 58860488) & np.isin(arrays["frame"], [1, 13]))
        order = np.random.default_rng(0).permutation(kept.sum())  # nor need rows be in order
        for key in arrays:
            arrays[key] = arrays[key][kept][order]

    write_h36m_layout(tmp_path / "data", ("S1/Walking-1",), change=lose_frames)
    path = h36m_project(tmp_path / "data", tmp_path / "out")
    project = load_project(path)
    index = probe_recording(project.recordings[0], project.cameras).index
    assert index.clock.tolist() == [frame for frame in TRAIN_FRAMES.tolist() if frame not in (1, 13)]
    assert farthest(path, DRAWN) < CLOSE


def test_bad_files(h36m, tmp_path: Path) -> None:
    assert "holds none of the folders S1, S5" in refused(h36m_project, tmp_path, tmp_path / "out")

    def wrong(change) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_h36m_layout(folder, ("S1/Walking-1",), change=change)
        return refused(h36m_project, folder, folder / "out")

    assert "annot.h5: lacks 'pose/3d'; extract it with a current h36m-fetch" in wrong(lambda a: a.pop("pose/3d"))
    assert "expected one row per camera and frame, with 32 joints, not camera (52,), frame (51,)" in wrong(
        lambda a: a.update(frame=a["frame"][1:])
    )
    assert "the cameras have no frame in common" in wrong(
        lambda a: a.update(frame=a["frame"] + 100 * (a["camera"] == 60457274))
    )
    folder = tmp_path / "data"
    write_h36m_layout(folder, ("S1/Walking-1",))
    image = folder / "S1/Walking-1/imageSequence/58860488/img_000008.jpg"
    image.unlink()
    project = load_project(h36m_project(folder, tmp_path / "out"))
    message = refused(probe_recording, project.recordings[0], project.cameras)
    assert "img_000008.jpg: the image of frame 8 of camera '58860488' is missing" in message
    (image.parent / "img_000001.jpg").unlink()
    assert "img_000001.jpg: not a readable image (No such file" in refused(h36m_project, folder, tmp_path / "more")
    (folder / "S1/Walking-1/annot.h5").write_text("nothing")
    assert "annot.h5: not a readable HDF5 file" in refused(h36m_project, folder, tmp_path / "more")
    (folder / "camera-parameters.json").write_text("[]")
    assert "camera-parameters.json: not a calibration; those that are read are" in refused(
        h36m_project, folder, tmp_path / "more"
    )
    (folder / "camera-parameters.json").write_text('{"intrinsics": {}, "extrinsics": {"S5": {}}}')
    assert "has no cameras of S1, only of S5" in refused(h36m_project, folder, tmp_path / "more")
