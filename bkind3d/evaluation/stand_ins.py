"""What stands in for the truth where there is none: do the keypoints lie on the animal, and does the skeleton fill it?

None of these numbers needs a label. They need masks of the foreground, which a static background gives. A keypoint that
is a part of the body is seen on the foreground by every view, an edge that stands for a bone keeps its length, and a
skeleton that is one covers the silhouette.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bkind3d.agreement import FOREGROUND, in_masks, on_body
from bkind3d.errors import InputError
from bkind3d.evaluation.skeleton_summary import summarise_skeleton
from bkind3d.tables import percent
from bkind3d_kernels import rasterize_edges

RADII = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # pixels
_BATCH = 64  # frames


def label_free(
    positions: np.ndarray,
    projections: np.ndarray,
    masks: np.ndarray,
    edges: np.ndarray,
    radii: Sequence[float] = RADII,
) -> dict[str, Any]:
    """All three numbers of one recording.

    Args:
        positions: (F, J, 3) keypoints, finite, world units.
        projections: (M, 3, 4) world to pixels of the masks.
        masks: (F, M, H, W) uint8, foreground from :data:`~bkind3d.agreement.FOREGROUND` on.
        edges: (E, 2) active edges; E may be 0.
        radii: of the capsules to choose from, in pixels.

    Returns:
        ``frames``, ``views``; ``on_body``, the mean of :func:`~bkind3d.agreement.on_body`, and
        ``on_body_per_keypoint`` (J,);
        ``rigidity``, 1 - the median over the edges of SD / mean of their lengths; ``overlap`` of
        :func:`silhouette_overlap` and its ``radius``. The last three are None without edges.

    Raises:
        InputError: shapes that do not fit, or as :func:`summarise_skeleton`.
    """
    seen = on_body(positions, projections, masks)
    variation = summarise_skeleton(positions, edges)["cv"]
    overlap, radius = silhouette_overlap(positions, projections, masks, edges, radii)
    return {
        "frames": len(masks),
        "views": len(projections),
        "on_body": float(seen.mean()),
        "on_body_per_keypoint": seen.mean(axis=0).tolist(),
        "rigidity": None if variation is None else 1 - variation,
        "overlap": overlap,
        "radius": radius,
    }


@torch.no_grad()
def silhouette_overlap(
    positions: np.ndarray,
    projections: np.ndarray,
    masks: np.ndarray,
    edges: np.ndarray,
    radii: Sequence[float] = RADII,
) -> tuple[float | None, float | None]:
    """How well the edges, drawn as capsules of one radius, cover the silhouettes.

    An edge with an end behind a camera is not drawn there. Arguments as in :func:`label_free`.

    Returns:
        The largest mean Dice coefficient 2 |A ∩ B| / (|A| + |B|) over the pictures with foreground, and its radius in
        pixels; None without edges or foreground.

    Raises:
        InputError: shapes that do not fit, or radii that are not positive.
    """
    pixels, depth = in_masks(positions, projections, masks)
    if not len(radii) or min(radii) <= 0:
        raise InputError(f"radii: expected positive numbers of pixels, got {radii}")
    if not len(edges):
        return None, None
    pairs = torch.as_tensor(np.asarray(edges), dtype=torch.int64)
    pixels, drawn = pixels.float(), (depth > 0)[..., pairs].all(dim=-1).float()  # (F, M, J, 2), (F, M, E)
    dice = torch.cat(
        [
            _dice(pixels[rows].flatten(0, 1), drawn[rows].flatten(0, 1), pairs, masks[rows], radii)
            for rows in (slice(start, start + _BATCH) for start in range(0, len(masks), _BATCH))
        ]
    )
    if not len(dice):
        return None, None
    mean = dice.mean(dim=0)  # (R,)
    best = int(mean.argmax())
    return float(mean[best]), float(radii[best])


def _dice(pixels: Tensor, drawn: Tensor, pairs: Tensor, masks: np.ndarray, radii: Sequence[float]) -> Tensor:
    """Dice coefficients (N, R) of those pictures that have foreground.

    One map of the largest radius serves all: exp(-d²/σ²) is above exp(-r²/σ²) where d < r.
    """
    widest = max(radii)
    body = torch.from_numpy(masks >= FOREGROUND).flatten(0, 1).flatten(1)  # (frames · M, HW)
    kept = body.any(dim=1)
    size = masks.shape[2], masks.shape[3]
    body, near = body[kept], rasterize_edges(pixels[kept], drawn[kept], size, widest, edges=pairs).flatten(1)
    thresholds = torch.exp(-torch.tensor(radii, dtype=near.dtype).div(widest).square())
    dice = []
    for threshold in thresholds:
        inside = near > threshold
        dice.append(2 * (inside & body).sum(dim=1) / (inside.sum(dim=1) + body.sum(dim=1)))
    return torch.stack(dice, dim=1)


def format_label_free(found: Mapping[str, float | None]) -> str:
    """The numbers of :func:`label_free`, and the identity, in one line for the terminal."""
    shares = {name: "-" if value is None else percent(value) for name, value in found.items()}
    return (
        f"without labels: {shares['on_body']} of keypoints and views on the body, {shares['identity']} found again by "
        f"their looks, edges {shares['rigidity']} rigid, silhouette covered {shares['overlap']}"
    )
