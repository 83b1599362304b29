"""The moving picture of a run: what it shows, how large it is, and what it refuses."""

import io
import os

import av
import numpy as np
import pytest
from PIL import Image
from run_folder import CENTER, FRAMES, JOINTS, VIEWS, caterpillar, make_scene, write_filmed_run, write_run

from bkind3d import pictures
from bkind3d.cli import main
from bkind3d.errors import InputError
from bkind3d.poses import Poses
from bkind3d.report import render as module
from bkind3d.report.inputs import choose_recording, read_run
from bkind3d.report.render import fit, hold, make_clip, pick_moments, render, tile_size, upright, view_boxes

SMALL = {"size": 240, "seconds": 0.5, "fps": 10.0, "progress": False}


@pytest.fixture(scope="module")
def scene():
    return make_scene()


@pytest.fixture
def run(tmp_path, scene, monkeypatch):
    monkeypatch.setattr(module, "run_inputs", lambda run: scene)
    return write_run(tmp_path / "run", scene, ["poses", "skeleton"])


@pytest.fixture
def clip(run, scene):
    files = read_run(run)
    return make_clip(files, scene, choose_recording(files, scene), np.arange(0, 30, 6), 10.0, 360)


def frames_of(path):
    """Frames (F, h, w, 3) and durations in ms of a GIF or an APNG."""
    with Image.open(path) as image:
        frames, durations = [], []
        for f in range(image.n_frames):
            image.seek(f)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(frames), durations


def test_a_gif_has_every_frame_in_real_time_and_within_the_limit(run):
    path = render(run, size=360, seconds=1.0, fps=15.0, progress=False)
    frames, durations = frames_of(path)
    assert path == run / "render.gif"
    assert len(frames) == 15
    assert sum(durations) == 1000
    assert 340 < frames.shape[2] <= 360
    assert path.stat().st_size < 1_500_000
    assert os.listdir(run).count("render.gif") == 1
    assert not list(run.glob(".*"))


def test_keypoints_have_their_own_colours_in_a_gif(clip, tmp_path):
    """Few colours are left for the videos, none is taken from the keypoints."""
    (tmp_path / "a.gif").write_bytes(fit(clip, ".gif", 10**7))
    frames, _ = frames_of(tmp_path / "a.gif")
    colours = pictures.palette(JOINTS)
    x, y = clip.pixels[3, 0, -1].round().astype(int)  # the last one is drawn over all others
    np.testing.assert_array_equal(frames[3, y, x], colours[-1])
    stage = frames[3][:, -clip.height :].reshape(-1, 3)
    seen = [bool((stage == colour).all(axis=1).any()) for colour in colours]
    assert sum(seen) >= JOINTS - 2, seen  # one may hide another
    assert (stage == 255).all(axis=1).mean() > 0.5


def test_too_large_a_file_is_drawn_with_fewer_colours_then_smaller(clip):
    good = fit(clip, ".gif", 10**7)
    fewer = fit(clip, ".gif", len(good) - 1)
    smaller = fit(clip, ".gif", len(good) // 3)
    assert len(fewer) < len(good)
    assert len(smaller) <= len(good) // 3
    sizes = [Image.open(io.BytesIO(content)).size for content in (good, fewer, smaller)]
    assert sizes[0] == sizes[1]
    assert sizes[2][0] < sizes[1][0]
    assert Image.open(io.BytesIO(fit(clip, ".gif", 1))).n_frames == 5  # nothing is refused


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_other_formats(run, tmp_path, suffix):
    path = render(run, out=tmp_path / f"film{suffix}", **SMALL)
    assert not (run / "render.gif").exists()
    if suffix == ".png":
        frames, durations = frames_of(path)
        assert (len(frames), durations) == (5, [100.0] * 5)
    else:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
            assert len(list(container.decode(stream))) == 5


def test_an_existing_file_is_kept_unless_forced(run):
    (run / "render.gif").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"render\.gif: exists; give --force"):
        render(run, **SMALL)
    assert (run / "render.gif").read_bytes() == b"precious"
    assert render(run, force=True, **SMALL).read_bytes()[:3] == b"GIF"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recording": "walk"}, r"recording: 'walk' has no poses in .*poses; it has test, train"),
        ({"start": 2.0}, r"start: 2 s is not within the recording, which has poses of 1\.47 s"),
        ({"start": -1.0}, "start: -1 s is not within"),
        ({"seconds": 0.0}, "seconds: expected more than 0, got 0"),
        ({"fps": float("nan")}, "fps: expected more than 0, got nan"),
        ({"size": 20}, "size: expected more than 63, got 20"),
        ({"max_bytes": 0}, "max_bytes: expected more than 0"),
        ({"out": "film.webp"}, r"film\.webp: the name must end in \.gif, \.png, \.mp4"),
        ({"out": "nowhere/film.gif"}, r"film\.gif: there is no folder .*nowhere; make it first"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, changes, message):
    if "out" in changes:
        changes = {"out": tmp_path / changes["out"]}
    with pytest.raises(InputError, match=message) as caught:
        render(run, **SMALL | changes)
    assert "\n" not in str(caught.value)
    assert not (run / "render.gif").exists()


