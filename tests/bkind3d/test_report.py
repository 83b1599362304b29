import dataclasses
import html
import io
import json
import os
import re
import time
from pathlib import Path

import av
import chromium
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bkind3d.cameras import Cameras, save_toml
from bkind3d.config import Config, DataConfig, save_config
from bkind3d.errors import InputError
from bkind3d.health import keypoint_health
from bkind3d.poses import Poses
from bkind3d.probe import compare_blocked
from bkind3d.regressors import ProbeOptions
from bkind3d.report import build_report, clip, page, pictures
from bkind3d.report.inputs import Scene, read_run, run_inputs
from bkind3d.skeleton_summary import summarise_skeleton

VIEWS, JOINTS, FRAMES, HEIGHT, WIDTH = 4, 10, 45, 72, 96
CENTER, SIDES = np.array([1.0, 2.0, 0.3]), np.array([1.2, 1.2, 0.6])
SECTIONS = ["results", "actions", "clip", "scene", "losses", "samples", "edges", "health", "configuration", "versions"]


# --- a run folder, made by hand -----------------------------------------------------------------------------------


def ring_of_cameras():
    """Four pinholes around the volume, looking at its centre."""
    rotations, translations = [], []
    for angle in np.arange(VIEWS) * 2 * np.pi / VIEWS + 0.4:
        position = CENTER + np.array([2.2 * np.cos(angle), 2.2 * np.sin(angle), 1.2])
        z = (CENTER - position) / np.linalg.norm(CENTER - position)
        x = np.cross(z, [0, 0, 1])
        x /= np.linalg.norm(x)
        rotation = np.stack([x, np.cross(z, x), z])
        rotations.append(rotation)
        translations.append(-rotation @ position)
    intrinsics = np.array([[130.0, 0, (WIDTH - 1) / 2], [0, 130.0, (HEIGHT - 1) / 2], [0, 0, 1]])
    return Cameras(
        names=tuple(f"cam{m}" for m in range(VIEWS)),
        intrinsics=torch.tensor(np.repeat(intrinsics[None], VIEWS, axis=0)),
        distortion=torch.zeros(VIEWS, 5),
        rotation=torch.tensor(np.stack(rotations)),
        translation=torch.tensor(np.stack(translations)),
        image_size=torch.tensor([[WIDTH, HEIGHT]]).expand(VIEWS, 2),
        units="m",
    )


def caterpillar():
    """(F, J, 3): a chain that walks in a circle and wriggles."""
    phase = np.linspace(0, 2 * np.pi, FRAMES)[:, None] + 0.18 * np.arange(JOINTS)
    wave = 0.06 * np.sin(5 * phase)
    return CENTER + np.stack([0.35 * np.cos(phase), 0.35 * np.sin(phase), wave - 0.1], axis=2)


