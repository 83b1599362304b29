"""A small renderer for a body of tapered capsules in a static room, in NumPy.

Each capsule is tested only against the rays inside its own box on the screen. All (capsule, ray) pairs of a frame, the
fragments, lie in one flat array, so a frame is a fixed number of array operations, and a z-buffer keeps the nearest
hit. The animal is drawn at SUPERSAMPLE² rays per pixel and averaged onto the room, which is drawn once per camera.
Rays are given per camera, so lens distortion costs nothing: it is in the rays and in the boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bkind3d.sims.simulate.body import CAPSULES
from bkind3d.sims.studio import Sensor, smooth_noise

Project = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

SUPERSAMPLE = 2
_SUN = np.array([0.42, 0.28, 0.86]) / np.linalg.norm([0.42, 0.28, 0.86])  # towards the light
_REACH = 1.15  # a sphere seen obliquely covers more than focal * radius / depth
_ROOM = 2.6, 2.4  # half width and height of the room, metres
# Direction towards the light, width of the shadow against the body's, share of light lost: the sun, and the open sky.
_SHADOWS = ((_SUN, 1.25, 0.42), (np.array([0.0, 0.0, 1.0]), 1.9, 0.28))


@dataclass(frozen=True)
class View:
    """What a camera needs to render: float32 rays and the size of a metre at unit depth."""

    center: np.ndarray  # (3,) metres
    rays: np.ndarray  # (3, H * s, W * s) unit directions in the world, s = SUPERSAMPLE
    focal: float  # pixels

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        return self.rays.shape[1] // SUPERSAMPLE, self.rays.shape[2] // SUPERSAMPLE


@dataclass(frozen=True)
class Fragments:
    """All (capsule, ray) pairs that may meet, capsule by capsule: `counts` (K,) of them each, flat ray indices (F,)."""

    counts: np.ndarray
    pixel: np.ndarray

    def spread(self, values: np.ndarray) -> np.ndarray:
        """One value per capsule (K,) to one per fragment (F,)."""
        return np.repeat(values, self.counts)


@dataclass(frozen=True)
class Hits:
    """The nearest surface per ray, only for rays that hit: flat arrays (V,) or (V, 3)."""

    row: np.ndarray
    column: np.ndarray
    capsule: np.ndarray
    depth: np.ndarray  # along the ray, metres
    ray: np.ndarray
    point: np.ndarray
    normal: np.ndarray
    along: np.ndarray  # 0 at the capsule's first end .. 1 at its second


def cover(ends: np.ndarray, depth: np.ndarray, radii: np.ndarray, focal: float, size: tuple[int, int]) -> Fragments:
    """The fragments of capsules on a screen of `size` (height, width): pixels near enough to the projected axis.

    `ends` (K, 2, 2) are the projected ends in pixels, `depth` and `radii` (K, 2) in metres.
    """
    reach = (_REACH * focal * radii / depth).max(axis=1) + 1.0  # (K,)
    limit = np.array([size[1], size[0]])
    low = np.clip(np.ceil(ends.min(axis=1) - reach[:, None]), 0, limit).astype(np.int64)
    high = np.clip(np.floor(ends.max(axis=1) + reach[:, None]) + 1, 0, limit).astype(np.int64)
    columns, rows = (high - low).T
    counts = columns * rows
    box = Fragments(counts, np.empty(0))
    local = np.arange(counts.sum()) - box.spread(np.cumsum(counts) - counts)
    row, column = np.divmod(local, box.spread(np.maximum(columns, 1)))
    row += box.spread(low[:, 1])
    column += box.spread(low[:, 0])
    squared, _ = _to_segment(column.astype(np.float32), row.astype(np.float32), ends.astype(np.float32), box)
    near = squared <= box.spread((reach**2).astype(np.float32))
    owner = box.spread(np.arange(len(counts)))[near]
    return Fragments(np.bincount(owner, minlength=len(counts)), (row * size[1] + column)[near])


def _to_segment(x: np.ndarray, y: np.ndarray, ends: np.ndarray, part: Fragments) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance (F,) of points to their capsule's axis in the plane, `ends` (K, 2, 2), and where on it (F,)."""
    axis = ends[:, 1] - ends[:, 0]
    scaled = axis / np.maximum((axis**2).sum(axis=1, keepdims=True), 1e-9)
    x = x - part.spread(ends[:, 0, 0])
    y = y - part.spread(ends[:, 0, 1])
    along = np.clip(x * part.spread(scaled[:, 0]) + y * part.spread(scaled[:, 1]), 0, 1)
    x -= along * part.spread(axis[:, 0])
    y -= along * part.spread(axis[:, 1])
    return x * x + y * y, along


