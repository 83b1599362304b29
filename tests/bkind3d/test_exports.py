"""Exports: each file opened by the tool's own loader, or field by field in the layout that the tool documents."""

import csv
import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import c3d
import cv2
import h5py
import numpy as np
import pandas
import pynwb
import pytest
import xarray
import yaml
from command_line import refused
from run_folder import VIEWS, caterpillar, make_scene, write_filmed_run
from scipy.io import loadmat

from bkind3d.cli import main
from bkind3d.config import Config
from bkind3d.data import load_project
from bkind3d.data.index import Index, save_index
from bkind3d.data.matching import frame_numbers
from bkind3d.errors import InputError
from bkind3d.exports import FORMATS, Track, export
from bkind3d.exports import c3d as c3d_export
from bkind3d.labels import load_labels
from bkind3d.poses import Poses
from bkind3d.run import bring_back, create_run

MISSED = 7  # the moment without poses
OFFSETS = [0, 3, 0, 1]
NAMES = ["nose", *(f"kp{j:02d}" for j in range(1, 9)), "tail_base"]
EDGES = [[0, 1, 1.5], [1, 9, 0.5]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose recording lacks a moment and two positions, and whose cameras started apart."""
    folder = tmp_path_factory.mktemp("filmed")
    run = write_filmed_run(folder, make_scene())
    project = yaml.safe_load((folder / "project.yaml").read_text())
    project["recordings"][0] |= {"offsets": {f"cam{m}": OFFSETS[m] for m in range(VIEWS)}, "frames": 17}
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    frames = np.delete(np.arange(2, 17), MISSED - 2)
    rng = np.random.default_rng(0)
    points = caterpillar()[frames].astype(np.float32)
    points[3, 4] = np.nan
    confidence, error = rng.uniform(0.1, 1, points.shape[:2]), rng.uniform(0, 5, points.shape[:2])
    cameras = [f"cam{m}" for m in range(VIEWS)]
    Poses(
        points, confidence, 30.0, "m", "walk", frames=frames, cameras=cameras, reprojection_error=error
    ).save(run / "poses" / "walk.nc")  # fmt: skip
    (run / "skeleton.json").write_text(json.dumps({"edges": EDGES, "all_weights": EDGES, "threshold": 0.3}))
    (run / "keypoints.yaml").write_text('kp00: {name: nose, color: "#e6194b"}\nkp09: {name: tail_base}\n')
    return run


@pytest.fixture(scope="module")
def poses(run):
    return Poses.load(run / "poses" / "walk.nc")


def written(run, to, tmp_path, name, **options):
    """Path of one file of an export, among those that it says it wrote."""
    paths = export(run, to, out=tmp_path, **options)
    assert all(path.is_file() for path in paths)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(paths)  # nothing half written stays
    assert tmp_path / name in paths
    return tmp_path / name


def table(path):
    """Head and numbers, NaN where a cell is empty."""
    head, *rows = csv.reader(path.read_text().splitlines())
    return head, np.array([[float(cell or "nan") for cell in row] for row in rows])


def gapless(values):
    """Of the frames 2 to 16, the missed one NaN."""
    return np.insert(values.astype(np.float64), MISSED - 2, np.nan, axis=0)


def test_csv(run, poses, tmp_path):
    head, rows = table(written(run, "csv", tmp_path, "walk.csv"))
    assert head[:6] == ["frame", "time_s", "nose_x_m", "nose_y_m", "nose_z_m", "nose_confidence"]
    np.testing.assert_array_equal(rows[:, 0], poses.frames)
    np.testing.assert_allclose(rows[:, 1], poses.frames / 30, atol=1e-6)
    values = rows[:, 2:].reshape(-1, 10, 4).astype(np.float32)
    np.testing.assert_array_equal(values[..., :3], poses.positions)
    np.testing.assert_array_equal(values[..., 3], poses.confidence)


def test_about(run, tmp_path):
    about = json.loads(written(run, "anipose", tmp_path, "walk.json").read_text())
    assert (about["units"], about["fps"], about["frames"], about["keypoints"]) == ("m", 30.0, [2, 16], NAMES)


def test_anipose(run, poses, tmp_path):
    """The columns of Anipose's triangulate.py, in its order; a row for every frame."""
    head, rows = table(written(run, "anipose", tmp_path, "walk.csv"))
    parts = ["x", "y", "z", "error", "ncams", "score"]
    world = [f"M_{i}{j}" for i in range(3) for j in range(3)] + [f"center_{i}" for i in range(3)]
    assert head == [f"{name}_{part}" for name in NAMES for part in parts] + [*world, "fnum"]
    np.testing.assert_array_equal(rows[:, -1], np.arange(2, 17))
    np.testing.assert_array_equal(rows[0, -13:-1], [*np.eye(3).ravel(), 0, 0, 0])
    values = rows[:, : 6 * len(NAMES)].reshape(-1, 10, 6).astype(np.float32)
    np.testing.assert_array_equal(values[..., :3], gapless(poses.positions).astype(np.float32))
    np.testing.assert_array_equal(values[..., 3], gapless(poses.reprojection_error).astype(np.float32))
    np.testing.assert_array_equal(values[..., 5], gapless(poses.confidence).astype(np.float32))
    assert (values[0, :, 4] == VIEWS).all()
    assert np.isnan(values[3, 4, 4])


def test_sleap_anipose(run, poses, tmp_path):
    """As triangulate of sleap-anipose writes and keypoint-moseq reads it."""
    with h5py.File(written(run, "sleap-anipose", tmp_path, "walk.h5")) as file:
        assert set(file) == {"tracks", "point_scores", "frames"}
        np.testing.assert_array_equal(file["tracks"][:, 0], gapless(poses.positions))
        np.testing.assert_array_equal(file["point_scores"][:, 0], gapless(poses.confidence))
        assert file["tracks"].shape == (15, 1, 10, 3)
        assert file["frames"][:].tolist() == [2, 17]
        attributes = file["tracks"].attrs
        assert (attributes["units"], attributes["fps"], list(attributes["node_names"])) == ("m", 30.0, NAMES)


def test_dannce(run, poses, tmp_path):
    mat = loadmat(written(run, "dannce", tmp_path, "walk/save_data_AVG.mat"), simplify_cells=True)
    np.testing.assert_array_equal(mat["pred"], poses.positions.transpose(0, 2, 1))
    np.testing.assert_array_equal(mat["p_max"], poses.confidence)
    np.testing.assert_array_equal(mat["sampleID"], poses.frames)
    assert np.isnan(mat["data"]).all()
    assert mat["data"].shape == mat["pred"].shape
    assert (mat["metadata"]["units"], mat["metadata"]["fps"], list(mat["metadata"]["keypoints"])) == ("m", 30.0, NAMES)


@pytest.mark.parametrize(("to", "end"), [("movement", ""), ("movement-0.15", "s")])
def test_movement(run, poses, tmp_path, to, end):
    """What ValidPosesInputs.validate of movement asks for: variables and names of dimensions, singular from 0.17 on."""
    with xarray.open_dataset(written(run, to, tmp_path, "walk.nc"), engine="h5netcdf") as data:
        assert {"position", "confidence"} <= set(data.data_vars)
        assert set(data.dims) == {"time", "space", f"keypoint{end}", f"individual{end}"}
        assert data[f"keypoint{end}"].values.tolist() == NAMES
        position = data.position.transpose("time", f"keypoint{end}", "space", f"individual{end}")[..., 0]
        np.testing.assert_array_equal(position, poses.positions)
        assert (data.attrs["fps"], data.attrs["ds_type"], data.attrs["units"]) == (30.0, "poses", "m")


def test_nwb(run, poses, tmp_path):
    """By pynwb and ndx-pose."""
    start = "2026-03-01T14:30:00+00:00"
    path = written(run, "nwb", tmp_path, "walk.nwb", start=start)
    with pynwb.NWBHDF5IO(path, "r") as file:
        content = file.read()
        assert content.session_start_time == datetime(2026, 3, 1, 14, 30, tzinfo=UTC)
        found = content.processing["behavior"]["PoseEstimation"]
        assert list(found.skeleton.nodes[:]) == NAMES
        assert found.skeleton.edges[:].tolist() == [[0, 1], [1, 9]]
        assert found.source_software == "bkind3d"
        for j, name in enumerate(NAMES):
            series = found.pose_estimation_series[name]
            np.testing.assert_array_equal(series.data[:], poses.positions[:, j])
            np.testing.assert_array_equal(series.confidence[:], poses.confidence[:, j])
            np.testing.assert_allclose(series.timestamps[:], poses.frames / 30)
            assert (series.unit, series.conversion) == ("meters", 1.0)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (None, "nwb asks when a recording began"),
        ("yesterday", "expected a date and time"),
        ("2026-03-01", "expected a time zone"),
    ],
)
def test_nwb_needs_a_start(run, tmp_path, start, message):
    with pytest.raises(InputError, match=message):
        export(run, "nwb", start=start, out=tmp_path)
    with pytest.raises(InputError, match="csv has no place for it"):
        export(run, "csv", start="2026-03-01T14:30:00+00:00", out=tmp_path)