def filmed(cameras, points):
    """(F, M, H, W, 3) uint8: grey ground, a dark blob on every point."""
    pixels = clip.project_keypoints(cameras, points)  # (F, M, J, 2)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    near = np.zeros((*pixels.shape[:2], HEIGHT, WIDTH))
    for j in range(points.shape[1]):
        squared = (x - pixels[:, :, j, 0, None, None]) ** 2 + (y - pixels[:, :, j, 1, None, None]) ** 2
        near = np.maximum(near, np.exp(-squared / 18))
    ground = 150 + 40 * ((x // 12 + y // 12) % 2)
    return np.repeat((ground * (1 - 0.8 * near)).astype(np.uint8)[..., None], 3, axis=4)


@pytest.fixture(scope="module")
def scene():
    cameras = ring_of_cameras()
    frames = filmed(cameras, caterpillar())
    names = ("train", "test")
    return Scene(
        "demo", "m", np.array([0.0, 0, 1]), CENTER, SIDES,
        cameras=dict.fromkeys(names, cameras),
        frames=dict.fromkeys(names, frames),
        clocks=dict.fromkeys(names, np.arange(FRAMES)),
        splits={name: name for name in names},
    )  # fmt: skip


def write_run(run, scene, parts=None):
    """Everything that training, prediction and evaluation write, or only the named parts."""
    rng = np.random.default_rng(0)
    parts = (
        ["metrics", "health", "skeleton", "poses", "samples", "evaluation", "actions", "env"]
        if parts is None
        else parts
    )
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        "project: demo/project.yaml\nmodel:\n  keypoints: 10\n# <script>alert(1)</script>\n"
    )
    points = caterpillar() + rng.normal(0, 0.004, (FRAMES, JOINTS, 3))
    points[:, 8], points[:, 9] = CENTER, points[:, 1] + 0.003  # a dead one, and a twin
    confidence = rng.uniform(0.1, 0.4, (FRAMES, JOINTS))
    edges = [[j, j + 1, 1.5 - 0.1 * j] for j in range(7)]
    if "env" in parts:
        env = {
            "python": "3.11.2",
            "device": "cpu",
            "versions": {"torch": "2.13.0"},
            "backends": {"unproject": "reference"},
        }
        (run / "env.json").write_text(json.dumps(env))
    if "metrics" in parts:
        write_metrics(run / "metrics.csv", rng)
    if "health" in parts:
        records = []
        for step in range(100, 2001, 100):
            moved = CENTER + (points - CENTER) * min(1, step / 800)
            health = keypoint_health(moved, confidence * min(1, step / 1000), CENTER, SIDES)
            records.append(json.dumps({"step": step, **health.to_dict()}))
        (run / "health.jsonl").write_text("\n".join(records) + "\n")
    if "skeleton" in parts:
        pairs = [[i, j] for i in range(JOINTS) for j in range(i + 1, JOINTS)]
        drawn = {(i, j): w for i, j, w in edges}
        rows = [[i, j, drawn.get((i, j), float(rng.uniform(0, 0.2)))] for i, j in pairs]
        names = [f"kp{j:02d}" for j in range(JOINTS)]
        skeleton = {"keypoints": names, "edges": edges, "threshold": 0.3, "all_weights": rows}
        (run / "skeleton.json").write_text(json.dumps(skeleton))
    if "poses" in parts:
        (run / "poses").mkdir()
        for name in ("train", "test"):
            Poses(points, confidence, 30.0, "m", name).save(run / "poses" / f"{name}.nc")
    if "samples" in parts:
        (run / "samples").mkdir()
        for step in (100, 200, 300):
            write_sample(run / "samples" / f"step_{step:06d}.png", scene, points)
    if "evaluation" in parts:
        joints = np.concatenate([caterpillar(), caterpillar()[:, ::2] + 0.02], axis=1)
        untrained = CENTER + rng.normal(0, 0.1, (FRAMES, JOINTS, 3))
        options = ProbeOptions(ridge="auto")
        document = compare_blocked({"BKinD-3D": points, "untrained network": untrained}, joints, 5, options, units="m")
        document["skeleton"] = summarise_skeleton(points, np.array([[j, j + 1] for j in range(7)]))
        (run / "evaluation.json").write_text(json.dumps(document))
    if "actions" in parts:
        tracked = {name: {"top1": 0.9, "topk": 1.0, "balanced": 0.857} for name in ("BKinD-3D", "true joints")}
        spread = {"sd": {"top1": 0.012, "topk": 0.0, "balanced": 0.02}, "recall": [0.951, 0.763]}
        document = {
            "protocol": "1D convolutional network over 31 frames",
            "options": {"window": 31, "top": 2, "seeds": 3},
            "behaviours": ["walk", "groom"],
            "windows": {"tested": [120, 17]},
            "rows": [{"name": name} | values | spread for name, values in tracked.items()],
            "paper": "Another table.",
        }
        (run / "actions.json").write_text(json.dumps(document))
    return run


def write_metrics(path, rng):
    steps = np.arange(10, 2001, 10)
    columns = {
        "step": steps,
        "epoch": steps / 200,
        "loss": 0.1 + np.exp(-steps / 400) * rng.uniform(0.9, 1.1, len(steps)),
        "reconstruction": 0.08 + np.exp(-steps / 400) * rng.uniform(0.9, 1.1, len(steps)),
        "length": 0.05 * (1 - np.exp(-steps / 300)),
        "separation": 0.04 * np.exp(-steps / 900),
        "active_edges": 7 + 38 * np.exp(-steps / 500),
        "lr": np.full(len(steps), 1e-3),
        "grad_norm": rng.uniform(0.2, 2, len(steps)),
        "seconds": steps * 0.17,
    }
    rows = [",".join(columns)] + [
        ",".join(f"{column[k]:.6g}" for column in columns.values()) for k in range(len(steps))
    ]
    path.write_text("\n".join(rows) + "\n")


def write_sample(path, scene, points):
    images = scene.frames["train"][12]
    target = np.abs(scene.frames["train"][18].astype(float) - images).mean(axis=3)  # (M, H, W)
    pixels = clip.project_keypoints(scene.cameras["test"], points[12:13])[0]
    edges = np.array([[j, j + 1] for j in range(7)])
    pictures.sample_sheet(path, images, pixels, edges, target, 0.7 * target + 5, names=scene.cameras["test"].names)


@pytest.fixture
def with_frames(monkeypatch, scene):
    monkeypatch.setattr(page, "run_inputs", lambda run: scene)


@pytest.fixture(scope="module")
def full_report(tmp_path_factory, scene):
    run = write_run(tmp_path_factory.mktemp("runs") / "demo", scene)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "run_inputs", lambda run: scene)
        return build_report(run)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_palette_is_fixed_and_distinct():
    colours = pictures.palette(30).astype(int)
    np.testing.assert_array_equal(colours[:12], pictures.palette(12))
    distance = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(30, dtype=int)
    assert distance.min() > 50
    assert pictures.palette(0).shape == (0, 3)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_overlay_puts_a_keypoint_on_its_pixel(scale):
    images = np.full((2, 40, 60, 3), 128, np.uint8)
    keypoints = np.full((2, 3, 2), np.nan)
    keypoints[1, 2] = (45, 12)
    picture = pictures.overlay(images, keypoints, np.zeros((0, 2)), scale=scale)
    assert picture.shape == (40 * scale, 2 * 60 * scale + pictures.GAP, 3)
    assert picture.dtype == np.uint8
    assert (picture[:, : 60 * scale] == 128).all()  # nothing to draw in the first view
    rows, columns = np.nonzero((picture[:, 60 * scale + pictures.GAP :] != 128).any(axis=2))
    assert rows.mean() == pytest.approx((12 + 0.5) * scale - 0.5, abs=0.3)
    assert columns.mean() == pytest.approx((45 + 0.5) * scale - 0.5, abs=0.3)
    at = round((12.5) * scale - 0.5), 60 * scale + pictures.GAP + round(45.5 * scale - 0.5)
    np.testing.assert_array_equal(picture[at], pictures.palette(3)[2])


