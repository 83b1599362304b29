"""Are the keypoints parts of the body? Where they lie on the true skeleton, and whether they stay with one part of it.

A regression reads posture out of points that merely follow the outline of the body. A part of the body lies near a
bone, in every frame near the same joint, and no two parts share one joint. All distances are in *body sizes*: divided
by the median over the frames of the diagonal of the axis-aligned box around the true joints.

No number stands alone: beside the networks stand points fixed to random places of the true bones, which are parts by
construction, and the outline of the true joints, which follows the body and is no part of it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from bkind3d.errors import InputError
from bkind3d.evaluation.skeleton_summary import bone_agreement, bone_distances
from bkind3d.tables import align, percent

RANDOM_POINTS = "random fixed points of the body"
OUTLINE_POINTS = "outline points"
DRAWS = 20  # of the random fixed points
COVERED = 0.15  # body sizes: a joint is covered when some keypoint is nearer than this on average

DISTANCES = {"nearest_bone": "nearest bone", "best_joint": "best joint", "one_to_one": "one to one"}
SHARES = {"same": "same joint", "same_unsided": "left = right", "covered": "joints covered"}

# A joint's name with left in it, and the same of the right; a match counts only where both joints exist.
_SIDES = (("^L", "R"), ("L$", "R"), ("^l", "r"), ("l$", "r"), ("Left", "Right"), ("left", "right"), ("LEFT", "RIGHT"))


@dataclass(frozen=True, eq=False)
class Body:
    """The true skeleton that keypoints are compared with; see :func:`body_of`.

    Attributes:
        joints: (F, K, 3) in the unit of the truth; wholly NaN where a coordinate is missing.
        bones: (B, 2) pairs of joints.
        apart: (K, K) bones between two joints.
        size: Body size, in the unit of the truth.
        unsided: (K,) number of each joint, where left and right ones have the same.
    """

    joints: np.ndarray
    bones: np.ndarray
    apart: np.ndarray
    size: float
    unsided: np.ndarray


def body_of(joints: np.ndarray, bones: np.ndarray, mirror: np.ndarray | None = None) -> Body:
    """Check a true skeleton and measure its size.

    Args:
        joints: (F, K, 3), NaN where not annotated.
        bones: (B, 2) pairs of joints; B may be 0.
        mirror: (P, 2) pairs of a left and a right joint, of :func:`mirror_pairs`.

    Raises:
        InputError: shapes that do not fit, a bone between joints that do not exist, or no frame with two annotated
            joints at different places.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[2] != 3:
        raise InputError(f"joints: expected shape (F, K, 3), got {joints.shape}")
    joints = np.where(np.isfinite(joints).all(axis=2, keepdims=True), joints, np.nan)
    unsided = np.arange(joints.shape[1])
    for left, right in np.asarray([] if mirror is None else mirror, dtype=np.int64).reshape(-1, 2):
        unsided[right] = left
    bones = np.asarray(bones, dtype=np.int64).reshape(-1, 2)
    return Body(joints, bones, bone_distances(bones, joints.shape[1]), body_size(joints), unsided)


def body_size(joints: np.ndarray) -> float:
    """Median over the frames of the diagonal of the joints' box; joints (F, K, 3), a missing one NaN in all places.

    Raises:
        InputError: no frame has two annotated joints, or they coincide in most frames.
    """
    seen = joints[np.isfinite(joints[..., 0]).sum(axis=1) >= 2]
    size = float(np.median(np.linalg.norm(np.nanmax(seen, 1) - np.nanmin(seen, 1), axis=1))) if len(seen) else 0.0
    if size == 0:
        raise InputError("joints: the body has no size; two annotated joints apart from each other are needed")
    return size


