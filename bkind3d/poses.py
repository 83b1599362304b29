"""Keypoint tracks on disk: one netCDF file per recording, in the layout of the ``movement`` toolbox.

``position(time, space, keypoint, individual)`` and ``confidence(time, keypoint, individual)``, with the attributes
``fps``, ``time_unit``, ``source_software``, ``ds_type`` and ``units`` (of length, which movement has no place for but
keeps), so that the file opens there, in xarray and in any HDF5 reader. Where they were measured, what the views say of
each keypoint without a label, ``reprojection_error`` and ``on_body``, with the dimensions of ``confidence``.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray

from bkind3d.documents import broken_file
from bkind3d.errors import InputError
from bkind3d.foreign import read_netcdf
from bkind3d.hdf5 import write_netcdf

SPACE = ("x", "y", "z")
INDIVIDUAL = "individual_0"
POSITION_DIMS = ("time", "space", "keypoint", "individual")
CONFIDENCE_DIMS = ("time", "keypoint", "individual")
# What the views say of each keypoint; in the file where it was measured.
AGREEMENT = ("reprojection_error", "on_body")


def keypoint_names(count: int) -> list[str]:
    """Zero-padded names ``kp00``, ``kp01``, ..., so that alphabetical and numerical order agree."""
    width = max(2, len(str(count - 1)))
    return [f"kp{i:0{width}d}" for i in range(count)]


@dataclass
class Poses:
    """3D keypoints of one recording.

    Args:
        positions: (F, J, 3) float32, in ``units``; NaN where a keypoint is missing.
        confidence: (F, J) float32, the peak of each keypoint's probability volume, in [0, 1].
        fps: frames per second of the recording.
        units: unit of length of ``positions``.
        recording: name of the recording.
        names: J distinct keypoint names; default ``kp00``, ``kp01``, ...
        frames: (F,) int64, numbers on the recording's clock, increasing; default 0 ... F-1. Times are frames / fps.
        cameras: names of the views that they were found in; empty where that is not known.
        reprojection_error: (F, J) float32, how far the views' own keypoints lie from the projected one, root mean
            square over the views, in pixels of the videos; None where views have no keypoints of their own.
        on_body: (F, J) float32, share of the views that show the keypoint in which it lies on the moving body, 0 where
            no view shows it; None where the body is not told from the room.
        step: of the training, whose networks found them; None where that is not known.

    Raises:
        InputError: a shape, a name or a number that does not fit.
    """

    positions: np.ndarray
    confidence: np.ndarray
    fps: float
    units: str
    recording: str
    names: list[str] = field(default_factory=list)
    frames: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    cameras: list[str] = field(default_factory=list)
    reprojection_error: np.ndarray | None = None
    on_body: np.ndarray | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        self.positions = np.asarray(self.positions, dtype=np.float32)
        self.confidence = np.asarray(self.confidence, dtype=np.float32)
        if self.positions.ndim != 3 or self.positions.shape[2] != 3:
            raise InputError(f"positions: expected shape (F, J, 3), got {self.positions.shape}")
        count, joints = self.positions.shape[:2]
        if self.confidence.shape != (count, joints):
            raise InputError(f"confidence: expected shape {(count, joints)}, got {self.confidence.shape}")
        for name in AGREEMENT:
            if getattr(self, name) is not None:
                setattr(self, name, np.asarray(getattr(self, name), dtype=np.float32))
                if getattr(self, name).shape != (count, joints):
                    raise InputError(f"{name}: expected shape {(count, joints)}, got {getattr(self, name).shape}")
        self.names = [str(name) for name in self.names] or keypoint_names(joints)
        if len(self.names) != joints or len(set(self.names)) != joints:
            raise InputError(f"names: expected {joints} distinct keypoint names, got {self.names}")
        self.frames = np.asarray(self.frames, dtype=np.int64) if len(self.frames) else np.arange(count)
        if self.frames.shape != (count,) or (np.diff(self.frames) <= 0).any():
            raise InputError(f"frames: expected {count} increasing frame numbers, got shape {self.frames.shape}")
        self.fps = float(self.fps)
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"fps: expected a positive number, got {self.fps}")
        if not self.units:
            raise InputError('units: expected the unit of length, such as "mm"')

    @property
    def time(self) -> np.ndarray:
        """(F,) float64 seconds from the recording's frame 0."""
        return self.frames / self.fps

    def to_xarray(self) -> xarray.Dataset:
        """The same data as a movement ``poses`` data set."""
        measured = {name: getattr(self, name) for name in AGREEMENT if getattr(self, name) is not None}
        return xarray.Dataset(
            {
                "position": (POSITION_DIMS, self.positions.transpose(0, 2, 1)[..., None]),
                "confidence": (CONFIDENCE_DIMS, self.confidence[..., None]),
            }
            | {name: (CONFIDENCE_DIMS, values[..., None]) for name, values in measured.items()},
            coords={"time": self.time, "space": list(SPACE), "keypoint": self.names, "individual": [INDIVIDUAL]},
            attrs={
                "fps": self.fps,
                "time_unit": "seconds",
                "source_software": "bkind3d",
                "ds_type": "poses",
                "units": self.units,
                "recording": self.recording,
                "cameras": " ".join(self.cameras),
            }
            | ({} if self.step is None else {"step": self.step}),
        )

    def save(self, path: str | Path) -> None:
        """Write ``path`` (netCDF-4), replacing it only once the new file is complete.

        Raises:
            InputError: the file cannot be written (folder missing, no permission, disk full).
        """
        path = Path(path)
        try:
            write_netcdf(path, self.to_xarray())
        except OSError as error:
            raise InputError(f"{path}: cannot write the poses ({error.strerror or error})") from error

    @classmethod
    def load(cls, path: str | Path) -> "Poses":
        """Read a file written by :meth:`save`.

        Raises:
            InputError: missing, unreadable or corrupt file, or not a single-individual 3D movement ``poses`` data set
                with ``units``.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such pose file; run `bkind3d predict` to make it")
        try:
            content = read_netcdf(path)
        except InputError as error:
            raise InputError(f"{error}; run `bkind3d predict` again") from None
        with broken_file(f"{path}: not a file of poses"):
            variables = {name: (part["dims"], part["data"]) for name, part in content["variables"].items()}
            data = xarray.Dataset(variables, attrs=content["attributes"])
            return _from_xarray(data, path)


def _from_xarray(data: xarray.Dataset, path: Path) -> Poses:
    for name, dims in (("position", POSITION_DIMS), ("confidence", CONFIDENCE_DIMS)):
        if name not in data or set(data[name].dims) != set(dims):
            raise InputError(f"{path}: expected a variable {name}({', '.join(dims)}) as movement writes it")
    missing = [name for name in ("fps", "units", "ds_type") if name not in data.attrs]
    if missing or data.attrs["ds_type"] != "poses" or data.sizes["individual"] != 1 or data.sizes["space"] != 3:
        lack = f"attribute {missing[0]} missing" if missing else "not 3D poses of one individual"
        raise InputError(f"{path}: {lack}; run `bkind3d predict` again")
    fps = float(data.attrs["fps"])
    measured = {
        name: data[name].transpose(*CONFIDENCE_DIMS).values[..., 0]
        for name in AGREEMENT
        if name in data and set(data[name].dims) == set(CONFIDENCE_DIMS)
    }
    try:
        return Poses(
            positions=data["position"].transpose("time", "keypoint", "space", "individual").values[..., 0],
            confidence=data["confidence"].transpose(*CONFIDENCE_DIMS).values[..., 0],
            fps=fps,
            units=str(data.attrs["units"]),
            recording=str(data.attrs.get("recording", path.stem)),
            names=[str(name) for name in data["keypoint"].values],
            frames=np.rint(data["time"].values * fps).astype(np.int64),
            cameras=str(data.attrs.get("cameras", "")).split(),
            step=int(data.attrs["step"]) if "step" in data.attrs else None,
            **measured,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