def test_overlay_draws_an_edge_between_its_keypoints_only():
    images = np.full((1, 50, 50, 3), 100, np.uint8)
    keypoints = np.array([[[5, 25], [45, 25], [25, 5]]], float)
    with_edge = pictures.overlay(images, keypoints, np.array([[0, 1]]))
    without = pictures.overlay(images, keypoints, np.zeros((0, 2)))
    changed = np.argwhere((with_edge != without).any(axis=2))
    assert with_edge[50:52, 50].max() == 255
    assert np.abs(changed[:, 0] - 50.5).max() < 5
    keypoints[0, 1] = np.nan
    lone = pictures.overlay(images, keypoints, np.array([[0, 1]]))
    assert (lone[50:52, 50] == 100).all()


def test_overlay_survives_keypoints_far_away():
    images = np.zeros((1, 20, 20, 3), np.uint8)
    keypoints = np.array([[[1e9, -1e12], [5, 5]]])
    assert pictures.overlay(images, keypoints, np.array([[0, 1]])).shape == (40, 40, 3)


def test_low_confidence_makes_smaller_dots():
    images = np.zeros((1, 60, 60, 3), np.uint8)
    keypoints = np.array([[[15, 30], [45, 30]]], float)
    picture = pictures.overlay(images, keypoints, np.zeros((0, 2)), scale=4, confidence=np.array([0.4, 0.02]))
    coloured = picture.any(axis=2)
    assert coloured[:, :120].sum() > 2 * coloured[:, 120:].sum() > 0


