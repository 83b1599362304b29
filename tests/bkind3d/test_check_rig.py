"""Planted faults of a rig, each found and named by the check; sound rigs, of which nothing is said."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_rig import DISTORTION, counted_frames, ring, write_project, write_video

from bkind3d import cli
from bkind3d.cameras import Cameras
from bkind3d.check import check_project
from bkind3d.check_motion import Pictures, check_clocks, check_pictures, check_views, lags, read_pictures
from bkind3d.check_rig import Finding, check_files, check_lenses, check_places, inverted
from bkind3d.data import Volume, load_project, probe_recording
from bkind3d.errors import InputError

SIZE, FPS, MOMENTS = (96, 72), 30.0, 240
VOLUME = Volume((0, 0, 0), (1.6, 1.6, 1.0))


def red(findings: list[Finding] | None) -> str:
    """The only finding, which is red."""
    assert findings is not None
    assert [finding.level for finding in findings] == ["red"]
    return findings[0].text


def changed(cameras: Cameras, place: int, **values: torch.Tensor) -> Cameras:
    tensors = {name: getattr(cameras, name).clone() for name in values}
    for name, value in values.items():
        tensors[name][place] = value
    return dataclasses.replace(cameras, **tensors)


# --- lenses and places ----------------------------------------------------------------------------------------------

SOUND = [ring(3), ring(6, (640, 480), DISTORTION), ring(4, (480, 640), radius=900.0, units="mm"), ring(2)]


@pytest.mark.parametrize("cameras", SOUND, ids=lambda cameras: str(len(cameras)))
def test_nothing_is_said_of_sound_rigs(cameras: Cameras) -> None:
    assert check_lenses(cameras) == check_places(cameras) == []
    side = cameras.centers[0].norm().item() / 2
    assert check_places(cameras, Volume((0, 0, 0), (side, side, side))) == []


def test_size_edited_without_the_matrix() -> None:
    cameras = ring(3, (640, 480))
    half = changed(cameras, 1, image_size=torch.tensor([320, 240]))
    assert "camera 'cam1': principal point (321, 237.5) outside its image 320×240" in red(check_lenses(half))
    cut = changed(cameras, 1, image_size=torch.tensor([450, 480]))
    (finding,) = check_lenses(cut)
    assert (finding.level, "far from the middle of its image 450×480" in finding.text) == ("amber", True)


def test_focal_length_against_field_of_view() -> None:
    cameras = ring(3, (640, 480))
    scale = torch.tensor([[30.0, 1, 1], [1, 30, 1], [1, 1, 1]])
    assert "field of view 1.91°" in red(check_lenses(changed(cameras, 2, intrinsics=cameras.intrinsics[2] * scale)))
    stretched = cameras.intrinsics[2] * torch.tensor([[1, 1, 1], [1, 2.0, 1], [1, 1, 1]])
    (finding,) = check_lenses(changed(cameras, 2, intrinsics=stretched))
    assert (finding.level, "not square" in finding.text) == ("amber", True)


@pytest.mark.parametrize("factor", [1000, 10, 0.1, 0.001])
@pytest.mark.parametrize("volume", [None, Volume((0, 0, 0), (1, 1, 0.5))])
def test_one_camera_in_other_units(factor: float, volume: Volume | None) -> None:
    cameras = ring(4)
    text = red(check_places(changed(cameras, 2, translation=factor * cameras.translation[2]), volume))
    assert text.startswith("camera 'cam2' stands ")
    assert text.endswith("is its translation in their units?")


@pytest.mark.parametrize("volume", [None, Volume((0, 0, 0), (1, 1, 0.5))])
def test_inverted_extrinsics(volume: Volume | None) -> None:
    cameras = ring(4)
    assert "camera 'cam1' does not see" in red(check_places(inverted(cameras, [1]), volume))
    assert "inverted: x_cam = R X + t takes world to camera" in red(check_places(inverted(cameras, [1]), volume))
    if volume is None:
        assert "of all cameras look inverted" in red(check_places(inverted(cameras, range(4))))


def test_camera_that_looks_elsewhere() -> None:
    cameras = ring(4)
    away = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64) @ cameras.rotation[3]
    bad = changed(cameras, 3, rotation=away, translation=-away @ cameras.centers[3])
    assert "camera 'cam3' does not see what the others look at: was it moved" in red(check_places(bad))


# --- pictures -------------------------------------------------------------------------------------------------------


def film(cameras: Cameras, moments: int = MOMENTS, seed: int = 0) -> Pictures:
    """An animal of three balls that runs and rests in a textured room with noise, (T, h, w) of each camera."""
    rng = np.random.default_rng(seed)
    pace = np.repeat(rng.choice([0.1, 0.4, 2.5], moments // 12 + 1), 12)[:moments]
    way = np.cumsum(0.09 * np.convolve(pace, np.ones(5) / 5, "same"))
    body = np.stack([0.5 * np.cos(way) + 0.15, 0.4 * np.sin(1.7 * way) - 0.1, 0.15 * np.sin(0.6 * way) - 0.2], -1)
    ahead = np.stack([-np.sin(way), np.cos(1.7 * way), 0 * way], -1)
    balls = [(body, 0.16), (body + 0.22 * ahead, 0.1), (body + np.array([0, 0, 0.24]), 0.08)]
    frames = {}
    for place, name in enumerate(cameras.names):
        width, height = cameras.image_size[place].tolist()
        room = rng.uniform(120, 200, (height, width))
        shot = np.repeat(room[None], moments, 0) + rng.normal(0, 1.5, (moments, height, width))
        rows, columns = np.mgrid[:height, :width]
        for centre, radius in balls:
            pixels, depth = (value[place].numpy() for value in cameras.project(torch.from_numpy(centre)))
            reach = radius * cameras.intrinsics[place, 0, 0].item() / depth
            away = np.hypot(columns - pixels[:, 0, None, None], rows - pixels[:, 1, None, None])
            shot[away < reach[:, None, None]] = 40
        frames[name] = shot.astype(np.float32)
    return Pictures(frames, FPS)


RIG = ring(4, SIZE)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return film(RIG)


def edited(pictures: Pictures, camera: str, change: Callable[[np.ndarray], np.ndarray]) -> Pictures:
    return Pictures({**pictures.frames, camera: change(pictures.frames[camera])}, pictures.fps)


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_said_of_sound_pictures(seed: int) -> None:
    cameras = ring(3 + seed, SIZE, DISTORTION if seed else (0.0,) * 5)
    sound = film(cameras, seed=seed + 10)
    assert check_pictures(sound) == check_clocks(sound) == check_views(sound, cameras, VOLUME) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda frames: np.minimum(frames, 9), "camera 'cam2' is black"),
        (lambda frames: np.full_like(frames, 255), "camera 'cam2' shows an even picture"),
        (lambda frames: np.repeat(frames[:1], len(frames), 0), "the same picture in 100% of the moments"),
        (lambda frames: frames[np.minimum(np.arange(len(frames)), 80)], "the same picture in 67% of the moments"),
    ],
    ids=["black", "even", "frozen", "freezes"],
)
def test_camera_that_shows_nothing_new(pictures: Pictures, change: Callable, words: str) -> None:
    assert words in red(check_pictures(edited(pictures, "cam2", change)))


def test_a_scene_in_which_nothing_moves(pictures: Pictures) -> None:
    still = Pictures({name: np.repeat(frames[:1], 150, 0) for name, frames in pictures.frames.items()}, FPS)
    (finding,) = check_pictures(still)
    assert (finding.level, "nothing moves in the first 5 s" in finding.text) == ("amber", True)
    assert check_clocks(still) is check_views(still, RIG, VOLUME) is None


@pytest.mark.parametrize("lag", [-20, -6, 5, 12, 25])
@pytest.mark.parametrize("camera", ["cam0", "cam3"])
def test_camera_out_of_step(pictures: Pictures, camera: str, lag: int) -> None:
    """It starts ``lag`` frames before the others, so that it shows movements later."""
    late, rest = slice(max(0, -lag), MOMENTS + min(0, -lag)), slice(max(0, lag), MOMENTS + min(0, lag))
    frames = {name: frames[late if name == camera else rest] for name, frames in pictures.frames.items()}
    found = lags(Pictures(frames, FPS))
    assert found is not None
    assert list(found) == [camera]
    assert abs(found[camera] - lag) <= 1
    text = red(check_clocks(Pictures(frames, FPS)))
    assert f"about {abs(found[camera])} frames" in text
    assert ("raise its offset" in text) == (lag > 0)


def test_few_pictures_are_not_compared(pictures: Pictures) -> None:
    assert check_clocks(Pictures({name: rows[:90] for name, rows in pictures.frames.items()}, FPS)) is None


@pytest.mark.parametrize(("one", "other"), [("cam0", "cam1"), ("cam1", "cam3")])
def test_exchanged_cameras(pictures: Pictures, one: str, other: str) -> None:
    frames = {**pictures.frames, one: pictures.frames[other], other: pictures.frames[one]}
    assert f"'{one}' and '{other}' exchanged" in red(check_views(Pictures(frames, FPS), RIG, VOLUME))


def test_turned_camera(pictures: Pictures) -> None:
    turned = edited(pictures, "cam2", lambda frames: frames[:, ::-1, ::-1])
    assert "'cam2' turned by 180°" in red(check_views(turned, RIG, VOLUME))


# --- the check of a project -----------------------------------------------------------------------------------------


def test_one_video_for_two_cameras(tmp_path: Path) -> None:
    project = load_project(write_project(tmp_path))
    videos = project.recordings[0].videos
    info = {"take": probe_recording(project.recordings[0], project.cameras)}
    assert check_files(info) == []
    shutil.copy(videos["cam0"], videos["cam2"])
    info = {"take": probe_recording(project.recordings[0], project.cameras)}
    assert "cameras 'cam0' and 'cam2' have the same video (cam0.mkv, cam2.mkv)" in red(check_files(info))
    report = check_project(project, gap=1, voxels=4)
    assert report.fails
    assert report.lines()[-1].startswith("red:   recording 'take': cameras 'cam0' and 'cam2' have the same video")
    assert any(line.startswith("grey:  views: not compared") for line in report.lines())


def test_findings_of_a_project(tmp_path: Path) -> None:
    """Every kind is told of, the worst last, with the recording's name where there are several."""
    project = load_project(write_project(tmp_path))
    sound = check_project(project, gap=1, voxels=4)
    assert not sound.fails
    kinds = [line.split(":")[1].strip() for line in sound.lines() if line.startswith(("green:", "grey:"))]
    assert sorted(kinds) == ["clocks", "files", "lenses", "pictures", "places", "views"]
    write_video(project.recordings[0].videos["cam1"], np.zeros((12, 48, 64, 3), np.uint8))
    twice = dataclasses.replace(
        project, recordings=[project.recordings[0], dataclasses.replace(project.recordings[0], name="b")]
    )
    assert [line for line in check_project(twice, gap=1, voxels=4).lines() if line.startswith("red:")] == [
        f"red:   recording {name!r}: camera 'cam1' is black: was its lens covered, or its exposure lost?"
        for name in ("take", "b")
    ]