def read_c3d(path):
    """By another library than the one that wrote it: reader, frame numbers, points (T, J, 5), channels (T, J)."""
    with path.open("rb") as file:
        reader = c3d.Reader(file)
        numbers, points, analog = zip(*((i, p.copy(), a.copy()) for i, p, a in reader.read_frames()))
        return reader, np.array(numbers), np.stack(points), np.stack(analog)[..., 0]


def test_c3d(run, poses, tmp_path):
    reader, numbers, points, channels = read_c3d(written(run, "c3d", tmp_path, "walk.c3d"))
    assert [label.strip() for label in reader.point_labels] == NAMES
    assert [label.strip() for label in reader.analog_labels] == [f"{name}_confidence" for name in NAMES]
    assert (reader.point_rate, reader.analog_rate, reader.get("POINT:UNITS").string_value.strip()) == (30.0, 30.0, "m")
    np.testing.assert_array_equal(numbers, np.arange(2, 17) + 1)  # the format counts from 1
    expected = gapless(poses.positions)
    there = np.isfinite(expected).all(axis=2)
    np.testing.assert_array_equal(points[there, :3], expected[there])
    np.testing.assert_array_equal(points[..., 3] == -1, ~there)
    np.testing.assert_allclose(channels, np.nan_to_num(gapless(poses.confidence)), rtol=1e-6)


