"""`bkind3d calib`: a calibration of any known format shown, or written as Anipose's TOML, the project's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bkind3d.cameras import UNITS, Calibration, read_calibration, save_toml
from bkind3d.errors import InputError
from bkind3d.tables import aligned


def convert_calibration(
    source: Path,
    out: Path,
    *,
    units: str | None = None,
    sizes: str | None = None,
    subject: str | None = None,
    force: bool = False,
) -> None:
    """Write a calibration of any known format as Anipose's TOML.

    Args:
        source: The calibration: a file, one of its files, or a folder that holds one.
        out: TOML file to write.
        units: Length unit of its translations (m, cm, mm or um), where the format does not say.
        sizes: Width and height of the images, W,H in pixels, where the format does not say.
        subject: Of a calibration of Human3.6M that has several, such as S1.
        force: Replace the file.

    Raises:
        InputError: The calibration cannot be read, units or sizes are missing, or the file exists.
    """
    if out.exists() and not force:
        raise InputError(f"{out}: exists; give --force to replace it")
    if units is not None and units not in UNITS:
        raise InputError(f"--units: {units!r} is not a unit of length; expected one of {', '.join(UNITS)}")
    calibration = read_calibration(source, subject)
    cameras = calibration.cameras(units, parse_size(sizes))
    save_toml(cameras, out)
    print(f"{out}: {len(cameras)} cameras of {calibration.format}, units {cameras.units}")


def show_calibration(source: Path, *, subject: str | None = None) -> None:
    """Print what a calibration of any known format holds.

    Args:
        source: The calibration: a file, one of its files, or a folder that holds one.
        subject: Of a calibration of Human3.6M that has several, such as S1.

    Raises:
        InputError: The calibration cannot be read.
    """
    print("\n".join(calibration_lines(read_calibration(source, subject))))


def calibration_lines(calibration: Calibration) -> list[str]:
    """A calibration as a table: lens, and where each camera stands and looks."""
    rows = [["camera", "image", "focal", "centre", "skew", "distortion", "stands at", "looks along"]]
    for lens in calibration.lenses:
        at, along = -lens.rotation.T @ lens.translation, lens.rotation[2]
        values = lens.distortion[: 4 if lens.fisheye else 5]
        rows.append(
            [
                lens.name,
                "not said" if lens.size is None else "×".join(map(str, lens.size)),
                _numbers(lens.matrix[[0, 1], [0, 1]], 1),
                _numbers(lens.matrix[:2, 2], 1),
                f"{lens.matrix[0, 1]:g}",
                _numbers(values, 4) + (" fisheye" if lens.fisheye else ""),
                _numbers(at, 4, significant=True),
                _numbers(along, 3),
            ]
        )
    files = ", ".join(str(path) for path in calibration.files)
    return [f"{files}: {calibration.format}, units {calibration.units or 'not said'}", *aligned(rows)]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Width and height of "W,H"."""
    if text is None:
        return None
    try:
        width, height = (int(side) for side in text.split(","))
    except ValueError:
        width, height = 0, 0
    if min(width, height) < 1:
        raise InputError(f"--sizes: expected W,H, such as 1280,1024, not {text!r}")
    return width, height


def _numbers(values: np.ndarray, digits: int, significant: bool = False) -> str:
    return " ".join(f"{value:.{digits}g}" if significant else f"{value:.{digits}f}" for value in values.tolist())
