"""A camera's images, one file for each frame, with its number in the name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bkind3d.errors import InputError, reason
from bkind3d.tables import times


def is_images(path: Path) -> bool:
    """Whether a path stands for numbered images, as FFmpeg writes it: img_%06d.jpg."""
    return re.fullmatch(r"[^%]*%(0\d+)?d[^%]*", path.name) is not None


@dataclass(frozen=True)
class ImageFootage:
    """A camera's images, whose numbers ``pattern`` puts into their names; all of one size."""

    pattern: Path
    numbers: np.ndarray
    size: tuple[int, int]

    @property
    def parts(self) -> list[tuple[int, Path]]:
        """Each file, with its number."""
        return [(number, _image_path(self.pattern, number)) for number in self.numbers.tolist()]

    def read(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The images of those numbers, (H, W, 3) uint8 RGB, each with its number.

        Raises:
            InputError: an image cannot be read or has another size than the first; the message names it.
        """
        for number in numbers.tolist():
            path = _image_path(self.pattern, number)
            frame = read_image(path)
            if frame.shape[1::-1] != self.size:
                raise InputError(f"{path}: is {times(frame.shape[1::-1])}, the first image is {times(self.size)}")
            yield number, frame


def probe_images(camera: str, pattern: Path, numbers: np.ndarray) -> ImageFootage:
    """The images of those numbers, which must all be there; the first tells the size."""
    for number in numbers.tolist():
        path = _image_path(pattern, number)
        if not path.is_file():
            raise InputError(f"{path}: the image of frame {number} of camera {camera!r} is missing")
    height, width = read_image(_image_path(pattern, int(numbers[0]))).shape[:2]
    return ImageFootage(pattern, numbers, (width, height))


def image_size(pattern: Path) -> tuple[int, int]:
    """Width and height of the first of numbered images.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    name = re.compile(re.sub(r"%(0\d+)?d", r"\\d+", re.escape(pattern.name).replace(r"\%", "%")))
    first = min((path for path in pattern.parent.iterdir() if name.fullmatch(path.name)), default=None)
    if first is None:
        raise InputError(f"{pattern}: there is no such image")
    height, width = read_image(first).shape[:2]
    return width, height


def read_image(path: Path) -> np.ndarray:
    """An image, (H, W, 3) uint8 RGB.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a readable image ({reason(error)}); copy it again") from None


def _image_path(pattern: Path, number: int) -> Path:
    return pattern.with_name(pattern.name % number)
