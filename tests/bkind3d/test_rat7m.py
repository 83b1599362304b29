"""Rat7M: read from files of its layout, made by formulas of their own, and written."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from blobs import centers_of_blobs, farthest, open_dataset
from layouts import DRAWN, HEIGHT, MARKERS, WIDTH, write_mat5, write_mat73, write_rat7m_layout
from small_rig import ring, write_project

from bkind3d.check import check_project
from bkind3d.data import (
    FrameCache,
    PairDataset,
    Truth,
    build_cache,
    load_project,
    load_truth,
    probe_recording,
    save_truth,
)
from bkind3d.data.rat7m import rat7m_project
from bkind3d.errors import InputError
from bkind3d.foreign import read_mat
from bkind3d.sims.rat7m import write_rat7m

CLOSE = 0.2  # px, at the raw size; a reader that forgets MATLAB's first pixel is 1 off


def refused(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def rat7m(tmp_path_factory: pytest.TempPathFactory):
    """The written data set, and the project read from it."""
    folder = tmp_path_factory.mktemp("rat7m")
    written = write_rat7m_layout(folder / "data")
    return written, rat7m_project(folder / "data", folder / "out")


def test_everything_that_the_files_say_is_read(rat7m) -> None:
    written, path = rat7m
    project = load_project(path)
    assert [(row.name, row.split) for row in project.recordings] == [("s1-d1", "train"), ("s5-d1", "test")]
    assert (project.units, project.cameras.names) == ("mm", ("Camera1", "Camera2", "Camera3"))
    assert project.cameras.image_size.tolist() == [[WIDTH, HEIGHT]] * 3
    for recording in project.recordings:
        truth = load_truth(recording, project)
        np.testing.assert_array_equal(truth.points3d, written.points[recording.name])
        assert np.isnan(truth.points3d[1, 2]).all()
        assert tuple(truth.names) == MARKERS
        bones = {(truth.names[start], truth.names[end]) for start, end in truth.edges}
        assert {("SpineF", "SpineM"), ("SpineL", "HipR"), ("KneeL", "ShinL")} < bones
        assert not any("Offset" in end for bone in bones for end in bone)
        index = probe_recording(recording, project.cameras_of(recording)).index
        np.testing.assert_array_equal(index.frames, written.frames[recording.name][:, [0, 2, 1]])  # Camera1, 3, 2
        assert (index.clock.tolist(), index.fps) == (list(range(14)), 30.0)
    assert project.cameras_of(project.recordings[0]) is not project.cameras_of(project.recordings[1])
    assert not list(path.parent.rglob("*.mp4")), "videos stay where they are"


def test_blobs_lie_where_the_cameras_project_the_markers(rat7m) -> None:
    _, path = rat7m
    assert farthest(path, DRAWN) < CLOSE
    report = check_project(load_project(path), gap=3, voxels=8)
    assert report.warnings == []
    assert report.gaps == {"s1-d1": 3}


def distance_or_error(folder: Path, wrong: str) -> float | str:
    """How far blobs lie from where the markers project, in files as a mistaken reader would take the right ones."""
    write_rat7m_layout(folder / "data", ("s1-d1",), wrong=wrong)
    try:
        return farthest(rat7m_project(folder / "data", folder / "out", center=(0, 0, 0)), DRAWN)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("wrong", ["R", "pixel", "late", "frame"])
def test_mistakes_that_move_the_blobs(tmp_path: Path, wrong: str) -> None:
    """R left transposed, MATLAB's first pixel forgotten, frames one late, Camera1's frames taken for all."""
    distance = distance_or_error(tmp_path, wrong)
    assert isinstance(distance, float)
    assert distance > 4 * CLOSE


@pytest.mark.parametrize(("wrong", "message"), [("K", "a transposed K is a usual cause"), ("t", "lies behind all")])
def test_mistakes_that_no_rig_can_have(tmp_path: Path, wrong: str, message: str) -> None:
    assert message in str(distance_or_error(tmp_path, wrong))


def test_version_7_3(rat7m, tmp_path: Path) -> None:
    written, path = rat7m
    (tmp_path / "data").mkdir()
    for session, content in written.content.items():
        (tmp_path / "data" / session).symlink_to(written.root / session)
        write_mat73(tmp_path / "data" / f"mocap-{session}.mat", content)
    newer = load_project(rat7m_project(tmp_path / "data", tmp_path / "out"))
    older = load_project(path)
    for one, other in zip(newer.recordings, older.recordings):
        for key in ("intrinsics", "distortion", "rotation", "translation"):
            torch.testing.assert_close(getattr(newer.cameras_of(one), key), getattr(older.cameras_of(other), key))
        np.testing.assert_array_equal(load_truth(one, newer).points3d, written.points[one.name])
        assert tuple(load_truth(one, newer).names) == MARKERS, "HDF5 keeps fields by their names"
        indices = [probe_recording(row, p.cameras_of(row)).index for row, p in ((one, newer), (other, older))]
        np.testing.assert_array_equal(indices[0].frames, indices[1].frames)


def test_pairs_show_the_markers_a_gap_apart(rat7m, tmp_path: Path) -> None:
    """Every fifth moment and its partner are kept: the images of a pair show the markers 3 rows of mocap apart."""
    written, _ = rat7m
    _, cache = open_dataset(rat7m_project(written.root, tmp_path / "thin", every=5, gap=3))
    entry = cache.recording("s1-d1")
    assert entry.clock.tolist() == [0, 3, 5, 8, 10, 13]
    assert cache.recording("s5-d1").clock.tolist() == [0, 5, 10], "nothing is trained on here"
    assert entry.rows(5).tolist() == [0, 2, 4]
    drawn = torch.from_numpy(written.points["s1-d1"][:, [MARKERS.index(name) for name in DRAWN]])
    expected = entry.cameras.project(drawn)[0].transpose(0, 1).numpy()  # of all 14 rows

    def farthest_of_pairs(recording) -> float:
        pairs = PairDataset(FrameCache({"s1-d1": recording}, "k"), ["s1-d1"], 3)
        found = centers_of_blobs(torch.stack([images for images, _ in pairs]).numpy().transpose(0, 1, 2, 4, 5, 3))
        rows = recording.clock[[pairs.locate(k)[1] for k in range(len(pairs))]]
        return float(np.abs(found - np.stack([expected[rows], expected[rows + 3]], axis=1)).max())

    assert farthest_of_pairs(entry) < CLOSE
    by_rows = dataclasses.replace(entry, clock=np.arange(len(entry)))
    assert farthest_of_pairs(by_rows) > 4 * CLOSE


def test_sessions_moments_and_volume_can_be_chosen(rat7m, tmp_path: Path) -> None:
    root = rat7m[0].root
    project = load_project(rat7m_project(root, tmp_path / "a", sessions=["s5-d1"], moments=4, fps=60.0))
    assert [row.name for row in project.recordings] == ["s5-d1"]
    info = probe_recording(project.recordings[0], project.cameras)
    assert (info.frames, info.fps) == (4, 60.0)
    assert project.volume.size == (1000.0,) * 3
    np.testing.assert_allclose(project.volume.center, (20, -10, 60), atol=15)  # where the cameras look
    assert load_project(rat7m_project(root, tmp_path / "b", center=(1, 2, 3), side=400)).volume.center == (1, 2, 3)
    assert "this project exists" in refused(rat7m_project, root, tmp_path / "a")
    assert "sessions: 's9-d1' is not there; found s1-d1, s5-d1" in refused(
        rat7m_project, root, tmp_path / "c", sessions=["s9-d1"]
    )


def test_the_files_may_lie_anywhere_below_the_root(rat7m, tmp_path: Path) -> None:
    written, path = rat7m
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    (root / "video_sequences").mkdir()
    for file in written.root.rglob("*.*"):
        folder = "annotations" if file.suffix == ".mat" else "video_sequences"
        (root / folder / file.name).symlink_to(file)
    moved = load_project(rat7m_project(root, tmp_path / "out"))
    assert [chunk.name for chunk in moved.recordings[0].videos["Camera2"]] == [
        chunk.name for chunk in load_project(path).recordings[0].videos["Camera2"]
    ]


def test_a_missing_chunk_is_named(tmp_path: Path) -> None:
    write_rat7m_layout(tmp_path / "data", ("s1-d1",))
    missing = tmp_path / "data" / "s1-d1" / "s1-d1-camera2-10.mp4"
    content = missing.read_bytes()
    missing.unlink()
    project = load_project(rat7m_project(tmp_path / "data", tmp_path / "out"))
    message = refused(probe_recording, project.recordings[0], project.cameras)
    assert "camera 'Camera2': frame 14 is in no file" in message
    assert "s1-d1-camera2-5.mp4 ends with frame 9, s1-d1-camera2-15.mp4 follows" in message
    assert "s1-d1-camera2-10.mp4 is missing" in message
    less = load_project(rat7m_project(tmp_path / "data", tmp_path / "less", moments=5))
    assert probe_recording(less.recordings[0], less.cameras).frames == 5
    missing.write_bytes(content)
    (tmp_path / "data" / "copy").mkdir()
    (tmp_path / "data" / "copy" / missing.name).write_bytes(content)
    assert "is there twice" in refused(rat7m_project, tmp_path / "data", tmp_path / "twice")
    for file in tmp_path.rglob("s1-d1-camera2-*.mp4"):
        file.unlink()
    message = refused(rat7m_project, tmp_path / "data", tmp_path / "none")
    assert "mocap-s1-d1.mat: of its Camera2 there is no video s1-d1-camera2-<start>.mp4" in message


def test_bad_files(tmp_path: Path) -> None:
    assert "no mocap-s#-d#.mat is below this folder" in refused(rat7m_project, tmp_path, tmp_path / "out")
    write_rat7m_layout(tmp_path / "data", ("s1-d1",), moments=6)
    file = tmp_path / "data" / "mocap-s1-d1.mat"

    def wrong(change) -> str:
        content = {key: value for key, value in good.items() if not key.startswith("_")}
        content = {
            key: {name: dict(x) if isinstance(x, dict) else x for name, x in value.items()}
            for key, value in content.items()
        }
        change(content)
        write_mat5(file, content)
        message = refused(rat7m_project, tmp_path / "data", tmp_path / "out")
        assert "mocap-s1-d1.mat" in message
        return message

    good = read_mat(file)
    assert "has no struct 'mocap'" in wrong(lambda c: c.pop("mocap"))
    assert "mocap.HeadB is (5, 3), expected (6, 3)" in wrong(lambda c: c["mocap"].update(HeadB=np.zeros((5, 3))))
    lens = "cameras.Camera2"
    assert f"{lens} lacks 'frame'" in wrong(lambda c: c["cameras"]["Camera2"].pop("frame"))
    assert f"{lens}.frame has 3 numbers, expected 6" in wrong(
        lambda c: c["cameras"]["Camera2"].update(frame=np.arange(3))
    )
    assert f"{lens}.frame must hold whole numbers" in wrong(
        lambda c: c["cameras"]["Camera2"].update(frame=np.arange(6) + np.nan)
    )
    assert f"{lens}.frame advances by 0.2 per row of mocap, not by one; give the rows per second with --fps" in wrong(
        lambda c: c["cameras"]["Camera2"].update(frame=np.array([7, 7, 7, 7, 7, 8]))
    )
    assert "is -1; frames are counted from 0" in wrong(lambda c: c["cameras"]["Camera2"].update(frame=np.arange(6) - 1))
    assert "camera 'Camera2': 'rotationMatrix' must be 3 × 3" in wrong(
        lambda c: c["cameras"]["Camera2"].update(rotationMatrix=np.zeros(3))
    )
    assert "camera 'Camera2': the rotation is mirrored" in wrong(
        lambda c: c["cameras"]["Camera2"].update(rotationMatrix=-c["cameras"]["Camera2"]["rotationMatrix"])
    )
    file.write_text("no file of MATLAB")
    assert "not a readable MATLAB file" in refused(rat7m_project, tmp_path / "data", tmp_path / "out")


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_simulated_project_survives_the_layout(rig: Path, tmp_path: Path) -> None:
    project = load_project(rig)
    sessions = write_rat7m(project, ["train", "test"], tmp_path / "data", chunk=7)
    assert sessions == {"train": "s1-d1", "test": "s5-d1"}
    chunks = sorted(path.name for path in (tmp_path / "data" / "s1-d1").glob("s1-d1-camera3-*.mp4"))
    assert chunks == ["s1-d1-camera3-0.mp4", "s1-d1-camera3-14.mp4", "s1-d1-camera3-7.mp4"]
    again = load_project(rat7m_project(tmp_path / "data", tmp_path / "out", center=(0, 0, 300)))
    for before, after in zip(project.recordings, again.recordings):
        cameras, read = project.cameras_of(before), again.cameras_of(after)
        assert (after.name, after.split) == (sessions[before.name], before.split)
        for key in ("intrinsics", "distortion", "rotation", "image_size"):
            torch.testing.assert_close(getattr(read, key), getattr(cameras, key), rtol=0, atol=1e-6)
        torch.testing.assert_close(read.translation, 1000 * cameras.translation, rtol=0, atol=1e-6)
        truth, same = load_truth(before, project), load_truth(after, again)
        np.testing.assert_array_equal(same.points3d, 1000 * truth.points3d)
        assert same.names == truth.names
    options = {"crop": "none", "progress": False}
    original = build_cache(project, 48, 48, tmp_path / "cache", **options)
    copied = build_cache(again, 48, 48, tmp_path / "cache", **options)
    for name, session in sessions.items():
        one, other = original.recording(name), copied.recording(session)
        assert (len(other), other.fps) == (len(one), pytest.approx(one.fps))
        before, after = (np.array(entry.frames, dtype=int) for entry in (one, other))
        assert np.abs(before - after).mean() < 2
        if name == "train":  # where the animal moves from frame to frame
            apart = np.abs(before[:, None] - after).mean((2, 3, 4, 5))
            assert apart.argmin(0).tolist() == list(range(20))


def test_dropped_frames_and_distortion_survive_the_layout(tmp_path: Path) -> None:
    lens = (-0.2, 0.05, 0.001, -0.002, 0.01)
    path = write_project(tmp_path / "rig", ring(2, distortion=lens, skew=0.5, units="cm"), frames=12)
    index = tmp_path / "rig" / "index.npz"
    frames = np.array([[2, 0], [2, 4], [9, 5]])
    np.savez(index, frames=frames, cameras=["cam0", "cam1"], clock=[0, 1, 2], fps=25.0)
    points = np.random.default_rng(0).normal(size=(3, 2, 3))
    save_truth(tmp_path / "rig" / "truth.npz", Truth(points, ["a", "b"], np.zeros((0, 2), int), 25.0), "cm")
    content = yaml.safe_load(path.read_text())
    content["recordings"][0] |= {"index": "index.npz", "truth": "truth.npz"}
    path.write_text(yaml.safe_dump(content))
    project = load_project(path)
    write_rat7m(project, ["take"], tmp_path / "data", chunk=1)
    again = load_project(rat7m_project(tmp_path / "data", tmp_path / "out", center=(0, 0, 0), fps=25.0))
    info = probe_recording(again.recordings[0], again.cameras)
    assert info.index.frames.tolist() == [[0, 0], [0, 1], [1, 2]]
    torch.testing.assert_close(again.cameras.distortion, project.cameras.distortion, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.cameras.intrinsics, project.cameras.intrinsics, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(load_truth(again.recordings[0], again).points3d, 10 * points)
    brightness = [np.mean(frame[5:]) / 5 for number, frame in info.footage["Camera1"].read(np.array([0, 1]))]
    np.testing.assert_allclose(brightness, [2, 9], atol=0.5)


def test_what_cannot_be_written(rig: Path, tmp_path: Path) -> None:
    project = load_project(rig)
    write_rat7m(project, ["test"], tmp_path / "data")
    assert "s5-d1: this session exists" in refused(write_rat7m, project, ["test"], tmp_path / "data")
    assert "there is no recording 'other'" in refused(write_rat7m, project, ["other"], tmp_path / "data")
    odd = write_project(tmp_path / "odd", ring(2, (63, 48)), frames=2, suffix=".mkv")
    truth = Truth(np.zeros((2, 1, 3)), ["left ear"], np.zeros((0, 2), int), 30.0)
    save_truth(tmp_path / "odd" / "truth.npz", truth, "m")
    content = yaml.safe_load(odd.read_text())
    content["recordings"][0]["truth"] = "truth.npz"
    odd.write_text(yaml.safe_dump(content))
    message = refused(write_rat7m, load_project(odd), ["take"], tmp_path / "more")
    assert "joint 'left ear' is no name of a MATLAB field" in message
    save_truth(tmp_path / "odd" / "truth.npz", Truth(truth.points3d, ["ear"], truth.edges, 30.0), "m")
    message = refused(write_rat7m, load_project(odd), ["take"], tmp_path / "more")
    assert "H.264 needs images of even width and height" in message
