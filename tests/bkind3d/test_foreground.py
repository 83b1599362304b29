import dataclasses
import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_rig import DISTORTION, ring, write_project, write_video

from bkind3d.check import check_project
from bkind3d.check_foreground import ForegroundCheck
from bkind3d.data import PairDataset, build_cache, load_project, save_project
from bkind3d.data import cache as cache_module
from bkind3d.data import foreground as masking
from bkind3d.data.foreground import Background, estimate_background, foreground_masks, pooled_background
from bkind3d.data.window import look
from bkind3d.errors import InputError
from bkind3d.sims.simulate.motion import animate
from bkind3d.sims.simulate.rig import RING, make_film
from bkind3d.sims.studio import place_cameras

MOMENTS = 60


@pytest.fixture(scope="module")
def film() -> tuple[np.ndarray, np.ndarray]:
    """Pictures (T, M, H, W, 3) of the simulated animal by two cameras, and its exact masks (T, M, H, W) bool."""
    cameras = place_cameras(RING, 4, (96, 96), False, np.random.default_rng(0))
    animation = animate(12 * MOMENTS, 30, np.random.default_rng(1))
    pictures, masks = [], []
    for name in cameras.names[:2]:
        film = make_film(cameras.select([name]), animation, 2, 3)
        moments = range(0, len(film), 12)
        pictures.append([film.picture(i) for i in moments])
        rays = np.stack([film.parts(i) >= 0 for i in moments]).reshape(MOMENTS, 96, 2, 96, 2)
        masks.append(rays.mean((2, 4)) > 0.5)
    return np.stack(pictures, 1), np.stack(masks, 1)