def test_pictures_are_read_in_step(tmp_path: Path) -> None:
    path = write_project(tmp_path, recording={"offsets": {"cam1": 3}}, counts={"cam1": 15})
    project = load_project(path)
    write_video(project.recordings[0].videos["cam1"], np.roll(counted_frames(15), 3, axis=0))
    small = read_pictures(probe_recording(project.recordings[0], project.cameras), 5)
    assert {name: frames.shape for name, frames in small.frames.items()} == dict.fromkeys(
        project.cameras.names, (5, 48, 64)
    )
    assert small.frames["cam1"][:, 20, 20].tolist() == pytest.approx([0, 5, 10, 15, 20], abs=1)


def test_an_error_of_the_volume_names_the_cause(tmp_path: Path) -> None:
    path = write_project(tmp_path, inverted(ring(4), range(4)), volume=None)
    with pytest.raises(InputError, match=r"volume: .*; the extrinsics of all cameras look inverted"):
        check_project(load_project(path), gap=1)


def test_moments_that_lie_far_apart_are_not_all_decoded(tmp_path: Path) -> None:
    project = load_project(write_project(tmp_path))
    info = probe_recording(project.recordings[0], project.cameras)
    index = dataclasses.replace(info.index, frames=info.index.frames * np.array([[1], *([[1]] * 4), *([[400]] * 7)]))
    small = read_pictures(dataclasses.replace(info, index=index), 12)
    assert {len(frames) for frames in small.frames.values()} == {5}


def test_the_command_fails_where_something_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_project(tmp_path)
    monkeypatch.setattr(cli, "check_run", lambda project, config, out: check_project(project, gap=1, voxels=4))
    cli.main(["check", str(path)])
    shutil.copy(tmp_path / "cam0.mkv", tmp_path / "cam1.mkv")
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", str(path)])
    assert caught.value.code == 1