def test_overlay_in_columns():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 10, 12, 3), 40, np.uint8)
    picture = pictures.overlay(images, np.zeros((5, 0, 2)), np.zeros((0, 2)), scale=1, columns=3)
    assert picture.shape == (24, 44, 3)
    assert picture[15, 20].tolist() == [160, 160, 160]  # the fifth view: second row, second column
    assert picture[20, 40].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("images", "keypoints", "edges", "message"),
    [
        (np.zeros((1, 8, 8, 3)), np.zeros((1, 2, 2)), [], "images"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 2, 2)), [], "images"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 2, 2)), [], "keypoints"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 2, 2)), [[0, 2]], "edges"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 2, 2)), [[-1, 0]], "edges"),
    ],
)
def test_overlay_bad_input(images, keypoints, edges, message):
    with pytest.raises(InputError, match=f"^{message}: expected"):
        pictures.overlay(images, keypoints, np.array(edges))


def test_sample_sheet_shows_target_and_reconstruction_on_one_range(tmp_path):
    images = np.full((2, 64, 64, 3), 30, np.uint8)
    target = np.zeros((2, 64, 64))
    target[:, 32:] = 2.0
    for maps in (target, np.repeat(target[:, None], 3, axis=1)):
        path = tmp_path / "sheet.png"
        pictures.sample_sheet(path, images, np.full((2, 4, 2), 20.0), np.zeros((0, 2)), maps, 0.5 * maps)
        sheet = np.asarray(Image.open(path))
        assert sheet.shape == (4 * (256 + 22), 2 * 256 + 4, 3)
        bands = [sheet[22 + k * 278 : 278 + k * 278] for k in range(4)]
        assert bands[0][100, 300].tolist() == [30, 30, 30]
        assert (bands[1] != bands[0]).any()
        assert [bands[2][10, 10, 0], bands[2][200, 10, 0]] == [0, 255]
        assert [bands[3][10, 10, 0], bands[3][200, 10, 0]] == [0, 127]
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_sample_sheet_bad_input(tmp_path):
    images, keypoints, edges = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 2, 2)), np.zeros((0, 2))
    with pytest.raises(InputError, match="target and reconstruction"):
        pictures.sample_sheet(tmp_path / "a.png", images, keypoints, edges, np.zeros((2, 8, 8)), np.zeros((2, 8, 9)))
    maps = np.zeros((2, 8, 8))
    with pytest.raises(InputError, match="cannot write the picture"):
        pictures.sample_sheet(tmp_path / "none" / "a.png", images, keypoints, edges, maps, maps)


# --- the clip -----------------------------------------------------------------------------------------------------


def test_projected_keypoints_lie_on_the_dark_blobs(scene):
    """The frames were drawn by the same projection; a mistake in axes or order would still leave the blobs."""
    pixels = clip.project_keypoints(scene.cameras["test"], caterpillar())
    assert pixels.shape == (FRAMES, VIEWS, JOINTS, 2)
    f, m, j = 7, 2, 4
    x = scene.cameras["test"].rotation[m] @ torch.tensor(caterpillar()[f, j]) + scene.cameras["test"].translation[m]
    expected = (scene.cameras["test"].intrinsics[m] @ (x / x[2]))[:2].numpy()
    np.testing.assert_allclose(pixels[f, m, j], expected, atol=1e-9)


