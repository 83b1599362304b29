"""Calibration formats in, one :class:`Cameras` type out."""

from bkind3d.cameras.anipose import save_toml
from bkind3d.cameras.cameras import UNITS, Cameras
from bkind3d.cameras.formats import load_calibration, read_calibration
from bkind3d.cameras.lens import Calibration, Sizes, natural_key

__all__ = [
    "UNITS",
    "Calibration",
    "Cameras",
    "Sizes",
    "load_calibration",
    "natural_key",
    "read_calibration",
    "save_toml",
]
