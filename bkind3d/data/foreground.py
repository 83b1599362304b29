"""Masks of the body from a static background, on frames of network size.

The cameras stand still, so the room behind the body can be learned and what differs from it is the body:

1. Background. A pixel of some moments well apart shows the room most often, or the body where that rests. Its most
   frequent colours (modes) are found, and of each pixel's modes the one is taken with which the whole picture holds
   together: neighbours were seen at the same moments, and no outline of a body is left. That is a labelling of least
   energy, found by belief propagation.
2. Light. Each frame is divided by its gain against the background, the median ratio of each colour.
3. Difference, in units of each pixel's own noise.
4. Shadow. A pixel that is an even fraction of the background and keeps its texture is not the body.
5. Outline. A pixel at the edge that is a mixture of body and room is the body's if more than half of it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from bkind3d.data.cached import CachedRecording
from bkind3d.data.window import HALF
from bkind3d.errors import InputError

VERSION = 4  # raise it whenever the same frames would give other masks

_SAMPLES = 120  # moments that a background is estimated from
_CANDIDATES = 30  # of them, whose colours may be a mode
_MODES = 4
_LEAST_SHARE = 0.03  # of the moments that a mode must have, beside the first
_RADIUS = 4.0  # standard deviations of noise in which colours are one mode
_SWEEPS = 100  # of belief propagation
_CAP = 40.0  # grey levels: a step between neighbours costs no more
_SEAM = 120.0  # grey levels that two modes of neighbours cost which no sample shows together
_OUTLINE = 0.3  # of the samples that show only one of two modes, from which on the whole step between them counts
_EDGE = 2.0  # times what a step exceeds the room's texture by
_ORDINARY = 0.95  # quantile of the steps of the still room that is its texture
_STILL = 0.9  # of the samples that show a pixel of the still room
_RARITY = 50.0  # cost of a rare mode, over the picture's longest side
_DIFFERENT, _SLACK = 5.0, 6.0  # standard deviations, and grey levels beyond, by which a colour is not the room's
_TINT = 0.025  # of its brightness that a shadow's colour may be off
_DARKEST = 0.4  # share of the light that a shadow leaves at least
_LIKE = 0.2  # of the body's offset that a mixture may be off
_SHARE = 0.45  # of the body's offset that is the body's
_SIZED = 60  # moments of a recording that the size of the body is measured in
_SPECK = 0.0008  # of the picture


@dataclass(frozen=True, eq=False)
class Background:
    """The empty room as the cameras see it.

    Args:
        pictures: (M, H, W, 3) float32, 0 to 255.
        noise: (M, H, W) float32, standard deviation of a channel, grey levels.
    """

    pictures: np.ndarray
    noise: np.ndarray


def pooled_background(recordings: list[np.ndarray]) -> Background:
    """The background that recordings of one rig share, each of frames (T, M, H, W, 3) uint8."""
    ends = np.cumsum([len(frames) for frames in recordings])
    rows = np.unique(np.linspace(0, ends[-1] - 1, min(_SAMPLES, ends[-1])).astype(int))
    places = np.searchsorted(ends, rows, side="right")
    samples = [frames[rows[places == i] - ends[i] + len(frames)] for i, frames in enumerate(recordings)]
    return estimate_background(np.concatenate(samples))


def estimate_background(samples: np.ndarray) -> Background:
    """The background of frames (S, M, H, W, 3) uint8 of well separated moments."""
    views = [_background_of_view(np.ascontiguousarray(samples[:, view])) for view in range(samples.shape[1])]
    return Background(*(np.stack(parts) for parts in zip(*views)))


def _background_of_view(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picture (H, W, 3) and noise (H, W) of one camera's frames (S, H, W, 3) uint8."""
    middle = np.median(samples, axis=0).astype(np.float32)
    even = samples / gains(samples, middle)[:, None, None]
    noise = max(1.4826 * float(np.median(np.abs(even - middle))), 1.0)
    colors, times = _modes(even, _RADIUS * noise * 3**0.5)
    picture = _smoothest(colors, times)
    near = ((even - picture) ** 2).sum(-1) < 3 * (_RADIUS * noise) ** 2  # (S, H, W)
    spread = np.where(near, ((even - picture) ** 2).mean(-1), 0).sum(0) / np.maximum(near.sum(0), 1)
    return picture, np.maximum(np.sqrt(spread), noise).astype(np.float32)