@pytest.fixture(scope="module")
def room(film) -> Background:
    return estimate_background(film[0])


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean intersection over union of masks (T, M, H, W), 0 to 255, with true ones."""
    body = found > 127
    return float(((body & truth).sum((-2, -1)) / (body | truth).sum((-2, -1))).mean())


def test_masks_of_the_simulated_animal(film, room) -> None:
    frames, truth = film
    masks = foreground_masks(frames, room)
    assert (masks.dtype, masks.shape) == (np.uint8, truth.shape)
    assert set(np.unique(masks)) == {0, 255}
    assert overlap(masks, truth) > 0.82


def test_masks_of_some_frames_are_those_of_all(film, room) -> None:
    frames, _ = film
    np.testing.assert_array_equal(foreground_masks(frames, room)[7:9], foreground_masks(frames[7:9], room))


def test_an_empty_room_has_no_foreground(room) -> None:
    noise = np.random.default_rng(0).normal(0, 2, (10, *room.pictures.shape))
    empty = np.clip(room.pictures + noise, 0, 255).astype(np.uint8)
    assert foreground_masks(empty, room).mean() < 0.0005 * 255


def test_an_animal_that_rests_for_most_of_the_time(film) -> None:
    """Two moments of three show it at one place, where the median of the pictures shows it too."""
    frames, truth = film
    frames, truth = frames.copy(), truth.copy()
    rest = np.random.default_rng(0).normal(0, 1, (40, *frames.shape[1:]))
    frames[10:50] = np.clip(frames[10] + rest, 0, 255)
    truth[10:50] = truth[10]
    median = np.median(frames, axis=0)
    background = estimate_background(frames)
    there = truth[10]
    assert np.abs(median - background.pictures)[there].mean() > 30
    masks = foreground_masks(frames, background)
    assert overlap(masks[10:50], truth[10:50]) > 0.8
    assert overlap(masks[50:], truth[50:]) > 0.8


def test_light_that_drifts(film) -> None:
    frames, truth = film
    light = np.linspace([0.75, 0.8, 0.85], [1.1, 1.1, 1.05], MOMENTS)[:, None, None, None]
    drifting = np.clip(frames * light, 0, 255).astype(np.uint8)
    background = estimate_background(drifting)
    assert overlap(foreground_masks(drifting, background), truth) > 0.8
    still = np.ones((MOMENTS, 3), dtype=np.float32)
    fixed = pytest.MonkeyPatch()
    fixed.setattr(masking, "gains", lambda frames, picture: still[: len(frames)])
    assert overlap(foreground_masks(drifting, background), truth) < 0.6, "the drift is one that matters"
    fixed.undo()


def test_a_shadow_is_not_foreground(film, room, monkeypatch) -> None:
    frames, truth = film
    near = masking._grown(masking._grown(truth.reshape(-1, 96, 96))).reshape(truth.shape)

    def beside() -> float:
        return (foreground_masks(frames, room)[~near] > 127).sum() / truth.sum()

    assert beside() < 0.04
    monkeypatch.setattr(masking, "_shadows", lambda masks, *rest: tuple(np.zeros((3, 0), dtype=int)))
    assert beside() > 0.3


def test_dark_parts_are_foreground(room) -> None:
    """A black square, and a brown one that is no darker than a shadow, on the floor of the simulated room."""
    empty = np.rint(room.pictures).astype(np.uint8)[None]
    for color in ((20, 20, 20), (110, 75, 55)):
        picture = empty.copy()
        picture[0, :, 60:75, 40:60] = color
        found = foreground_masks(picture, room)[0]
        assert (found[:, 61:74, 41:59] == 255).mean() > 0.98
        assert (found > 127).sum() < 1.1 * 2 * 15 * 20


def test_a_mixed_pixel_belongs_to_the_larger_part() -> None:
    background = Background(np.full((1, 40, 40, 3), 100, np.float32), np.ones((1, 40, 40), np.float32))
    picture = np.full((1, 1, 40, 40, 3), 100, np.uint8)
    picture[0, 0, 10:30, 10:30] = 220
    picture[0, 0, 10:30, 9] = 100 + 0.3 * 120
    picture[0, 0, 10:30, 30] = 100 + 0.7 * 120
    body = foreground_masks(picture, background)[0, 0] == 255
    assert body[10:30, 10:31].all()
    assert body.sum() == 20 * 21


def test_recordings_of_one_rig_share_their_background(film) -> None:
    """The animal never leaves its place in one recording, and does in another."""
    frames, truth = film
    still = np.repeat(frames[:1], 30, axis=0)
    assert overlap(foreground_masks(still, estimate_background(still)), truth[:1].repeat(30, 0)) < 0.1
    assert overlap(foreground_masks(still, pooled_background([still, frames])), truth[:1].repeat(30, 0)) > 0.8


def test_a_flat_body_on_a_rough_floor() -> None:
    """The floor is full of edges and the body has none: that alone does not make the body the room."""
    floor = np.random.default_rng(0).integers(60, 110, (72, 96, 1)).repeat(3, -1).astype(np.uint8)
    frames = np.repeat(floor[None, None], 60, axis=0)
    rows, columns = np.mgrid[:72, :96]
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)[:, None, None]
    truth = (np.hypot(columns - 48 - 25 * np.cos(turn), rows - 36 - 18 * np.sin(turn)) < 9)[:, None]
    frames[truth] = 220, 180, 40
    assert overlap(foreground_masks(frames, estimate_background(frames)), truth) > 0.98


@pytest.mark.parametrize("moments", [1, 2, 3])
def test_a_few_moments_are_enough_to_run(film, moments: int) -> None:
    frames, truth = film
    background = estimate_background(frames[:moments])
    assert np.isfinite(background.pictures).all()
    assert foreground_masks(frames[:moments], background).shape == truth[:moments].shape


# The cache.


def moving_square(count: int = 12, size: tuple[int, int] = (64, 48), seed: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3) of a bright square that crosses a still texture."""
    width, height = size
    texture = np.random.default_rng(seed).integers(60, 100, (height, width, 1)) * np.array([1.0, 0.9, 0.8])
    frames = np.repeat(texture[None], count, axis=0).astype(np.uint8)
    for moment in range(count):
        frames[moment, 16:32, 4 * moment : 4 * moment + 12] = 230, 60, 40
    return frames