def test_c3d_of_a_long_recording_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(c3d_export, "LONGEST", 10)
    points = np.random.default_rng(0).normal(size=(25, 2, 3)).astype(np.float32)
    track = Track(Poses(points, np.ones((25, 2)), 30.0, "mm", "long", frames=np.arange(25) + 4))
    files = c3d_export.files(track)
    assert list(files) == ["long-4.c3d", "long-14.c3d", "long-24.c3d"]
    parts = []
    for name, write in files.items():
        write(tmp_path / name)
        parts.append(read_c3d(tmp_path / name)[2][..., :3])
    assert [len(part) for part in parts] == [10, 10, 5]
    np.testing.assert_array_equal(np.concatenate(parts), points)


def in_view(run, poses, m):
    """Pixels (F, J, 2) by OpenCV, NaN outside the picture."""
    cameras = load_project(run.parent / "project.yaml").cameras
    rotation, _ = cv2.Rodrigues(cameras.rotation[m].numpy())
    matrix, lens = cameras.intrinsics[m].numpy(), cameras.distortion[m].numpy()
    points = np.nan_to_num(poses.positions.reshape(-1, 1, 3).astype(np.float64))
    pixels, _ = cv2.projectPoints(points, rotation, cameras.translation[m].numpy(), matrix, lens)
    pixels = pixels.reshape(*poses.positions.shape[:2], 2)
    seen = (pixels >= -0.5).all(axis=2) & (pixels <= np.array(cameras.image_size[m].tolist()) - 0.5).all(axis=2)
    return np.where((seen & np.isfinite(poses.positions).all(axis=2))[..., None], pixels, np.nan)