def test_runs_without_usable_poses_are_refused(tmp_path, scene, run):
    with pytest.raises(InputError, match="not a run folder"):
        render(tmp_path, **SMALL)
    with pytest.raises(InputError, match=r"no poses; find them with `bkind3d predict"):
        render(write_run(tmp_path / "empty", scene, []), **SMALL)
    lost = Poses(np.full((3, 2, 3), np.nan), np.zeros((3, 2)), 30, "m", "test")
    lost.save(run / "poses" / "test.nc")
    with pytest.raises(InputError, match="recording 'test': no keypoint has a position in all of its poses"):
        render(run, **SMALL)
    Poses(np.zeros((1, 2, 3)), np.zeros((1, 2)), 30, "m", "test", frames=[FRAMES]).save(run / "poses" / "test.nc")
    with pytest.raises(InputError, match="not of the project's frames"):
        render(run, recording="test", **SMALL)


def test_moments_are_those_nearest_in_time():
    time = 4.0 + np.arange(90) / 30
    assert pick_moments(time, 0, 1, 15).tolist() == list(range(0, 30, 2))
    assert pick_moments(time, 1.0, 0.2, 15).tolist() == [30, 32, 34]
    assert pick_moments(time, 2.5, 4, 10).tolist() == [75, 78, 81, 84, 87]  # the recording ends
    assert pick_moments(time[::5], 0, 0.5, 15).tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert pick_moments(time[:1], 0, 4, 15).tolist() == [0]


def test_pixels_hold_until_they_really_change():
    frames = np.array([100, 108, 130, 121, 100], np.uint8)[:, None, None] * np.ones((1, 1, 3), np.uint8)
    assert hold(frames, 10)[:, 0, 0].tolist() == [100, 100, 130, 130, 100]
    frames[1, 0, 2] = 150  # one channel is enough
    assert hold(frames, 10)[1, 0].tolist() == [108, 108, 150]


def test_views_are_cut_round_the_keypoints():
    pixels = np.full((4, 3, 2, 2), np.nan)
    pixels[:, 0] = [[[50, 20], [60, 30]]] * 3 + [[[70, 40], [500, -9]]]  # what is outside does not count
    pixels[:, 1, 0] = (1, 1)
    boxes = view_boxes(pixels, 96, 72)
    x, y, width, height = boxes[0]
    assert x < 50
    assert x + width > 70
    assert y < 20
    assert y + height > 40
    assert width / height == pytest.approx(96 / 72, rel=0.05)
    assert width < 60
    assert boxes[1].tolist() == [0, 0, 24, 18]
    assert boxes[2].tolist() == [0, 0, 96, 72]


def test_keypoints_lie_on_the_parts_that_were_filmed(clip):
    """The frames of the clip are cut and resized with the cameras that project the keypoints."""
    assert clip.frames.shape[:2] == (5, VIEWS)
    pixels = clip.pixels[:, :, [2, 4, 6]].round().astype(int)
    f, m = np.ogrid[:5, :VIEWS]
    at_keypoints = clip.frames[f[..., None], m[..., None], pixels[..., 1], pixels[..., 0]]
    assert at_keypoints.mean() < 70
    assert np.median(clip.frames) > 120
    half = clip.shrunk(0.5)
    pixels = half.pixels[:, :, [2, 4, 6]].round().astype(int)
    assert half.frames[f[..., None], m[..., None], pixels[..., 1], pixels[..., 0]].mean() < 80


@pytest.mark.parametrize("up", [(0.0, 0, 1), (0.0, 0, -2), (0.0, -1, 0), (1.0, 2, 3)])
def test_up_is_turned_to_z(up):
    rotation = upright(np.array(up))
    np.testing.assert_allclose(rotation @ up, [0, 0, np.linalg.norm(up)], atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)


@pytest.mark.parametrize(("views", "columns", "rows"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 2, 2), (9, 2, 2)])
def test_the_picture_is_as_wide_as_asked(views, columns, rows):
    for picture in ((96, 96), (1280, 720), (60, 80)):
        width, height = tile_size(832, views, *picture)
        total = columns * width + rows * height + columns * pictures.GAP + (rows - 1) * pictures.GAP
        assert 826 <= total <= 832
        assert width / height == pytest.approx(picture[0] / picture[1], rel=0.02)


def test_the_floor_is_below_the_keypoints_and_lone_ones_do_not_count(run, scene):
    files = read_run(run)
    shown = choose_recording(files, scene)
    shown.poses.positions[:, 8] = CENTER + np.array([0, 0, 50])  # dead, and far away
    shown.poses.positions[3, 9] = np.nan
    clip = make_clip(files, scene, shown, np.arange(5), 10.0, 240)
    assert clip.steady.tolist() == [True] * 8 + [False] * 2
    stage = module.Stage(clip, 200)
    assert stage.floor <= np.quantile(caterpillar()[:5, :8, 2], 0.05) + 0.02
    assert stage.reach < 1.0
    assert stage.draw(3).shape == (200, 200, 3)
    assert (stage.draw(0) != stage.draw(4)).any()


def test_from_the_command_line_on_real_videos(tmp_path, scene, capsys):
    run = write_filmed_run(tmp_path, scene)
    arguments = ["render", str(run), "--size", "240", "--seconds", "0.4", "--fps", "10"]
    main(arguments)
    assert "render.gif  (0.0" in capsys.readouterr().out
    frames, _ = frames_of(run / "render.gif")
    assert len(frames) == 4
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "render.gif: exists; give --force to replace it" in capsys.readouterr().err
    main([*arguments, "--force", "--out", str(tmp_path / "film.mp4")])
    assert (tmp_path / "film.mp4").stat().st_size > 1000