def square_project(folder: Path, **options: object) -> Path:
    """A project of moving squares; returns the project file."""
    path = write_project(folder, **options)  # type: ignore[arg-type]
    for index in range(3):
        write_video(folder / f"cam{index}.mkv", moving_square(seed=index))
    return path


def build(path: Path, folder: Path, **options: object):
    options = {"crop": "none", "foreground": True, **options}
    return build_cache(load_project(path), 48, 64, folder, progress=False, **options)  # type: ignore[arg-type]


def test_masks_are_built_only_when_asked(tmp_path: Path) -> None:
    path, folder = square_project(tmp_path), tmp_path / "cache"
    plain = build(path, folder, foreground=False)
    assert plain.recording("take").masks_path is None
    assert not list(folder.glob("*.masks-*"))
    with pytest.raises(InputError, match=r"recording 'take': no masks of the body were built; set data\.foreground"):
        plain.recording("take").masks  # noqa: B018
    written = plain.recording("take").path.stat().st_mtime_ns
    cache = build(path, folder)
    recording = cache.recording("take")
    assert recording.path.stat().st_mtime_ns == written, "the frames are not read again"
    assert recording.masks_path.name.startswith(f"{recording.path.stem}.masks-")
    assert isinstance(recording.masks, np.memmap)
    assert (recording.masks.shape, recording.masks.dtype) == ((12, 3, 48, 64), np.uint8)
    for moment in (0, 6, 11):
        truth = np.zeros((48, 64), dtype=bool)
        truth[16:32, 4 * moment : 4 * moment + 12] = True
        for view in range(3):
            np.testing.assert_array_equal(recording.masks[moment, view] > 127, truth)
    assert np.abs(recording.backgrounds().astype(int)[0] - moving_square()[11])[:, :40].max() <= 2
    assert cache.key != plain.key
    data = pickle.dumps(recording)
    assert len(data) < 10_000 < recording.masks.nbytes
    np.testing.assert_array_equal(pickle.loads(data).masks, recording.masks)


def test_masks_are_reused_and_rebuilt(tmp_path: Path, monkeypatch) -> None:
    path, folder = square_project(tmp_path), tmp_path / "cache"
    built = []
    original = cache_module._build_masks
    monkeypatch.setattr(cache_module, "_build_masks", lambda *arguments: (built.append(1), original(*arguments)))
    first = build(path, folder)
    assert (build(path, folder).key, len(built)) == (first.key, 1)
    recording = first.recording("take")
    expected = np.array(recording.masks)
    recording.masks_path.write_bytes(b"short")
    np.testing.assert_array_equal(build(path, folder).recording("take").masks, expected)
    recording.masks_path.with_suffix(".npz").unlink()
    assert build(path, folder).recording("take").backgrounds() is not None
    assert len(built) == 3
    monkeypatch.setattr(masking, "VERSION", masking.VERSION + 1)
    assert build(path, folder).key != first.key
    assert len(built) == 4


def test_what_is_trained_on_does_not_depend_on_what_is_tested_on(tmp_path: Path) -> None:
    path = square_project(tmp_path)
    content = yaml.safe_load(path.read_text())
    alone = build(path, tmp_path / "cache").recording("take").masks_path
    (row,) = content["recordings"]
    others = {f"cam{index}": f"other{index}.mkv" for index in range(3)}
    for index in range(3):
        write_video(tmp_path / f"other{index}.mkv", moving_square(seed=index)[::-1])
    paths = {}
    for split in ("test", "train"):
        content["recordings"] = [row, {"name": "other", "split": split, "videos": others}]
        path.write_text(yaml.safe_dump(content))
        cache = build(path, tmp_path / "cache")
        paths[split] = cache.recording("take").masks_path
    assert paths["test"] == alone
    assert paths["train"] != alone, "recordings that are trained on share their background"


