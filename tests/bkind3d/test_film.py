"""The videos with the keypoints over them: where, how opaque, how fast, and what is refused."""

import av
import numpy as np
import pytest
import yaml
from command_line import refused
from PIL import Image
from run_folder import FRAMES, HEIGHT, JOINTS, WIDTH, caterpillar, make_scene, write_filmed_run

from bkind3d.cli import main
from bkind3d.errors import InputError
from bkind3d.pictures import palette
from bkind3d.poses import Poses
from bkind3d.report.clip import project_keypoints
from bkind3d.report.film import FAINTEST, draw_keypoints, film, opacities


@pytest.fixture(scope="module")
def scene():
    return make_scene()


@pytest.fixture(scope="module")
def run(tmp_path_factory, scene):
    """Camera 1 began three frames before the others."""
    folder = tmp_path_factory.mktemp("filmed")
    run = write_filmed_run(folder, scene)
    project = yaml.safe_load((folder / "project.yaml").read_text())
    project["recordings"][0] |= {"offsets": {"cam1": 3}, "frames": 17}
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    poses = Poses.load(run / "poses" / "walk.nc")
    Poses(poses.positions[:17], poses.confidence[:17], 30.0, "m", "walk").save(run / "poses" / "walk.nc")
    return run


def decoded(path):
    """Codec, pixel format, rate and pictures (F, h, w, 3) of a film."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate), pictures


def test_a_grid_at_full_resolution(run, tmp_path, scene, monkeypatch):
    monkeypatch.setattr("bkind3d.report.film.draw_keypoints", lambda *_: None)  # the frames alone are compared
    path = film(run, out=tmp_path / "a.mp4", progress=False)
    codec, pixels, rate, pictures = decoded(path)
    assert (codec, pixels, rate) == ("h264", "yuv420p", 30.0)
    assert pictures.shape == (17, 2 * HEIGHT, 2 * WIDTH, 3)
    shown = pictures[9, 20:HEIGHT, WIDTH:].astype(int)  # below the name of camera 1
    distance = [np.abs(shown - scene.frames["test"][f, 1, 20:]).mean() for f in range(FRAMES)]
    assert int(np.argmin(distance)) == 12  # the frame of its own video


def test_one_camera_in_slow_motion(run, tmp_path, scene):
    """Larger than the video, so that every keypoint has pixels of its own."""
    options = {"cameras": ["cam2"], "start": 0.1, "seconds": 0.2, "speed": 0.25, "size": 8 * WIDTH}
    _, _, rate, pictures = decoded(film(run, out=tmp_path / "a.mp4", progress=False, **options))
    assert rate == 7.5
    assert pictures.shape == (6, 8 * HEIGHT, 8 * WIDTH, 3)
    at = (project_keypoints(scene.cameras["test"], caterpillar()[[5]])[0, 2] + 0.5) * 8 - 0.5
    colours = palette(JOINTS).astype(int)
    near = [np.abs(pictures[2, round(y), round(x)].astype(int) - colours[j]).max() for j, (x, y) in enumerate(at)]
    assert np.median(near) < 40, near


def test_too_fast_for_a_screen_leaves_moments_out(run, tmp_path):
    _, _, rate, pictures = decoded(film(run, cameras=["cam0"], speed=4, out=tmp_path / "a.mp4", progress=False))
    assert (rate, len(pictures)) == (60.0, 9)


def test_confidence_is_opacity():
    found = opacities(np.array([[0.4, 0.2, 0.0, np.nan]] * 30))
    np.testing.assert_allclose(found[0], [1, (1 + FAINTEST) / 2, FAINTEST, FAINTEST])
    drawn = []
    for opacity in (1.0, 0.3):
        picture = Image.new("RGB", (60, 720), (120, 120, 120))
        pixels = np.array([[15.0, 20.0], [45.0, 20.0], [np.nan, 3.0]])
        edges, colours = np.array([[0, 1], [1, 2]]), np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
        draw_keypoints(picture, pixels, edges, colours, np.full(3, opacity))
        drawn.append(np.asarray(picture)[:40].astype(int) - 120)
    np.testing.assert_array_equal(drawn[0][20, 15], [135, -120, -120])
    assert drawn[0][20, 25, 0] > 40  # each half of the edge in the colour of its end
    assert drawn[0][20, 35, 1] > 40
    np.testing.assert_allclose(drawn[1][20, 15], 0.3 * drawn[0][20, 15], atol=3)
    assert (drawn[0][:, :8] == 0).all()
    assert len({tuple(value) for value in drawn[0].reshape(-1, 3).tolist()}) > 20  # smooth


def test_nothing_to_draw_leaves_the_picture():
    picture = Image.new("RGB", (30, 20), (9, 9, 9))
    draw_keypoints(
        picture, np.array([[np.nan, np.nan], [500.0, 500.0]]), np.array([[0, 1]]), palette(2), np.ones(2)
    )  # fmt: skip
    assert (np.asarray(picture) == 9).all()


def test_the_command(run, capsys):
    main(["render", str(run), "--overlay", "--seconds", "0.1", "--cameras", "[cam0]"])
    assert capsys.readouterr().out.startswith(f"{run / 'overlay.mp4'}  (")
    assert decoded(run / "overlay.mp4")[3].shape == (3, HEIGHT, WIDTH, 3)
    assert "overlay.mp4: exists; give --force" in refused(["render", str(run), "--overlay"], capsys)
    assert "fps: has no meaning with --overlay" in refused(["render", str(run), "--overlay", "--fps", "3"], capsys)
    assert "speed: has no meaning without --overlay" in refused(["render", str(run), "--speed", "0.5"], capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ["cam9"]}, "there is no camera 'cam9'; there are cam0"),
        ({"recording": "run"}, "'run' has no poses; there are those of walk"),
        ({"start": 9.0}, "no poses from 9 s on; the recording has 0.53 s"),
        ({"speed": 0.0}, "speed: expected more than 0"),
        ({"size": 8}, "size: expected more than 63"),
        ({"seconds": float("nan")}, "seconds: expected more than 0"),
    ],
)
def test_refusals(run, tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        film(run, out=tmp_path / "a.mp4", progress=False, **options)
    assert message in str(caught.value)
    with pytest.raises(InputError, match=r"must end in \.mp4"):
        film(run, out=tmp_path / "a.gif", progress=False)
    assert not list(tmp_path.iterdir())
