"""The rat's coat: hooded, as a Long-Evans rat's, on the rodent's skin, which comes without texture coordinates."""

from __future__ import annotations

from typing import Any

import numpy as np

from bkind3d.sims.studio import smooth_noise
from bkind3d.sims.virtual.engine import picture_asset

_TEXELS = 256
_FROM, _TO = -0.25, 0.16  # of the skin along the body, tail to snout, metres
_HOOD = 0.052  # where the dark head and shoulders end, likewise
_RUMP = -0.06  # where the tail begins
_AXIS_HEIGHT = 0.07  # of the trunk
_LIGHT, _DARK, _BARE = np.array([[0.93, 0.90, 0.84], [0.24, 0.19, 0.17], [0.86, 0.68, 0.62]])


def dress(walker: Any, rng: np.random.Generator) -> None:
    """Give the rodent's model a textured skin."""
    skin = walker.find("skin", "skin")
    skin.file.skin = skin.file.skin._replace(texcoords=_coordinates(skin.file.skin.vertices))
    walker.asset.add("texture", name="coat", type="2d", file=picture_asset(_coat(rng)))
    skin.material = walker.asset.add("material", name="coat", texture="coat", specular=0.1, shininess=0.1)


def _coordinates(vertices: np.ndarray) -> np.ndarray:
    """Texture coordinates (V, 2) of vertices (V, 3): place along the body, and around it from back to belly."""
    x, y, z = vertices.T
    return np.stack([(x - _FROM) / (_TO - _FROM), np.abs(np.arctan2(y, z - _AXIS_HEIGHT)) / np.pi], axis=1)


def _coat(rng: np.random.Generator) -> np.ndarray:
    """(N, N, 3) uint8: rows from back to belly, columns from tail to snout."""
    noise = smooth_noise(rng, (_TEXELS, _TEXELS), 25)[..., None] - 0.5
    around, along = np.meshgrid(np.linspace(0, 1, _TEXELS), np.linspace(_FROM, _TO, _TEXELS), indexing="ij")
    around, along = around[..., None], along[..., None]
    stripe = (along > _RUMP) & (around + 0.12 * noise < 0.13)
    dark = stripe | (along + 0.03 * noise > _HOOD)
    # Low at the sides are the paws, the hands under the hood: pale, as they are.
    color = np.where(dark & (around < 0.80), _DARK, np.where(along > _RUMP, _LIGHT, _BARE))
    grain = 1 + 0.12 * (smooth_noise(rng, (_TEXELS, _TEXELS), 3)[..., None] - 0.5)
    return (255 * np.clip(color * grain, 0, 1)).astype(np.uint8)
