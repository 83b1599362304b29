"""What a user calls the keypoints of a run, and their colours: one small file that exports, report and pictures use.

``keypoints.yaml`` in the run folder; what it leaves out keeps its number and its colour::

    kp00: {name: nose, color: "#e6194b"}
    kp07: {name: tail_base}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bkind3d.documents import parse_yaml, read_text
from bkind3d.errors import InputError
from bkind3d.pictures import palette

NAME = "keypoints.yaml"
_KEYS = ("name", "color")


@dataclass(frozen=True, eq=False)
class Labels:
    """Names of J keypoints, all different, and their colours (J, 3) uint8."""

    names: list[str]
    colours: np.ndarray


def load_labels(run: Path, keypoints: Sequence[str]) -> Labels:
    """Names and colours of the keypoints of a run: those of its ``keypoints.yaml`` where there is one.

    Args:
        run: run folder.
        keypoints: names that the networks gave them, kp00, kp01, ...

    Raises:
        InputError: the file is no such mapping, names a keypoint that is not there, gives two the same name, a name has
            other characters than letters, digits and ``_``, or a colour is not of the form "#rrggbb".
    """
    path, names, colours = run / NAME, list(keypoints), palette(len(keypoints))
    if not path.is_file() or not keypoints:
        return Labels(names, colours)
    for key, row in _read(path).items():
        if key not in keypoints:
            raise InputError(f"{path}: there is no keypoint {key!r}; the run has {keypoints[0]} to {keypoints[-1]}")
        if not isinstance(row, dict) or not set(row) <= set(_KEYS):
            raise InputError(f'{path}: {key}: expected {{name: nose, color: "#e6194b"}}, either or both, not {row!r}')
        place = list(keypoints).index(key)
        names[place] = _name(f"{path}: {key}", row.get("name", key))
        if "color" in row:
            colours[place] = _colour(f"{path}: {key}", row["color"])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: two keypoints are named {twice!r}; give every keypoint its own name")
    return Labels(names, colours)


def _read(path: Path) -> dict[Any, Any]:
    content = parse_yaml(read_text(path), str(path))
    if not isinstance(content, dict | None):
        raise InputError(f"{path}: expected one line for each keypoint, such as kp00: {{name: nose}}")
    return content or {}


def _name(where: str, value: Any) -> str:
    """A name that is a word in every format, and never a formula."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z]\w*", value, flags=re.ASCII):
        raise InputError(f"{where}: name {value!r}: use letters, digits and '_', and begin with a letter")
    return value


def _colour(where: str, value: Any) -> list[int]:
    if not isinstance(value, str) or not re.fullmatch("#[0-9a-fA-F]{6}", value):
        raise InputError(f'{where}: color {value!r}: expected six hexadecimal digits in quotes, such as "#e6194b"')
    return [int(value[k : k + 2], 16) for k in (1, 3, 5)]