def mirror_pairs(names: Sequence[str]) -> np.ndarray:
    """(P, 2) pairs of joints whose names differ in left and right alone: knee_left, LKnee, KneeL, knee_l and the like.

    A name that has no counterpart, such as SpineL beside SpineM, is in no pair.
    """
    index = {name: k for k, name in enumerate(names)}
    swapped = [(k, re.sub(left, right, name)) for k, name in enumerate(names) for left, right in _SIDES]
    pairs = {(k, index[other]) for k, other in swapped if other != names[k] and other in index}
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def measure_parts(keypoints: np.ndarray, body: Body) -> dict[str, Any]:
    """How far keypoints are parts of the body.

    Joints that are not annotated in a frame, and bones with a missing end, take no part in it.

    Args:
        keypoints: (F, J, 3) in the unit of the truth; a frame is left out for a keypoint that is NaN there.
        body: the truth, with the same F.

    Returns:
        ``keypoints`` J, and, distances in body sizes and shares from 0 to 1:

        - ``nearest_bone``: mean distance to the nearest point of any bone, or to the nearest joint where that is nearer
          (an isolated joint, or a truth without bones);
        - ``best_joint``: mean over the keypoints of the least mean distance to one joint;
        - ``one_to_one``: mean distance to a joint of its own, that assignment of joints which makes it least. With
          more keypoints than joints only as many as there are joints get one, their number being ``assigned``, and
          the mean is over them;
        - ``same``: median over the keypoints of the share of frames in which the nearest joint is the usual one;
          ``same_unsided``: the same with left and right joints taken as one;
        - ``covered``: share of the joints that have a keypoint nearer than :data:`COVERED` on average.

        ``per_keypoint`` has lists of J entries: ``nearest_bone``, ``same`` and ``same_unsided`` as above;
        ``best_joint`` and ``best_joint_distance``; ``own_joint`` and ``own_joint_distance`` of the assignment, None
        where it has none; and ``usual_joint``, the one that is nearest most often.

    Raises:
        InputError: shapes that do not fit, or a keypoint that is in no frame together with a joint.
    """
    keypoints = np.asarray(keypoints, dtype=np.float64)
    if keypoints.ndim != 3 or keypoints.shape[2] != 3 or 0 in keypoints.shape or len(keypoints) != len(body.joints):
        raise InputError(f"keypoints: expected shape ({len(body.joints)}, J, 3), got {keypoints.shape}")
    tracks = [_measure_track(keypoints[:, j], body) for j in range(keypoints.shape[1])]
    distance = np.stack([track.pop("distance") for track in tracks])  # (J, K), infinite where never seen together
    own = _one_to_one(distance)
    per_keypoint = {name: [track[name] for track in tracks] for name in tracks[0]} | {
        "best_joint": distance.argmin(axis=1).tolist(),
        "best_joint_distance": distance.min(axis=1).tolist(),
        "own_joint": [own.get(j) for j in range(len(tracks))],
        "own_joint_distance": [float(distance[j, own[j]]) if j in own else None for j in range(len(tracks))],
    }
    annotated = np.isfinite(body.joints[..., 0]).any(axis=0)
    return {
        "keypoints": len(tracks),
        "assigned": len(own),
        "nearest_bone": float(np.mean(per_keypoint["nearest_bone"])),
        "best_joint": float(np.mean(per_keypoint["best_joint_distance"])),
        "one_to_one": float(np.mean([distance[j, k] for j, k in own.items()])),
        "same": float(np.median(per_keypoint["same"])),
        "same_unsided": float(np.median(per_keypoint["same_unsided"])),
        "covered": float((distance.min(axis=0) < COVERED)[annotated].mean()),
        "per_keypoint": per_keypoint,
    }


def compare_parts(
    predictions: Mapping[str, np.ndarray],
    joints: np.ndarray,
    bones: np.ndarray,
    joint_names: Sequence[str],
    *,
    units: str,
    edges: np.ndarray,
    seed: int = 0,
) -> dict[str, Any]:
    """The table of :func:`measure_parts`, with the two kinds of points that need no network added.

    Args:
        predictions: name -> keypoints (F, J, 3); the first is the one that the edges belong to, and there are as many
            random fixed points as it has keypoints.
        joints: (F, K, 3), NaN where not annotated.
        bones: (B, 2) pairs of joints; B may be 0.
        joint_names: K names, by which left and right joints find each other.
        units: unit of length of the joints.
        edges: (E, 2) active edges; E may be 0.
        seed: of the random fixed points.

    Returns:
        ``size`` in ``units``, ``frames``, ``covered_within``, ``mirror`` (pairs of left and right joints), ``bones``
        (their number), ``rows``; and ``edges``, None without bones: the number of ``edges``, and for the usual nearest
        joint of each keypoint what :func:`bkind3d.evaluation.skeleton_summary.bone_agreement` tells. The row of random
        points has means over its ``draws``, and nothing per keypoint.

    Raises:
        InputError: as :func:`body_of` and :func:`measure_parts`.
    """
    mirror = mirror_pairs(joint_names)
    body = body_of(joints, bones, mirror)
    rows = [{"name": name} | measure_parts(keypoints, body) for name, keypoints in predictions.items()]
    found = rows[0]
    rows.append({"name": RANDOM_POINTS} | _random_row(body, found["keypoints"], seed))
    rows.append({"name": OUTLINE_POINTS} | measure_parts(outline_points(body), body))
    usual = np.array(found["per_keypoint"]["usual_joint"])
    return {
        "size": body.size,
        "units": units,
        "frames": len(body.joints),
        "covered_within": COVERED,
        "mirror": mirror.tolist(),
        "bones": len(body.bones),
        "rows": rows,
        "edges": {"edges": len(edges)} | bone_agreement(edges, usual, body.apart) if len(body.bones) else None,
    }


def random_points(body: Body, count: int, rng: np.random.Generator) -> np.ndarray:
    """(F, count, 3): each a fixed place of a random bone, uniform over the bones, then along it; NaN with an end of it.

    Without bones: random joints.
    """
    segments = body.bones if len(body.bones) else np.repeat(np.arange(body.joints.shape[1])[:, None], 2, axis=1)
    ends = body.joints[:, segments]  # (F, B, 2, 3)
    there = np.flatnonzero(np.isfinite(ends).all(axis=(2, 3)).any(axis=0))
    chosen, along = rng.choice(there, count), rng.uniform(size=(count, 1))
    return (1 - along) * ends[:, chosen, 0] + along * ends[:, chosen, 1]