def test_keypoints_behind_a_camera_are_not_drawn(scene):
    behind = scene.cameras["test"].centers[0].numpy() * 2 - CENTER  # beyond camera 0, seen from the volume
    pixels = clip.project_keypoints(scene.cameras["test"], np.stack([[behind, CENTER, np.full(3, np.nan)]]))
    assert np.isnan(pixels[0, 0, 0]).all()
    assert np.isfinite(pixels[0, :, 1]).all()
    assert np.isnan(pixels[0, :, 2]).all()


@pytest.mark.parametrize(
    ("count", "spacing", "fps", "rows", "rate"),
    [
        (100, 1, 30.0, 100, 30.0),
        (400, 1, 30.0, 240, 30.0),  # eight seconds
        (100, 1, 60.0, 50, 30.0),  # every second frame
        (100, 1, 50.0, 50, 25.0),
        (100, 4, 100.0, 100, 25.0),  # every fourth frame was predicted
        (1, 1, 240.0, 1, 30.0),
    ],
)
def test_clip_runs_in_real_time(count, spacing, fps, rows, rate):
    picked, shown = clip.clip_rows(np.arange(count) * spacing, fps)
    assert (len(picked), shown) == (rows, rate)


def test_encoded_clip_decodes_to_the_same_pictures():
    sent = [np.full((46, 62, 3), (200, 40 + 30 * k, 60), np.uint8) for k in range(5)]
    with av.open(io.BytesIO(clip.encode(sent, 25.0))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 25)
        received = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(received) == 5
    for before, after in zip(sent, received):
        assert np.abs(before.astype(int) - after).mean() < 6


def test_drawn_moments_have_even_sides(scene):
    images = np.zeros((3, 33, 35, 3), np.uint8)
    picture = clip.draw(images, np.zeros((3, 2, 2)), np.zeros((0, 2)), ["a", "b", "c"])
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0


# --- the page -----------------------------------------------------------------------------------------------------


OUTSIDE = re.compile(
    r"""(?:src|srcset|href|action|poster|data)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//|@import"""
)


def test_report_is_small_and_offline(full_report):
    text = full_report.read_text(encoding="utf-8")
    plain = html.unescape(text)  # the 3D view is escaped into an attribute
    assert full_report.name == "report.html"
    assert full_report.stat().st_size < 15e6
    assert "__VISER_EMBED_DATA__" in plain
    assert OUTSIDE.findall(text) == OUTSIDE.findall(plain) == []
    assert "default-src 'none'" in text
    for bad in ('<img src="https://x.org/a.png">', "<a href=//x.org>", "background: url(http://x.org)", "@import 'a'"):
        assert OUTSIDE.search(bad)


def test_report_names_numbers_and_units(full_report):
    text = full_report.read_text(encoding="utf-8")
    document = json.loads((full_report.parent / "evaluation.json").read_text())
    for row in document["rows"]:
        assert f"{row['name']}</td>" in text
        assert f"{row['mpjpe']:.4f}" in text
    for expected in ("MPJPE, absolute (m)", "1.2 × 1.2 × 0.6 m", "ridge auto; ridge chosen: BKinD-3D 1e-0", "Human3.6M",
                     "105 mm", "7 of 45", "Over 45 frames their lengths vary by", "5 min 40 s",
                     "dead, centre", "90 % ± 1.2", "95 %", "groom (17)", "kp09, 0.004", "step 300",
                     "2.13.0"):  # fmt: skip
        assert expected in text, expected
    assert text.count('class="missing"') == 0


def test_text_of_the_run_is_escaped(full_report):
    text = full_report.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_unseen_motion_is_shown_where_there_is_any(full_report, scene, tmp_path):
    assert "Recording test (split: test)" in full_report.read_text(encoding="utf-8")
    run = write_run(tmp_path / "run", scene, ["poses"])
    assert page.choose_recording(read_run(run), scene).poses.recording == "test"
    (run / "poses" / "test.nc").unlink()
    assert page.choose_recording(read_run(run), scene).poses.recording == "train"