def intersect(
    center: np.ndarray, rays: np.ndarray, part: Fragments, ends: np.ndarray, radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (F,) along each ray to its tapered capsule (inf: missed) and where on the axis (F,) in [0, 1].

    `rays` (3, F) unit directions from `center` (3,); `ends` (K, 2, 3); `radii` (K, 2); all float32.

    A sphere slides along the unit axis w from a to b with radius r_a + k y. With c² = 1 - k², the surface that it
    sweeps is c²|p - a|² = (y + k r_a)² + c² r_a², y = (p - a)·w, touched by the sphere at s = (y + k r_a) / c²: a
    quadratic along the ray, valid where s is in [0, length]. The nearest of this and the two end spheres counts.
    """
    length = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
    axis = (ends[:, 1] - ends[:, 0]) / length[:, None]
    taper = (radii[:, 1] - radii[:, 0]) / length
    c2 = 1 - taper**2
    offset = center - ends  # (K, 2, 3)
    shifted = (offset[:, 0] * axis).sum(axis=1) + taper * radii[:, 0]  # y + k r_a at the ray's origin
    constant = c2 * (offset[:, 0] ** 2).sum(axis=1) - shifted**2 - c2 * radii[:, 0] ** 2
    beyond = (offset**2).sum(axis=2) - radii**2  # (K, 2): squared length of the tangents to the end spheres

    def dot(vectors: np.ndarray) -> np.ndarray:
        x, y, z = (part.spread(component) for component in vectors.T)
        return rays[0] * x + rays[1] * y + rays[2] * z

    slope, to_first = dot(axis), dot(offset[:, 0])
    span, c2, shifted = part.spread(length), part.spread(c2), part.spread(shifted)
    a = c2 - slope * slope
    b = c2 * to_first - shifted * slope
    root = b * b - a * part.spread(constant)

    def sphere(half: np.ndarray, tangent: np.ndarray) -> np.ndarray:
        return -half - np.sqrt(half * half - part.spread(tangent))

    with np.errstate(divide="ignore", invalid="ignore"):  # NaN: the ray misses
        cone = (-b - np.sqrt(root)) / a  # the crossing inwards, whatever the sign of a
        s = (shifted + cone * slope) / c2
        cone[~((s >= 0) & (s <= span))] = np.inf
        first = sphere(to_first, beyond[:, 0])
        second = sphere(to_first - span * slope, beyond[:, 1])  # (o - b)·d = (o - a)·d - length w·d
    cap = np.fmin(first, second)
    distance = np.fmin(cone, cap)
    along = np.where(cone <= np.fmin(cap, np.inf), s / span, second == cap)
    distance[~(distance > 0)] = np.inf
    return distance, along.astype(np.float32)


def trace(view: View, ends: np.ndarray, pixels: np.ndarray, depth: np.ndarray, radii: np.ndarray) -> Hits:
    """Nearest hits of the capsules with `ends` (K, 2, 3), projected to `pixels` (K, 2, 2) of the picture at `depth`.

    Rows and columns of the result count supersampled rays.
    """
    s = SUPERSAMPLE
    part = cover((pixels + 0.5) * s - 0.5, depth, radii, view.focal * s, view.rays.shape[1:])
    flat = view.rays.reshape(3, -1)
    distance, along = intersect(view.center, flat[:, part.pixel], part, ends, radii)
    nearest = np.full(flat.shape[1], np.inf, dtype=np.float32)
    np.minimum.at(nearest, part.pixel, distance)
    winner = np.full(flat.shape[1], -1)
    first = np.flatnonzero((distance == nearest[part.pixel]) & (distance < np.inf))
    winner[part.pixel[first]] = first  # of equally near ones, the last
    keep = winner[np.flatnonzero(winner >= 0)]
    pixel, capsule, along = part.pixel[keep], part.spread(np.arange(len(ends)))[keep], along[keep]
    ray = flat[:, pixel].T
    point = view.center + distance[keep, None] * ray
    touched = ends[capsule, 0] + along[:, None] * (ends[capsule, 1] - ends[capsule, 0])
    radius = radii[capsule, 0] + along * (radii[capsule, 1] - radii[capsule, 0])
    row, column = np.divmod(pixel, view.rays.shape[2])
    return Hits(row, column, capsule, distance[keep], ray, point, (point - touched) / radius[:, None], along)


class Fur:
    """Colour of the body: gradients along each capsule, a paler belly, and a solid noise carved by the surface."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.noise = smooth_noise(rng, (48, 48, 48), 3)

    def shade(self, hits: Hits, ends: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """(V, 3) colours in [0, 1]; `ends` (K, 2, 3), `frames` (F, 3, 3) the trunk frames."""
        capsule, up = hits.capsule, frames[CAPSULES.frames, :, 2].astype(np.float32)
        colors = CAPSULES.colors[capsule]
        color = colors[:, 0] + hits.along[:, None] * (colors[:, 1] - colors[:, 0])
        back = np.einsum("vi,vi->v", hits.normal, up[capsule])
        belly = np.clip(-1.4 * back - 0.3, 0, 0.45)[:, None]
        color = color + belly * (np.float32(0.8) - color)
        local = hits.point - ends[capsule, 0]
        turned = np.einsum("vi,vij->vj", local, frames[CAPSULES.frames].astype(np.float32)[capsule])
        cell = (turned * 260.0 + 7.0 * capsule[:, None]).astype(np.int64) % 48
        color = color * (0.8 + 0.4 * self.noise[cell[:, 0], cell[:, 1], cell[:, 2]])[:, None]
        sun = np.clip(hits.normal @ _SUN.astype(np.float32), 0, None)
        sky = 0.5 + 0.5 * hits.normal[:, 2]
        rim = (1.0 + np.einsum("vi,vi->v", hits.normal, hits.ray)) ** 3
        light = 0.30 + 0.30 * sky + 0.62 * sun
        return color * light[:, None] + 0.10 * rim[:, None]


def background(view: View, seed: int) -> np.ndarray:
    """The empty room (H, W, 3) float32 in [0, 1]: a stained, tiled floor and four walls with broad bands."""
    rng = np.random.default_rng(seed)
    fine, coarse = smooth_noise(rng, (256, 256), 2), smooth_noise(rng, (256, 256), 11)
    half, tall = _ROOM
    rays = np.moveaxis(view.rays, 0, -1).astype(np.float64)
    with np.errstate(divide="ignore"):
        to_floor = np.where(rays[..., 2] < 0, -view.center[2] / rays[..., 2], np.inf)
        to_walls = (np.sign(rays[..., :2]) * half - view.center[:2]) / rays[..., :2]
        to_ceiling = np.where(rays[..., 2] > 0, (tall - view.center[2]) / rays[..., 2], np.inf)
    distances = np.stack([to_floor, to_walls[..., 0], to_walls[..., 1], to_ceiling], axis=-1)
    surface = distances.argmin(axis=-1)
    point = view.center + distances.min(axis=-1)[..., None] * rays

    u = np.where(surface == 1, point[..., 1], point[..., 0])
    v = np.where((surface == 0) | (surface == 3), point[..., 1], point[..., 2])

    def stain(texture: np.ndarray, scale: float) -> np.ndarray:
        return texture[(u * scale).astype(np.int64) % 256, (v * scale).astype(np.int64) % 256]

    grain = 0.6 * stain(coarse, 90.0) + 0.4 * stain(fine, 110.0)
    tile = (np.floor(u / 0.3) + np.floor(v / 0.3)) % 2
    seam = np.minimum(np.abs(u / 0.3 - np.round(u / 0.3)), np.abs(v / 0.3 - np.round(v / 0.3))) < 0.02
    floor = (0.60 + 0.05 * tile - 0.10 * seam)[..., None] * np.array([1.0, 0.96, 0.88])
    band = 0.46 + 0.06 * (np.floor(v / 0.4) % 2) + 0.05 * np.sin(3.0 * u)
    sides = np.where(np.where(surface == 1, point[..., 0], point[..., 1]) > 0, 0, 1) + 2 * (surface == 2)
    tints = np.array([[0.80, 0.92, 1.05], [1.0, 0.90, 0.82], [0.86, 1.0, 0.86], [0.96, 0.88, 1.02]])
    picture = np.where((surface == 0)[..., None], floor, band[..., None] * tints[sides])
    picture = picture * (0.82 + 0.32 * grain)[..., None]
    return _average(picture.astype(np.float32))


def _average(picture: np.ndarray) -> np.ndarray:
    """Mean over SUPERSAMPLE² rays: (H * s, W * s, C) to (H, W, C)."""
    s = SUPERSAMPLE
    samples = [picture[i::s, j::s] for i in range(s) for j in range(s)]
    return np.add.reduce(samples) / (s * s)


def floor_points(view: View) -> np.ndarray:
    """Where the middle of each pixel meets the floor: (2, H * W) metres; far away where it does not."""
    x, y, z = _average(np.moveaxis(view.rays, 0, -1)).reshape(-1, 3).T
    distance = view.center[2] / np.maximum(-z, 1e-3)
    return np.stack([view.center[0] + distance * x, view.center[1] + distance * y])


def shadow(floor: np.ndarray, part: Fragments, ends: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Share of light lost per pixel (H * W): a soft disc slides along each capsule's shadow.

    `floor` (2, H * W) where each pixel meets the floor, `ends` (K, 2, 2) the shadow's ends there, `radii` (K, 2).
    """
    squared, along = _to_segment(floor[0, part.pixel], floor[1, part.pixel], ends, part)
    width = part.spread(radii[:, 0]) + along * part.spread(radii[:, 1] - radii[:, 0])
    dark = np.maximum(1 - squared / (width * width), 0)
    lost = np.zeros(floor.shape[1], dtype=np.float32)
    np.maximum.at(lost, part.pixel, dark)
    return lost


class Film:
    """Pictures of a moving body through one camera.

    Args:
        view: the camera's rays.
        points: (T, P, 3) float64, metres, in the order of body.POINTS.
        frames: (T, F, 3, 3) trunk frames.
        project: world points (..., 3) to pixels (..., 2), lens included, and depths (...).
        room_seed: of the room's textures, the same for all cameras.
        sensor_seed: of this camera's noise; picture i draws from (sensor_seed, i) alone.
    """

    def __init__(
        self, view: View, points: np.ndarray, frames: np.ndarray, project: Project, room_seed: int, sensor_seed: int
    ) -> None:
        self.view, self.frames = view, frames
        self.ends = points[:, CAPSULES.ends].astype(np.float32)  # (T, K, 2, 3)
        self.pixels, self.depth = (values[:, CAPSULES.ends] for values in project(points))
        self.shadows = []
        for direction, softness, strength in _SHADOWS:
            fallen = points - points[..., 2:] * (direction / direction[2])
            pixels, depth = (values[:, CAPSULES.ends] for values in project(fallen))
            ends = fallen[:, CAPSULES.ends, :2].astype(np.float32)
            self.shadows.append((ends, pixels, depth, CAPSULES.radii * softness, strength))
        self.room = 255 * background(view, room_seed)
        self.floor = floor_points(view)
        self.fur = Fur(room_seed)
        self.sensor = Sensor(self.room.shape, sensor_seed)

    def __len__(self) -> int:
        return len(self.ends)

    def hits(self, i: int) -> Hits:
        """What each ray of picture i meets."""
        return trace(self.view, self.ends[i], self.pixels[i], self.depth[i], CAPSULES.radii)

    def parts(self, i: int) -> np.ndarray:
        """Nearest capsule per ray of picture i: (H * s, W * s) int16, -1 where the room is seen."""
        hits = self.hits(i)
        out = np.full(self.view.rays.shape[1:], -1, dtype=np.int16)
        out[hits.row, hits.column] = hits.capsule
        return out

    def picture(self, i: int) -> np.ndarray:
        """Picture i as the sensor gives it: (H, W, 3) uint8."""
        image = self.room * self._light(i)[..., None]
        hits = self.hits(i)
        if len(hits.row):
            self._paint(image, hits, self.fur.shade(hits, self.ends[i], self.frames[i]))
        return self.sensor.expose(image, i)

    def _light(self, i: int) -> np.ndarray:
        """Share of light that is left on the room (H, W)."""
        light = np.ones(self.floor.shape[1], dtype=np.float32)
        for ends, pixels, depth, radii, strength in self.shadows:
            part = cover(pixels[i], depth[i], radii, self.view.focal, self.view.size)
            light *= 1 - strength * shadow(self.floor, part, ends[i], radii)
        return light.reshape(self.view.size)

    @staticmethod
    def _paint(image: np.ndarray, hits: Hits, color: np.ndarray) -> None:
        """Average the samples of each pixel onto `image`, in place."""
        s = SUPERSAMPLE
        top, left = hits.row.min() // s, hits.column.min() // s
        height, width = hits.row.max() // s + 1 - top, hits.column.max() // s + 1 - left
        samples = np.zeros((height * s, width * s, 4), dtype=np.float32)
        samples[hits.row - top * s, hits.column - left * s, :3] = color
        samples[hits.row - top * s, hits.column - left * s, 3] = 1.0
        mean = _average(samples)
        patch = image[top : top + height, left : left + width]
        patch *= 1.0 - mean[..., 3:]
        patch += 255 * mean[..., :3]