@pytest.fixture(scope="module")
def bent_run(run, tmp_path_factory):
    """The run with lenses, and a keypoint that leaves the pictures."""
    folder = tmp_path_factory.mktemp("bent")
    (folder / "run" / "poses").mkdir(parents=True)
    for name in ("run/config.yaml", "run/keypoints.yaml", "run/skeleton.json", "project.yaml"):
        (folder / name).write_text((run.parent / name).read_text().replace(str(run.parent), str(folder)))
    text = (run.parent / "calibration.toml").read_text()
    bent = text.replace("distortions = [0.0, 0.0, 0.0, 0.0, 0.0]", "distortions = [-0.2, 0.05, 0.001, -0.002, 0.0]")
    assert bent != text
    (folder / "calibration.toml").write_text(bent)
    for m in range(VIEWS):
        (folder / f"cam{m}.mp4").write_bytes((run.parent / f"cam{m}.mp4").read_bytes())
    poses = Poses.load(run / "poses" / "walk.nc")
    positions = poses.positions.copy()
    positions[5:, 9] += 5
    dataclasses.replace(poses, positions=positions).save(folder / "run" / "poses" / "walk.nc")
    return folder / "run"


@pytest.mark.parametrize("m", [1, 2])
def test_reprojections(bent_run, tmp_path, m):
    """In both formats OpenCV's pixels, in the rows of the frames of the camera's own video."""
    poses = Poses.load(bent_run / "poses" / "walk.nc")
    pixels, rows = in_view(bent_run, poses, m), poses.frames + OFFSETS[m]
    seen = np.isfinite(pixels).all(axis=2)
    assert seen.any(axis=0)[:9].all()
    assert not seen[5:, 9].any()

    frame = pandas.read_csv(
        written(bent_run, "dlc", tmp_path / "dlc", f"walk/cam{m}DLC_bkind3d.csv"), header=[0, 1, 2], index_col=0
    )
    assert frame.columns.names == ["scorer", "bodyparts", "coords"]
    assert frame.columns.get_level_values("bodyparts").unique().tolist() == NAMES
    assert frame.columns.get_level_values("coords").tolist() == ["x", "y", "likelihood"] * len(NAMES)
    assert frame.index.tolist() == list(range(rows[-1] + 1))
    values = frame.to_numpy().reshape(-1, 10, 3)
    np.testing.assert_allclose(values[rows, :, :2], pixels, atol=1e-3)
    np.testing.assert_array_equal(values[rows, :, 2].astype(np.float32), np.where(seen, poses.confidence, 0))
    others = np.setdiff1d(np.arange(len(values)), rows)
    assert np.isnan(values[others, :, :2]).all()
    assert not values[others, :, 2].any()

    with h5py.File(written(bent_run, "sleap", tmp_path / "sleap", f"walk/cam{m}/walk.analysis.h5")) as file:
        assert file["tracks"].shape == (1, 2, 10, len(values))  # the layout of SLEAP's write_tracking_h5.py, transposed
        tracks = file["tracks"][0].transpose(2, 1, 0)
        np.testing.assert_allclose(tracks[rows], pixels, atol=1e-3)
        scores = file["point_scores"][0].T
        np.testing.assert_array_equal(scores[rows], np.where(seen, poses.confidence, np.nan))
        occupied = np.isin(np.arange(len(values)), rows)
        np.testing.assert_array_equal(file["track_occupancy"][:, 0], occupied)
        np.testing.assert_array_equal(np.isfinite(file["instance_scores"][0]), occupied)
        assert file["instance_scores"].shape == file["tracking_scores"].shape == (1, len(values))
        assert [name.decode() for name in file["node_names"]] == NAMES
        assert file["edge_inds"][:].tolist() == [[0, 1], [1, 9]]
        assert [name.decode() for name in file["edge_names"][1]] == ["kp01", "tail_base"]
        assert file["video_path"][()].decode().endswith(f"cam{m}.mp4")


def test_dlc_in_three_dimensions(run, poses, tmp_path):
    frame = pandas.read_csv(written(run, "dlc", tmp_path, "walk/walk_DLC_3D.csv"), header=[0, 1, 2], index_col=0)
    assert frame.columns.get_level_values("coords").tolist() == ["x", "y", "z"] * len(NAMES)
    assert frame.index.tolist() == list(range(2, 17))
    values = frame.to_numpy().reshape(-1, 10, 3).astype(np.float32)
    np.testing.assert_array_equal(values, gapless(poses.positions).astype(np.float32))