@pytest.mark.parametrize("crop", ["none", "volume"])
def test_the_projects_own_masks_go_the_way_of_the_frames(tmp_path: Path, crop: str) -> None:
    """Through offset, lens, crop and size: masks that are the video itself come out as its frames."""
    cameras = ring(2, (64, 48), DISTORTION)
    path = write_project(tmp_path, cameras, counts={"cam1": 15}, recording={"offsets": {"cam1": 3}})
    for index, count in enumerate((12, 15)):
        square = np.repeat((255 * (moving_square(count)[..., :1] > 200)).astype(np.uint8), 3, -1)
        write_video(tmp_path / f"cam{index}.mkv", square)
        write_video(tmp_path / f"mask{index}.mkv", square)
    content = yaml.safe_load(path.read_text())
    content["recordings"][0]["masks"] = {"cam0": "mask0.mkv", "cam1": "mask1.mkv"}
    path.write_text(yaml.safe_dump(content))
    cache = build_cache(load_project(path), 30, 40, tmp_path / "cache", crop=crop, foreground=True, progress=False)
    recording = cache.recording("take")
    assert recording.masks[:, :, 8:24].max() == 255
    np.testing.assert_array_equal(recording.masks, recording.frames[..., 0])
    assert recording.backgrounds() is None


def with_masks(folder: Path, masks: dict[str, str] | None = None) -> Path:
    """A project with masks of its own: a rectangle, in rows 10 to 20 and columns 24 to 40."""
    path = square_project(folder)
    rectangle = np.zeros((12, 48, 64, 3), dtype=np.uint8)
    rectangle[:, 10:20, 24:40] = 255
    for index in range(3):
        write_video(folder / f"mask{index}.mkv", rectangle)
    content = yaml.safe_load(path.read_text())
    content["recordings"][0]["masks"] = masks or {f"cam{index}": f"mask{index}.mkv" for index in range(3)}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_rectangle_lands_where_it_is(tmp_path: Path) -> None:
    path = with_masks(tmp_path)
    project = load_project(path)
    cache = build_cache(project, 24, 32, tmp_path / "cache", crop="none", foreground=True, progress=False)
    expected = np.zeros((24, 32), dtype=np.uint8)
    expected[5:10, 12:20] = 255
    np.testing.assert_array_equal(cache.recording("take").masks, np.broadcast_to(expected, (12, 3, 24, 32)))
    save_project(project, tmp_path / "again.yaml")
    assert load_project(tmp_path / "again.yaml").recordings[0].masks == project.recordings[0].masks
    assert tmp_path / "mask2.mkv" in project.files()


