import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray

from bkind3d.errors import InputError
from bkind3d.poses import Poses, keypoint_names


def make_poses(frames=7, joints=12, **changes):
    rng = np.random.default_rng(0)
    values = {
        "positions": rng.normal(size=(frames, joints, 3)),
        "confidence": rng.uniform(size=(frames, joints)),
        "fps": 50.0,
        "units": "mm",
        "recording": "test",
    }
    return Poses(**(values | changes))


def test_round_trip(tmp_path):
    poses = make_poses()
    poses.save(tmp_path / "a.nc")
    back = Poses.load(tmp_path / "a.nc")
    np.testing.assert_array_equal(back.positions, poses.positions)
    np.testing.assert_array_equal(back.confidence, poses.confidence)
    assert (back.fps, back.units, back.recording, back.names) == (50.0, "mm", "test", poses.names)
    np.testing.assert_array_equal(back.frames, np.arange(7))


def test_layout_is_movements(tmp_path):
    poses = make_poses(frames=5, joints=3)
    poses.save(tmp_path / "a.nc")
    with xarray.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as data:
        assert data.position.dims == ("time", "space", "keypoint", "individual")
        assert data.confidence.dims == ("time", "keypoint", "individual")
        assert set(data.data_vars) == {"position", "confidence"}
        assert set(data.coords) == {"time", "space", "keypoint", "individual"}
        assert data.position.dtype == data.confidence.dtype == np.float32
        assert data.space.values.tolist() == ["x", "y", "z"]
        assert data.keypoint.values.tolist() == ["kp00", "kp01", "kp02"]
        assert data.individual.values.tolist() == ["individual_0"]
        assert data.time.dtype == np.float64
        np.testing.assert_allclose(data.time.values, np.arange(5) / 50)
        wanted = {"fps": 50.0, "time_unit": "seconds", "source_software": "bkind3d", "ds_type": "poses", "units": "mm"}
        assert {key: data.attrs[key] for key in wanted} == wanted
        np.testing.assert_array_equal(
            data.position.sel(keypoint="kp01", space="z", individual="individual_0").values, poses.positions[:, 1, 2]
        )
        np.testing.assert_array_equal(data.confidence.values[:, 2, 0], poses.confidence[:, 2])


def test_opens_as_plain_hdf5(tmp_path):
    poses = make_poses()
    poses.save(tmp_path / "a.nc")
    with h5py.File(tmp_path / "a.nc") as file:
        np.testing.assert_array_equal(file["position"][:, 0, 4, 0], poses.positions[:, 4, 0])


def test_frame_numbers_survive_at_an_awkward_rate(tmp_path):
    frames = np.arange(0, 70000, 10000)
    poses = make_poses(fps=30000 / 1001)
    poses = Poses(poses.positions, poses.confidence, poses.fps, "m", "r", frames=frames)
    poses.save(tmp_path / "a.nc")
    np.testing.assert_array_equal(Poses.load(tmp_path / "a.nc").frames, frames)
    np.testing.assert_allclose(poses.time, frames * 1001 / 30000)


def test_nan_positions_and_no_frames_are_kept(tmp_path):
    poses = make_poses()
    poses.positions[2, 1] = np.nan
    poses.save(tmp_path / "a.nc")
    np.testing.assert_array_equal(Poses.load(tmp_path / "a.nc").positions, poses.positions)
    make_poses(frames=0).save(tmp_path / "b.nc")
    assert Poses.load(tmp_path / "b.nc").positions.shape == (0, 12, 3)


def test_names_sort_as_they_count():
    assert keypoint_names(3) == ["kp00", "kp01", "kp02"]
    assert keypoint_names(101) == sorted(keypoint_names(101))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": np.zeros((7, 12, 2))}, "positions"),
        ({"confidence": np.zeros((7, 11))}, "confidence"),
        ({"names": ["a"] * 12}, "names"),
        ({"names": ["a", "b"]}, "names"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"units": ""}, "units"),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(InputError, match=message):
        make_poses(**change)


def test_bad_frame_numbers():
    with pytest.raises(InputError, match="frames"):
        Poses(np.zeros((2, 3, 3)), np.zeros((2, 3)), 1, "m", "r", frames=np.array([1, 1]))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.nc: no such pose file"):
        Poses.load(tmp_path / "none.nc")


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "plain_hdf5"])
def test_corrupt_file(tmp_path, kind):
    path = tmp_path / "bad.nc"
    make_poses(frames=400).save(path)
    if kind == "plain_hdf5":
        path.unlink()
        with h5py.File(path, "w") as file:
            file["x"] = np.zeros(3)
    else:
        whole = path.read_bytes()
        path.write_bytes({"text": b"not a netCDF file", "truncated": whole[: len(whole) // 2], "empty": b""}[kind])
    with pytest.raises(InputError, match=r"bad\.nc") as caught:
        Poses.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", ["units", "fps", "ds_type", "confidence", "individual"])
def test_file_of_another_layout(tmp_path, loss):
    data = make_poses().to_xarray()
    if loss == "confidence":
        data = data.drop_vars("confidence")
    elif loss == "individual":
        data = xarray.concat([data, data.assign_coords(individual=["other"])], dim="individual", data_vars="all")
    else:
        del data.attrs[loss]
    data.to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=r"bad\.nc"):
        Poses.load(tmp_path / "bad.nc")


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.nc"
    make_poses().save(path)
    before = path.read_bytes()

    def full_disk(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match=r"a\.nc: cannot write the poses \(No space left on device\)"):
        make_poses(frames=9).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.nc"]


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="cannot write the poses"):
        make_poses().save(tmp_path / "none" / "a.nc")