def test_frames_of_chunks_and_of_an_index(run, tmp_path):
    project = load_project(run.parent / "project.yaml")
    recording, names = project.recordings[0], project.cameras.names
    chunks = dict.fromkeys(names, (Path("film-900.mp4"), Path("film-500.mp4")))
    chunked = dataclasses.replace(recording, videos=chunks)
    assert frame_numbers(chunked, project.cameras, np.array([0, 4])).tolist() == [
        [500, 503, 500, 501],
        [504, 507, 504, 505],
    ]
    clock = np.array([10, 20, 30])
    save_index(tmp_path / "index.npz", Index(names, np.arange(12).reshape(3, 4), clock, 30.0))
    indexed = dataclasses.replace(recording, index=tmp_path / "index.npz")
    assert frame_numbers(indexed, project.cameras, clock[1:]).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(InputError, match=r"index\.npz: has no moment 31"):
        frame_numbers(indexed, project.cameras, np.array([31]))


def test_the_command(run, capsys):
    main(["export", str(run), "--to", "csv", "--recordings", "[walk]"])
    assert capsys.readouterr().out.splitlines() == [
        str(run / "exports/csv/walk.csv"),
        str(run / "exports/csv/walk.json"),
    ]
    assert "walk.csv: exists; give --force to replace it" in refused(["export", str(run), "--to", "csv"], capsys)
    main(["export", str(run), "--to", "csv", "--force"])
    assert "'run' has no poses in" in refused(["export", str(run), "--to", "csv", "--recordings", "[run]"], capsys)


def test_every_format_is_tested_and_in_the_docs():
    assert set(FORMATS) == {
        "csv", "anipose", "sleap-anipose", "dannce", "movement", "movement-0.15", "nwb", "c3d", "dlc", "sleap",
    }  # fmt: skip
    page = (Path(__file__).parents[2] / "docs" / "exports.md").read_text()
    assert all(f"`{name}`" in page for name in FORMATS)


def test_what_a_user_may_not_ask(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'xls' is no format; expected one of csv, anipose"):
        export(run, "xls")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(InputError, match="no poses; find them with `bkind3d predict"):
        export(tmp_path, "csv")
    monkeypatch.setattr("bkind3d.exports.run.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'ezc3d is not installed; install it with pip install "bkind3d\[export\]"'):
        export(run, "c3d", out=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kp10: {name: a}", "there is no keypoint 'kp10'; the run has kp00 to kp09"),
        ("kp00: {name: a}\nkp01: {name: a}", "two keypoints are named 'a'"),
        ("kp00: {name: kp01}", "two keypoints are named 'kp01'"),
        ("kp00: {name: '=a'}", "kp00: name '=a': use letters, digits and '_'"),
        ("kp00: {name: left paw}", "kp00: name 'left paw'"),
        ("kp00: {color: red}", "kp00: color 'red': expected six hexadecimal digits"),
        ("kp00: {colour: '#ffffff'}", "kp00: expected {name: nose"),
        ("kp00: nose", "kp00: expected {name: nose"),
        ("- nose", "expected one line for each keypoint"),
        ("kp00: [", "not a YAML file"),
    ],
)
def test_bad_labels(tmp_path, text, message):
    (tmp_path / "keypoints.yaml").write_text(text)
    with pytest.raises(InputError, match=r"keypoints\.yaml") as caught:
        load_labels(tmp_path, [f"kp{j:02d}" for j in range(10)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels(run):
    labels = load_labels(run, [f"kp{j:02d}" for j in range(10)])
    assert labels.names == NAMES
    assert labels.colours[0].tolist() == [0xE6, 0x19, 0x4B]


def test_a_new_training_sets_the_names_aside(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "keypoints.yaml").write_text("kp00: {name: nose}\n")
    create_run(tmp_path / "run", Config(), force=True)
    assert (tmp_path / "run" / "keypoints.old.yaml").read_text() == "kp00: {name: nose}\n"
    assert load_labels(tmp_path / "run", ["kp00"]).names == ["kp00"]


def test_names_come_back_with_the_run_that_they_are_of(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/step_000003").mkdir(parents=True)
    (run / "checkpoints/step_000003/model.safetensors").touch()
    (run / "config.yaml").touch()
    (run / "keypoints.yaml").write_text("kp00: {name: nose}\n")
    create_run(run, Config(), force=True)
    (run / "config.yaml").unlink()  # killed before the new settings were there
    bring_back(run)
    assert load_labels(run, ["kp00"]).names == ["nose"]