def test_own_masks_may_be_images(tmp_path: Path) -> None:
    for moment in range(12):
        picture = np.zeros((48, 64), dtype=np.uint8)
        picture[:, 4 * moment : 4 * moment + 8] = 255
        Image.fromarray(picture).save(tmp_path / f"mask_{moment:03d}.png")
    path = with_masks(tmp_path, dict.fromkeys(("cam0", "cam1", "cam2"), "mask_%03d.png"))
    masks = build(path, tmp_path / "cache").recording("take").masks
    assert [int(row.argmax()) for row in masks[:, 1, 20]] == [4 * moment for moment in range(12)]
    (tmp_path / "mask_005.png").unlink()
    with pytest.raises(InputError, match=r"mask_005.png: the image of frame 5 of camera 'cam0' is missing"):
        build(path, tmp_path / "other")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"cam0": "mask0.mkv"}, "masks: camera 'cam1' has none; give masks of every camera, or of none"),
        ({"cam9": "mask0.mkv"}, "camera 'cam9' has masks but is not in the calibration"),
        (dict.fromkeys(("cam0", "cam1", "cam2"), "none.mkv"), "masks of camera 'cam0': the file .* does not exist"),
        ("mask0.mkv", "masks: expected 'camera: value' pairs"),
    ],
)
def test_own_masks_that_the_project_file_cannot_mean(tmp_path: Path, masks, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_project(with_masks(tmp_path, masks))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((11, 48, 64, 3)), r"camera 'cam1': .*mask1.mkv have 11 frames|mask1.mkv has 11 frames"),
        (np.zeros((12, 24, 32, 3)), r"camera 'cam1': the masks .*mask1.mkv are 32×24, its video is 64×48"),
        (np.zeros((14, 48, 64, 3)), r"camera 'cam1': the masks .*mask1.mkv have 14 frames, its video has 12"),
    ],
)
def test_own_masks_that_do_not_match_the_video(tmp_path: Path, frames: np.ndarray, message: str) -> None:
    path = with_masks(tmp_path)
    write_video(tmp_path / "mask1.mkv", frames.astype(np.uint8))
    with pytest.raises(InputError, match=message):
        build(path, tmp_path / "cache")
    assert build(path, tmp_path / "cache", foreground=False).recording("take").masks_path is None