def test_missing_parts_are_said_plainly(tmp_path, scene, with_frames):
    run = write_run(tmp_path / "run", scene, [])
    text = build_report(run).read_text(encoding="utf-8")
    assert text.count('class="missing"') == len(SECTIONS) - 2  # the configuration is always there, behaviour if known
    assert "Behaviour" not in text
    assert "Not evaluated yet" in text
    assert "4, 96 × 72 px each" in text


def test_without_frames_the_page_says_why_and_shows_the_rest(tmp_path, scene, monkeypatch):
    def gone(run):
        raise InputError("demo/cam0.mp4: no such video")

    monkeypatch.setattr(page, "run_inputs", gone)
    run = write_run(tmp_path / "run", scene, ["health", "skeleton", "poses"])
    text = build_report(run).read_text(encoding="utf-8")
    assert "The frames cannot be shown: demo/cam0.mp4: no such video" in text
    # That, clip and 3D view; and results, losses, samples and versions, which this run has not got.
    assert text.count('class="missing"') == 7
    assert "training step 2000" in text  # keypoint health from the training


def test_existing_report_is_kept_unless_forced(tmp_path, scene, with_frames):
    run = write_run(tmp_path / "run", scene, [])
    (run / "report.html").write_text("precious")
    with pytest.raises(InputError, match=r"report\.html: exists; give --force"):
        build_report(run)
    assert (run / "report.html").read_text() == "precious"
    assert "BKinD-3D" in build_report(run, force=True).read_text(encoding="utf-8")


def test_failed_write_keeps_the_old_report(tmp_path, scene, with_frames, monkeypatch):
    run = write_run(tmp_path / "run", scene, [])
    (run / "report.html").write_text("precious")

    def full_disk(self, text, encoding):
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(InputError, match="cannot be written"):
        build_report(run, force=True)
    assert (run / "report.html").read_text() == "precious"
    assert sorted(os.listdir(run)) == ["config.yaml", "report.html"]


def test_not_a_run_folder(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("env.json", "{", r"env\.json: not valid JSON"),
        ("skeleton.json", "[]", r"skeleton\.json: expected a JSON object"),
        ("evaluation.json", '{"rows": []}', r"evaluation\.json: key 'protocol' is missing"),
        (
            "evaluation.json",
            '{"protocol": "", "options": {}, "units": "", "joints": [], "rows": [], "masked": {}, "paper": [], '
            '"paper_source": "", "note": ""}',
            r"evaluation\.json: key 'regressor' is missing; run `bkind3d evaluate`",
        ),
        ("actions.json", '{"rows": []}', r"actions\.json: key 'protocol' is missing; run `bkind3d actions`"),
        ("metrics.csv", "step,loss\n1,abc\n", r"metrics\.csv: a row is not made of numbers"),
        ("metrics.csv", "step,loss\n1\n", r"metrics\.csv: a row is not made of numbers"),
        ("health.jsonl", '{"step": 1}\n', r"health\.jsonl: line 1 is not a health record"),
        ("samples/step_000001.png", "x", r"step_000001\.png: not a readable picture"),
        ("poses/train.nc", "x", r"train\.nc: not a readable netCDF"),
    ],
)
def test_corrupt_files_are_named(tmp_path, scene, with_frames, name, content, message):
    run = write_run(tmp_path / "run", scene, [])
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        build_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_poses_that_reach_beyond_the_frames_are_not_shown(tmp_path, scene, with_frames):
    run = write_run(tmp_path / "run", scene, [])
    (run / "poses").mkdir()
    Poses(np.zeros((2, 3, 3)), np.zeros((2, 3)), 30, "m", "test", frames=[0, FRAMES]).save(run / "poses" / "test.nc")
    assert "<video" not in build_report(run).read_text(encoding="utf-8")


def test_poses_are_shown_on_the_frames_of_their_numbers(tmp_path, scene):
    """On a clock that leaves numbers out, a pose's number is not the row of its frame."""
    run = write_run(tmp_path / "run", scene, [])
    (run / "poses").mkdir()
    clock = 10 + 3 * np.arange(FRAMES)
    Poses(np.zeros((2, 3, 3)), np.zeros((2, 3)), 30, "m", "test", frames=[16, 22]).save(run / "poses" / "test.nc")
    sparse = dataclasses.replace(scene, clocks={"train": clock, "test": clock})
    assert page.choose_recording(read_run(run), sparse).rows.tolist() == [2, 4]
    assert page.choose_recording(read_run(run), dataclasses.replace(scene, clocks={"test": clock + 1})) is None


