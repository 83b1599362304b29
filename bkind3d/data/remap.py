"""From a raw video frame straight to an undistorted frame of network size, in one resampling."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from bkind3d.cameras import Cameras
from bkind3d.data.volume import Volume
from bkind3d.errors import InputError

Box = tuple[int, int, int, int]  # x, y, width, height in pixels of the undistorted image


def volume_boxes(cameras: Cameras, volume: Volume, height: int, width: int) -> list[Box]:
    """For each camera the box around the volume's projection, in pixels of its undistorted image.

    The box ends where the image ends, is then widened to the aspect of (height, width), and kept inside the image if
    it fits. A camera inside or behind the volume keeps its whole image, one that does not see the volume likewise.
    """
    pinhole = cameras.pinhole()
    corners, depth = pinhole.project(volume.corners())  # (M, 8, 2), (M, 8)
    image_low, image_high = _undistorted_bounds(cameras)
    boxes = []
    for index in range(len(cameras)):
        low, high = image_low[index], image_high[index]
        if (depth[index] > 0).all():
            seen_low = torch.maximum(corners[index].amin(0), low)
            seen_high = torch.minimum(corners[index].amax(0), high)
            if (seen_low < seen_high).all():
                boxes.append(_widened(seen_low, seen_high, low, high, width / height))
                continue
        boxes.append(_widened(low, high, low, high, width / height))
    return boxes


def image_boxes(cameras: Cameras, height: int, width: int) -> list[Box]:
    """For each camera the whole image, widened to the aspect of (height, width)."""
    boxes = []
    for size in cameras.image_size.double():
        low, high = torch.zeros(2, dtype=torch.float64), size - 1
        boxes.append(_widened(low, high, low, high, width / height))
    return boxes


def network_cameras(cameras: Cameras, boxes: list[Box], height: int, width: int) -> Cameras:
    """The pinhole cameras of undistorted images cropped to the boxes and resized to (height, width)."""
    return cameras.pinhole().crop(boxes).resize(width, height)


class Remap:
    """Undistorts, crops and shrinks the frames of one camera, in one step.

    Each pixel of the result is the mean over s × s bilinear samples of the raw frame, s the shrinking factor rounded
    up, so that fine texture does not alias. What lies outside the raw image is black. All of that is linear and the
    same for every frame, so it is kept as one sparse matrix from raw pixels to network pixels.

    Args:
        camera: one camera of the raw video.
        network: the same camera as :func:`network_cameras` gives it.
    """

    def __init__(self, camera: Cameras, network: Cameras) -> None:
        if len(camera) != 1 or len(network) != 1:
            raise InputError("Remap: takes one camera at a time")
        self.width, self.height = network.image_size[0].tolist()
        self._weights = _area_weights(camera, network)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Raw frame (H, W, 3) uint8 to network frame (height, width, 3) uint8."""
        pixels = self._weights @ frame.reshape(-1, 3).astype(np.float32)
        return np.rint(pixels).astype(np.uint8).reshape(self.height, self.width, 3)


def _area_weights(camera: Cameras, network: Cameras) -> sparse.csr_array:
    """Weights (height · width, H · W) float32 of the raw pixels in each network pixel; rows inside sum to 1."""
    width, height = network.image_size[0].tolist()
    raw_width, raw_height = camera.image_size[0].tolist()
    factor = _shrinking(camera, network)
    raw = _sample_positions(camera, network, factor)  # (s·height, s·width, 2), x and y
    inside = ((raw >= -0.5) & (raw <= np.array([raw_width, raw_height]) - 0.5)).all(-1)  # NaN compares false
    y, x = np.nonzero(inside)
    target = (y // factor) * width + x // factor
    raw = raw[inside]
    corner = np.floor(raw)
    fraction = raw - corner
    total = sparse.csr_array((height * width, raw_height * raw_width), dtype=np.float32)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = np.abs(1 - dx - fraction[:, 0]) * np.abs(1 - dy - fraction[:, 1]) / factor**2
        column = np.clip(corner[:, 0] + dx, 0, raw_width - 1)  # the outermost half pixel repeats the border
        row = np.clip(corner[:, 1] + dy, 0, raw_height - 1)
        source = (row * raw_width + column).astype(np.int32)
        total += sparse.csr_array((weight.astype(np.float32), (target.astype(np.int32), source)), shape=total.shape)
    return total


def _sample_positions(camera: Cameras, network: Cameras, factor: int) -> np.ndarray:
    """Raw pixels (factor · height, factor · width, 2) at the network's sub-pixels; NaN beyond the lens model."""
    width, height = (network.image_size[0] * factor).tolist()
    fine = network.resize(width, height)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)], dim=-1).double()
    undistorted = pixels @ (camera.intrinsics[0] @ torch.linalg.inv(fine.intrinsics[0])).T
    return camera.distort_points(undistorted[None, ..., :2])[0].numpy()


def _undistorted_bounds(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Least and greatest x, y (M, 2) that each image reaches once undistorted."""
    lows, highs = [], []
    for index, name in enumerate(cameras.names):
        width, height = cameras.image_size[index].tolist()
        x, y = torch.arange(width).double(), torch.arange(height).double()
        border = torch.cat(
            [
                torch.stack([x, torch.zeros_like(x)], -1),
                torch.stack([x, torch.full_like(x, height - 1)], -1),
                torch.stack([torch.zeros_like(y), y], -1),
                torch.stack([torch.full_like(y, width - 1), y], -1),
            ]
        )
        undistorted = cameras.select([name]).undistort_points(border[None])[0]
        solved = undistorted[~undistorted.isnan().any(-1)]
        if len(solved) == 0:
            raise InputError(f"camera {name!r}: its lens model has no inverse at the image border; calibrate it again")
        lows.append(solved.amin(0))
        highs.append(solved.amax(0))
    return torch.stack(lows), torch.stack(highs)


def _widened(low: Tensor, high: Tensor, image_low: Tensor, image_high: Tensor, aspect: float) -> Box:
    """The pixels from low to high (2,), widened to width/height = aspect, moved into the image where that is enough."""
    first = low.floor()
    size = high.ceil() - first + 1
    wanted = torch.stack([torch.maximum(size[0], size[1] * aspect), torch.maximum(size[1], size[0] / aspect)]).ceil()
    start = (first - (wanted - size) / 2).round()
    last_start = image_high.ceil() - wanted + 1
    start = torch.where(last_start >= image_low.floor(), start.clamp(image_low.floor(), last_start), start)
    x, y, width, height = torch.cat([start, wanted]).long().tolist()
    return x, y, width, height


def _shrinking(camera: Cameras, network: Cameras) -> int:
    """Raw pixels per network pixel along the denser axis, rounded up, at least 1."""
    scale = camera.intrinsics[0].diagonal()[:2] / network.intrinsics[0].diagonal()[:2]
    return max(1, math.ceil(scale.max().item() - 1e-6))