def outline_points(body: Body) -> np.ndarray:
    """(F, 6, 3): in each frame the joints that lie farthest along +x, -x, +y, -y, +z and -z; NaN without joints."""
    signed = np.stack([body.joints, -body.joints], axis=3).reshape(*body.joints.shape[:2], 6)
    farthest = np.where(np.isnan(signed), -np.inf, signed).argmax(axis=1)  # (F, 6)
    return np.take_along_axis(body.joints, farthest[..., None], axis=1)


def format_parts(document: Mapping[str, Any]) -> str:
    """The table of :func:`compare_parts` and a sentence on the edges, as text for the terminal."""
    head = ["", *DISTANCES.values(), *SHARES.values()]
    body = [
        [row["name"], *(f"{row[name]:.3f}" for name in DISTANCES), *(percent(row[name]) for name in SHARES)]
        for row in document["rows"]
    ]
    return "\n".join([describe_parts(document), *align(head, body), *describe_part_edges(document["edges"])])


def describe_parts(document: Mapping[str, Any]) -> str:
    """What the numbers of the table are."""
    bones = "" if document["bones"] else "; the truth has no bones, so the nearest bone is the nearest joint"
    return (
        f"parts of the body over {document['frames']} frames; distances in body sizes of {document['size']:.4g} "
        f"{document['units']}{bones}"
    )


def describe_part_edges(edges: Mapping[str, Any] | None) -> list[str]:
    """A sentence on the active edges between the parts; none where no edge joins two of them."""
    if edges is None or not edges["counted"]:
        return []
    near, far = (
        f"{percent(row['share'])} (chance {percent(row['all_pairs'])}, 95 % of draws {percent(row['interval'][0])} to "
        f"{percent(row['interval'][1])})"
        for row in edges["agreement"]
    )
    return [
        f"of {edges['counted']} active edges between keypoints of different nearest joints, {near} join neighbours and "
        f"{far} joints at most two bones apart"
    ]


def _measure_track(track: np.ndarray, body: Body) -> dict[str, Any]:
    """One keypoint (F, 3): its entries of ``per_keypoint``, and ``distance`` (K,), the mean to each joint."""
    offset = track[:, None] - body.joints
    apart = np.sqrt(_dot(offset, offset)) / body.size  # (F, K)
    seen = np.isfinite(apart)
    frames = seen.any(axis=1)
    if not frames.any():
        raise InputError("keypoints: one is in no frame together with an annotated joint")
    apart = np.where(seen, apart, np.inf)[frames]
    together = seen.sum(axis=0)
    total = np.sum(apart, axis=0, where=seen[frames])
    nearest = apart.argmin(axis=1)
    votes, unsided = np.bincount(nearest), np.bincount(body.unsided[nearest])
    to_bone = _distance_to_bones(track[frames], body.joints[frames], body.bones) / body.size
    return {
        "distance": np.divide(total, together, out=np.full(len(total), np.inf), where=together > 0),
        "nearest_bone": float(np.fmin(to_bone, apart.min(axis=1)).mean()),
        "usual_joint": int(votes.argmax()),
        "same": float(votes.max() / len(nearest)),
        "same_unsided": float(unsided.max() / len(nearest)),
    }


def _distance_to_bones(track: np.ndarray, joints: np.ndarray, bones: np.ndarray) -> np.ndarray:
    """(F,) distance from positions (F, 3) to the nearest bone that has both ends; NaN where there is none."""
    nearest = np.full(len(track), np.nan)
    for start, end in bones:  # one at a time: (F, 3) in memory, not (F, B, 3)
        bone, offset = joints[:, end] - joints[:, start], track - joints[:, start]
        along = np.clip(_dot(offset, bone) / np.maximum(_dot(bone, bone), np.finfo(float).tiny), 0, 1)
        beside = offset - along[:, None] * bone
        nearest = np.fmin(nearest, np.sqrt(_dot(beside, beside)))
    return nearest


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)  # several times faster than a sum over an axis of three


def _one_to_one(distance: np.ndarray) -> dict[int, int]:
    """Distances (J, K) -> {keypoint: its own joint}, the least in sum; without pairs that were never seen together."""
    known = np.isfinite(distance)
    cost = np.where(known, distance, 1 + distance[known].sum())
    return {int(j): int(k) for j, k in zip(*linear_sum_assignment(cost)) if known[j, k]}


def _random_row(body: Body, count: int, seed: int) -> dict[str, Any]:
    """Means of :func:`measure_parts` over draws of random fixed points."""
    rng = np.random.default_rng(seed)
    rows = [measure_parts(random_points(body, count, rng), body) for _ in range(DRAWS)]
    names = ("assigned", *DISTANCES, *SHARES)
    return {"keypoints": count, "draws": DRAWS} | {name: float(np.mean([row[name] for row in rows])) for name in names}