def test_frames_and_cameras_come_from_the_runs_project(tmp_path, scene):
    """Real videos and a real calibration: keypoints projected by the run's cameras fall on the dark blobs."""
    save_toml(scene.cameras["test"], tmp_path / "calibration.toml")
    videos = {}
    for m, name in enumerate(scene.cameras["test"].names):
        videos[name] = f"{name}.mp4"
        (tmp_path / videos[name]).write_bytes(clip.encode(scene.frames["test"][:20, m], 30.0))
    project = {
        "name": "filmed",
        "units": "m",
        "calibration": "calibration.toml",
        "volume": {"center": CENTER.tolist(), "size": SIDES.tolist()},
        "recordings": [{"name": "walk", "split": "both", "videos": videos}],
    }
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
    run = tmp_path / "run"
    run.mkdir()
    data = DataConfig(height=64, width=64, foreground=False)
    save_config(Config(tmp_path / "project.yaml", data=data), run / "config.yaml")

    found = run_inputs(run)

    assert (found.project, found.units, found.splits) == ("filmed", "m", {"walk": "both"})
    np.testing.assert_allclose([*found.center, *found.sides], [*CENTER, *SIDES])
    assert found.frames["walk"].shape == (20, VIEWS, 64, 64, 3)
    pixels = clip.project_keypoints(found.cameras["walk"], caterpillar()[:20]).round().astype(int)  # (F, M, J, 2)
    f, m = np.ogrid[:20, :VIEWS]
    at_keypoints = found.frames["walk"][f[..., None], m[..., None], pixels[..., 1], pixels[..., 0]]
    assert at_keypoints.max() < 75
    assert np.median(found.frames["walk"]) > 140


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(full_report, tmp_path_factory):
    if chromium.executable() is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("chromium is not on PATH: install it")
    with chromium.Browser(tmp_path_factory.mktemp("chromium"), 900, 700) as browser:
        browser.open(full_report)
        yield browser


def test_browser_shows_every_section(browser):
    assert browser.evaluate("document.title") == "demo – BKinD-3D report"
    assert browser.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)") == SECTIONS
    pictures_loaded = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    assert browser.evaluate("document.images.length") > 10
    assert browser.evaluate(pictures_loaded)


def test_browser_plays_the_clip(browser):
    browser.evaluate("document.querySelector('video').scrollIntoView()")  # nothing plays outside the window
    browser.wait_for("document.querySelector('video').currentTime > 0.2")
    assert browser.evaluate("document.querySelector('video').videoWidth") == 2 * 5 * WIDTH + pictures.GAP
    assert browser.evaluate("document.querySelector('video').duration") == pytest.approx(FRAMES / 30, abs=0.05)


def test_browser_renders_the_three_dimensional_view(browser):
    browser.evaluate("document.querySelector('iframe').scrollIntoView()")

    def dots():
        """How many keypoints are seen, by their colours."""
        picture = browser.screenshot("iframe").astype(int)
        near = [np.abs(picture - colour).sum(axis=2) < 30 for colour in pictures.palette(JOINTS).astype(int)]
        return sum(int(seen.sum()) > 15 for seen in near)

    deadline = time.monotonic() + chromium.PATIENCE
    while dots() < 6:
        assert time.monotonic() < deadline, "the 3D view stayed blank"
        time.sleep(0.5)


def test_browser_fits_a_phone(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_browser_saw_no_fault_and_asked_for_nothing(browser, full_report):
    """Last: it covers everything that the tests above did with the page."""
    browser.evaluate("new Promise(done => setTimeout(done, 500))")
    assert browser.faults() == []
    assert browser.requests() == [full_report.resolve().as_uri()]
