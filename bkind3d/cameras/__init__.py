"""Calibration formats in, one :class:`Cameras` type out."""

from bkind3d.cameras.anipose import load_toml, natural_key, save_toml
from bkind3d.cameras.cameras import UNITS, Cameras

__all__ = ["UNITS", "Cameras", "load_toml", "natural_key", "save_toml"]