def gains(frames: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Light of frames (..., H, W, 3) against a background (H, W, 3): median ratio of each colour, (..., 3) float32."""
    thin = frames[..., ::2, ::2, :].astype(np.float32) / np.maximum(picture[..., ::2, ::2, :], 8)
    return np.maximum(np.median(thin, axis=(-3, -2)), 0.1).astype(np.float32)


def _modes(samples: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent colours of each pixel, (H, W, K, 3), and which samples (S, H, W, 3) show them, (H, W, K, S)."""
    rows = [_modes_of_pixels(np.ascontiguousarray(row.swapaxes(0, 1)), radius) for row in samples.swapaxes(0, 1)]
    colors, times = zip(*rows)
    return np.stack(colors), np.stack(times)


def _modes_of_pixels(values: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_modes` for pixels (P, S, 3) float32: (P, K, 3) and (P, K, S)."""
    count = values.shape[1]
    squares = (values**2).sum(-1)
    rows = np.unique(np.linspace(0, count - 1, min(_CANDIDATES, count)).astype(int))
    distance = squares[:, rows, None] + squares[:, None] - 2 * values[:, rows] @ values.transpose(0, 2, 1)  # (P, C, S)
    near = (distance < radius**2).astype(np.float32)
    free = np.ones(values.shape[:2], dtype=bool)  # samples of no mode yet
    pixel = np.arange(len(values))
    colors, times = [], []
    for _ in range(_MODES):
        best = (near @ free[:, :, None].astype(np.float32))[..., 0].argmax(-1)
        members = (near[pixel, best] > 0) & free
        color = (members[:, None].astype(np.float32) @ values)[:, 0] / np.maximum(members.sum(-1), 1)[:, None]
        colors.append(color)
        times.append(members)
        free &= ((values - color[:, None]) ** 2).sum(-1) >= (1.5 * radius) ** 2
    return np.stack(colors, 1), np.stack(times, 1)


def _smoothest(colors: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) that holds together best, of modes (H, W, K, 3) that the samples (H, W, K, S) show."""
    shares = times.mean(-1)
    rarity = _RARITY / max(shares.shape[:2])
    cost = (-rarity * np.log(np.maximum(shares, 1e-3))).astype(np.float32)
    cost[..., 1:][shares[..., 1:] < _LEAST_SHARE] = 1e4
    seen = times.astype(np.float32)
    across = _seams(colors[:, :-1], colors[:, 1:], seen[:, :-1], seen[:, 1:])
    down = _seams(colors[:-1], colors[1:], seen[:-1], seen[1:])
    label = _least_energy(np.moveaxis(cost, -1, 0), across, down)
    return np.take_along_axis(colors, label[..., None, None], 2)[:, :, 0].astype(np.float32)


def _seams(first: np.ndarray, second: np.ndarray, seen: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Cost (K, K, ...) of each pair of modes (..., K, 3) of two neighbours, seen by the samples (..., K, S).

    Three things tell the room from a body. What passes by does not keep to its neighbours: two modes cost the share of
    the samples that show the rarer one without the other. What comes and goes has an outline: the step between modes
    costs, the more so the fewer samples show both. And the outline of what rests is sharper than the room's texture:
    what a step exceeds the ordinary ones of the still part of the picture by costs in any case.
    """
    steps = np.minimum(np.abs(first[..., :, None, :] - second[..., None, :, :]).mean(-1), _CAP)
    both = seen @ there.swapaxes(-1, -2)
    one, other = seen.sum(-1)[..., :, None], there.sum(-1)[..., None, :]
    apart = 1 - both / np.maximum(np.minimum(one, other), 1)
    outline = np.minimum((1 - both / np.maximum(one + other - both, 1)) / _OUTLINE, 1)
    still = both[..., 0, 0] > _STILL * seen.shape[-1]
    texture = np.quantile(steps[..., 0, 0][still], _ORDINARY) if still.any() else _CAP
    cost = _SEAM * apart + outline * steps + _EDGE * np.maximum(steps - texture, 0)
    return np.ascontiguousarray(np.moveaxis(cost, (-2, -1), (0, 1)), dtype=np.float32)


def _least_energy(cost: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Labels (H, W) of least energy: cost (K, H, W), steps to the right (K, K, H, W-1) and down (K, K, H-1, W).

    Min-sum belief propagation: every pixel tells its neighbours what each of their labels would cost it.
    """
    cost = np.ascontiguousarray(cost)
    right, left, lower, upper = (np.zeros_like(cost) for _ in range(4))  # messages that arrive from that side
    for _ in range(_SWEEPS):
        belief = cost + right + left + lower + upper
        to_right = _message((belief - right)[:, :, :-1], across)
        to_left = _message((belief - left)[:, :, 1:], across.swapaxes(0, 1))
        to_lower = _message((belief - lower)[:, :-1], down)
        to_upper = _message((belief - upper)[:, 1:], down.swapaxes(0, 1))
        told = (
            (left[:, :, 1:], to_right),
            (right[:, :, :-1], to_left),
            (upper[:, 1:], to_lower),
            (lower[:, :-1], to_upper),
        )
        for message, new in told:
            message += (new - message) / 2  # half of the way, or neighbours that change together never settle
    return (cost + right + left + lower + upper).argmin(0)


def _message(belief: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What each label of the neighbour costs beside its cheapest, (K, ...), from one's own (K, ...) and the steps."""
    told = np.stack(
        [np.minimum.reduce([own + step[k] for own, step in zip(belief, steps)]) for k in range(len(belief))]
    )
    return told - told.min(0)


def foreground_masks(frames: np.ndarray, background: Background) -> np.ndarray:
    """Masks (T, M, H, W) uint8, 255 where frames (T, M, H, W, 3) uint8 show the body and 0 elsewhere."""
    masks = np.empty(frames.shape[:-1], dtype=np.uint8)
    for view in range(frames.shape[1]):
        masks[:, view] = 255 * _masks_of_view(frames[:, view], background.pictures[view], background.noise[view])
    return masks


def _masks_of_view(frames: np.ndarray, picture: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Masks (T, H, W) bool of one camera's frames (T, H, W, 3) against its background (H, W, 3) of noise (H, W)."""
    even = frames / gains(frames, picture)[:, None, None]
    offset = even - picture
    masks = np.einsum("thwc,thwc->thw", offset, offset) > (_DIFFERENT * noise + _SLACK) ** 2
    shadows = _shadows(masks, even, picture, noise)
    masks[shadows] = False
    masks[shadows] = _closed(masks)[shadows]
    masks[_mixtures(masks, offset)] = False
    return _without_specks(masks)


def _shadows(masks: np.ndarray, even: np.ndarray, picture: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where masked pixels are an even fraction of the background: places (t, row, column), each (P,)."""
    places = np.nonzero(masks)
    color, room = even[places], picture[places[1:]]  # (P, 3)
    fraction = (color * room).sum(-1) / np.maximum((room * room).sum(-1), 1)
    tint = np.linalg.norm(color - fraction[:, None] * room, axis=-1)
    even_dark = tint < _TINT * np.linalg.norm(color, axis=-1) + noise[places[1:]]
    shadow = even_dark & (fraction > _DARKEST) & (fraction < 1)
    return tuple(axis[shadow] for axis in places)


def _closed(masks: np.ndarray) -> np.ndarray:
    """Masks (T, H, W) with the gaps filled that are at most two pixels wide."""
    return _grown(masks) & ~_grown(~_grown(masks)) | masks


def _grown(masks: np.ndarray) -> np.ndarray:
    """Masks (T, H, W) and their neighbours to four sides."""
    grown = masks.copy()
    grown[:, 1:] |= masks[:, :-1]
    grown[:, :-1] |= masks[:, 1:]
    grown[:, :, 1:] |= masks[:, :, :-1]
    grown[:, :, :-1] |= masks[:, :, 1:]
    return grown


def _mixtures(masks: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pixels at the outline that are room for about a half or more: places (t, row, column), each (P,).

    Of a mixture the offset from the background, (T, H, W, 3), is a share of that of a pixel of the body near by.
    """
    places = np.nonzero(masks & _grown(~masks))
    own = offset[places]
    mixed = np.zeros(len(own), dtype=bool)
    last = masks.shape[1] - 1, masks.shape[2] - 1
    for down, right in np.ndindex(3, 3):
        near = places[0], np.clip(places[1] + down - 1, 0, last[0]), np.clip(places[2] + right - 1, 0, last[1])
        other = offset[near]
        length = np.einsum("pc,pc->p", other, other)
        share = np.einsum("pc,pc->p", own, other) / np.maximum(length, 1e-6)
        beside = own - share[:, None] * other
        like = np.einsum("pc,pc->p", beside, beside) < (_LIKE**2) * length
        mixed |= masks[near] & like & (share > 0) & (share < _SHARE)
    return tuple(axis[mixed] for axis in places)


def _without_specks(masks: np.ndarray) -> np.ndarray:
    """Masks (T, H, W) without spots of fewer pixels than a share of the picture, at least 4."""
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = True
    spots, count = ndimage.label(masks, within)
    area = np.bincount(spots.ravel(), minlength=count + 1)
    large = area >= max(4, _SPECK * masks[0].size)
    large[0] = False
    return large[spots]


def body_size(recordings: Sequence[CachedRecording], center: Sequence[float]) -> float:
    """Size of the body in world units: the median diagonal of its box in the pictures, as far away as the volume.

    Args:
        recordings: with masks.
        center: of the volume, x, y, z.

    Raises:
        InputError: there is no body in most pictures.
    """
    sizes = []
    for recording in recordings:
        _, depth = recording.cameras.project(torch.tensor([tuple(center)], dtype=torch.float64))
        focal = recording.cameras.intrinsics.diagonal(dim1=1, dim2=2)[:, :2].prod(-1).sqrt()
        units_per_pixel = (depth[:, 0] / focal).numpy()  # (M,)
        for row in np.linspace(0, len(recording) - 1, min(len(recording), _SIZED)).astype(int):
            for mask, unit in zip(recording.masks[row] > HALF, units_per_pixel):
                y, x = np.nonzero(mask)
                sizes.append(math.hypot(np.ptp(x) + 1, np.ptp(y) + 1) * unit if len(y) else 0.0)
    size = float(np.median(sizes))
    if not size > 0:
        raise InputError(
            "foreground: most pictures show no body before the background; see `bkind3d check`, give `masks` in the "
            "project file, or set data.foreground to false"
        )
    return size
