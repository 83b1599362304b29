"""Binary files of strangers: what the child process sends back, and that no file ends this process."""

import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import scipy.io

from bkind3d import foreign
from bkind3d.errors import InputError
from bkind3d.foreign import read_hdf5, read_mat, read_netcdf


@pytest.fixture
def content():
    cells = np.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = {"K": np.eye(3)}, {"K": 2 * np.eye(3)}
    return {"cameras": {"Camera1": {"K": np.arange(9.0).reshape(3, 3), "name": "left"}}, "params": cells, "n": 7.0}


def test_matlab_5(tmp_path, content):
    scipy.io.savemat(tmp_path / "a.mat", content, do_compression=True)
    found = read_mat(tmp_path / "a.mat")
    np.testing.assert_array_equal(found["cameras"]["Camera1"]["K"], np.arange(9.0).reshape(3, 3))
    assert found["cameras"]["Camera1"]["name"] == "left"
    assert found["n"] == 7
    np.testing.assert_array_equal([cell["K"][0, 0] for cell in found["params"]], [1, 2])


def test_matlab_7_3(tmp_path):
    """Structs, cells of structs and texts as MATLAB writes them into HDF5; arrays with their axes reversed."""
    with h5py.File(tmp_path / "a.mat", "w") as file:
        for number in (1, 2):
            file[f"#refs#/{number}/K"] = number * np.arange(6.0).reshape(3, 2)
        cells = file.create_dataset("params", (2, 1), h5py.ref_dtype)
        cells[0, 0], cells[1, 0] = file["#refs#/1"].ref, file["#refs#/2"].ref
        file["name"] = np.array([[ord(letter)] for letter in "left"], np.uint16)
        file["name"].attrs["MATLAB_class"] = np.bytes_("char")
    found = read_mat(tmp_path / "a.mat")
    assert found["name"] == "left"
    assert set(found) == {"params", "name"}
    np.testing.assert_array_equal(found["params"][1]["K"], 2 * np.arange(6.0).reshape(3, 2).T)


def test_arrays_larger_than_the_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("group/large", (10**5, 10**5), "f8", chunks=True)
    for read in (read_hdf5, read_mat, read_netcdf):
        with pytest.raises(InputError, match=r"a.h5: not a readable \w+ file \(says that it holds more than"):
            read(tmp_path / "a.h5")


@pytest.mark.parametrize("write", ["deep", "cycle"])
def test_groups_without_an_end(tmp_path, write):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if write == "deep":
            file["/".join("a" * 100)] = 1
        else:
            file["a"] = file["/"]
    with pytest.raises(InputError, match="nested deeper"):
        read_hdf5(tmp_path / "a.h5")


def test_a_bomb(tmp_path, monkeypatch):
    """A megabyte of zeros compressed to a thousandth is fine, a gigabyte is not."""
    monkeypatch.setattr(foreign, "_ROOM", 4 << 20)
    scipy.io.savemat(tmp_path / "a.mat", {"x": np.zeros(1 << 17)}, do_compression=True)
    assert read_mat(tmp_path / "a.mat")["x"].shape == (1 << 17,)
    scipy.io.savemat(tmp_path / "b.mat", {"x": np.zeros(1 << 24)}, do_compression=True)
    with pytest.raises(InputError, match=r"b.mat: not a readable MATLAB file \(needs more memory|\(holds more"):
        read_mat(tmp_path / "b.mat")


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGSEGV, "crashes"), (signal.SIGPROF, "too long")])
def test_a_child_that_is_ended(tmp_path, content, number, reason):
    """The file that ended it is named, and the next one is read by a new child."""
    scipy.io.savemat(tmp_path / "a.mat", content)
    read_mat(tmp_path / "a.mat")
    os.kill(foreign._child.process.pid, signal.SIGSTOP)
    asked = foreign._child.ask

    def ask(*arguments):
        os.kill(foreign._child.process.pid, number)
        os.kill(foreign._child.process.pid, signal.SIGCONT)
        return asked(*arguments)

    foreign._child.ask = ask
    with pytest.raises(InputError, match=f"a.mat: not a readable MATLAB file .*{reason}"):
        read_mat(tmp_path / "a.mat")
    assert read_mat(tmp_path / "a.mat")["n"] == 7


def test_time_of_the_processor_is_limited(tmp_path, monkeypatch):
    scipy.io.savemat(tmp_path / "a.mat", {"x": np.zeros(1 << 23)}, do_compression=True)
    assert read_mat(tmp_path / "a.mat")["x"].shape == (1 << 23,)
    monkeypatch.setattr(foreign, "_SECONDS", 1e-3)
    monkeypatch.setattr(foreign, "_RATE", 1 << 40)
    with pytest.raises(InputError, match="too long"):
        read_mat(tmp_path / "a.mat")


@pytest.mark.parametrize("data", [b"", b"MATLAB 5.0 MAT-file", b"\x89HDF\r\n\x1a\n", bytes(200)])
def test_files_that_are_none(tmp_path, data):
    (tmp_path / "a.mat").write_bytes(data)
    for read in (read_mat, read_hdf5, read_netcdf):
        with pytest.raises(InputError, match="not a readable"):
            read(tmp_path / "a.mat")
    with pytest.raises(InputError, match="no such file"):
        read_mat(tmp_path / "b.mat")


def test_nothing_is_left_when_the_process_ends(tmp_path, content):
    scipy.io.savemat(tmp_path / "a.mat", content)
    program = (
        f"from bkind3d import foreign; foreign.read_mat({str(tmp_path / 'a.mat')!r}); print(foreign._child.process.pid)"
    )
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert not ended.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)