def test_own_masks_must_be_white(tmp_path: Path) -> None:
    path = with_masks(tmp_path)
    for index in range(3):
        write_video(tmp_path / f"mask{index}.mkv", np.ones((12, 48, 64, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"mask0.mkv: the masks are nowhere brighter than 1; the body must be white"):
        build(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.masks-*"))


def test_own_masks_are_read_again_when_they_change(tmp_path: Path) -> None:
    path = with_masks(tmp_path)
    first = build(path, tmp_path / "cache").recording("take").masks_path
    assert build(path, tmp_path / "cache").recording("take").masks_path == first
    write_video(tmp_path / "mask1.mkv", np.full((12, 48, 64, 3), 255, dtype=np.uint8))
    recording = build(path, tmp_path / "cache").recording("take")
    assert recording.masks_path != first
    assert (recording.masks[:, 1] == 255).all()


def test_full_disk_while_masks_are_written(tmp_path: Path, monkeypatch) -> None:
    path, folder = square_project(tmp_path), tmp_path / "cache"
    frames = build(path, folder, foreground=False).recording("take").path

    def pwrite(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(InputError, match=r"cache: the disk is full: the masks of recording 'take' need .* GB; free"):
        build(path, folder)
    monkeypatch.undo()
    assert frames.exists()
    assert not list(folder.glob("*.part"))
    assert not list(folder.glob("*.masks-*.json"))
    assert build(path, folder).recording("take").masks.any()


# Pairs.


def test_pairs_carry_masks(tmp_path: Path) -> None:
    cache = build(square_project(tmp_path), tmp_path / "cache")
    recording = cache.recording("take")
    pairs = PairDataset(cache, ["take"], 4, masks=True)
    images, projections, masks, distances = pickle.loads(pickle.dumps(pairs))[2]
    assert images.shape == (2, 3, 3, 48, 64)
    np.testing.assert_array_equal(projections, recording.projections.expand(2, -1, -1, -1))
    np.testing.assert_array_equal(masks, recording.masks[[2, 6]])
    assert distances.shape == masks.shape
    np.testing.assert_array_equal(distances == 0, masks > 127)
    images, projections, masks, distances = PairDataset(cache, ["take"], 4, masks=True, window=32)[2]
    assert images.shape == (2, 3, 3, 32, 32)
    assert masks.shape == distances.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(projections, look(recording, np.array([2, 6]), 32)[2])
    backward = PairDataset(cache, ["take"], 4, reverse=True, masks=True)[2][2]
    np.testing.assert_array_equal(backward, recording.masks[[6, 2]])
    assert len(PairDataset(cache, ["take"], 4)[2]) == 2
    plain = build(tmp_path / "project.yaml", tmp_path / "cache", foreground=False)
    with pytest.raises(InputError, match="recording 'take': the cache was built without masks"):
        PairDataset(plain, ["take"], 4, masks=True)


# The check.


def ball_project(folder: Path, frozen: int | None = None, split: int | None = None) -> Path:
    """Four cameras film a ball on its way through the volume; one may be frozen, one may see another ball."""
    cameras = ring(4, (96, 72))
    path = write_project(folder, cameras, frames=30)
    turn = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    way = np.stack([0.3 * np.cos(turn), 0.3 * np.sin(turn), 0 * turn], -1)
    rows, columns = np.mgrid[:72, :96]
    for index, name in enumerate(cameras.names):
        points = way if index != split else way * np.array([-1, -1, 0])
        centers, depth = cameras.project(torch.from_numpy(points))
        texture = np.random.default_rng(index).integers(60, 110, (72, 96, 1)).repeat(3, -1).astype(np.uint8)
        frames = np.repeat(texture[None], 30, axis=0)
        for moment in range(30):
            shown = 0 if index == frozen else moment
            x, y = centers[index, shown].tolist()
            radius = 0.12 * 96 / depth[index, shown].item()
            frames[moment][np.hypot(columns - x, rows - y) < radius] = 220, 180, 40
        write_video(folder / f"{name}.mkv", frames)
    return path


def test_check_measures_good_masks(tmp_path: Path) -> None:
    project = load_project(ball_project(tmp_path))
    assert check_project(project, gap=1, voxels=8).foreground == []
    report = check_project(project, gap=1, voxels=8, height=72, width=96, out=tmp_path / "out", foreground=True)
    assert [row.camera for row in report.foreground] == list(project.cameras.names)
    for row in report.foreground:
        assert 0.005 < row.share < 0.06
        assert row.empty == 0
        assert row.steady > 0.3
        assert row.agreeing > 0.95
        picture = np.array(Image.open(tmp_path / "out" / f"foreground_{row.camera}.png"))
        assert (picture == [255, 0, 255]).all(-1).any()
        assert picture.shape[1] / picture.shape[0] == pytest.approx(2 * 96 / 72)
    assert report.warnings == []
    assert any("foreground" in line and "agrees" in line for line in report.lines())


def test_check_says_where_masks_fail(tmp_path: Path) -> None:
    frozen = check_project(
        load_project(ball_project(tmp_path / "a", frozen=1)), gap=1, voxels=8, height=72, width=96, foreground=True
    )
    (line,) = [warning for warning in frozen.warnings if "is empty" in warning]
    assert line.startswith("camera 'cam1': foreground is empty in 100% of the moments; give the recording 'masks'")
    other = check_project(
        load_project(ball_project(tmp_path / "b", split=2)), gap=1, voxels=8, height=72, width=96, foreground=True
    )
    assert any("camera 'cam2': foreground does not agree with the other cameras" in text for text in other.warnings)


def test_check_looks_at_the_projects_own_masks(tmp_path: Path) -> None:
    path = with_masks(tmp_path)
    for index in range(3):
        write_video(tmp_path / f"mask{index}.mkv", np.full((12, 48, 64, 3), 255, dtype=np.uint8))
    report = check_project(load_project(path), gap=1, voxels=8, height=24, width=32, foreground=True)
    assert sum("covers 100% of the picture" in warning for warning in report.warnings) == 3


def test_each_failure_names_the_camera_and_the_mend() -> None:
    good = ForegroundCheck("cam0", 0.05, 0.0, 0.9, 0.98)
    assert good.failures() == []
    for change, text in (({"share": 0.7}, "covers 70%"), ({"empty": 0.3}, "is empty in 30%"), ({"steady": 0.2}, "20%")):
        (line,) = dataclasses.replace(good, **change).failures()
        assert line.startswith("camera 'cam0': foreground ")
        assert text in line
        assert line.endswith("or set data.foreground to false")
