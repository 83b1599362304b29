"""Is the discovered skeleton one? How far the lengths of its edges vary, and how far they follow the true bones.

An edge that stands for a bone keeps its length, so its coefficient of variation (SD / mean over the frames) is read
beside the median over all pairs of keypoints.

For the bones each keypoint is given to one true joint: the one that it moves with, that is, with the least mean
distance over the frames once the mean offset of the two is removed (a keypoint may lie beside the joint that it
follows; joints that never move against each other cannot be told apart). An edge then is as long as the shortest path
of bones between its two joints. Edges between keypoints at one joint say nothing about bones and are not counted. The
share of edges at most one (two) bones long is read beside the same share over all pairs of keypoints at different
joints, which is what edges drawn at random would have, and beside the interval in which 95 % of such draws fall.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import shortest_path
from scipy.stats import hypergeom

from bkind3d.errors import InputError
from bkind3d.tables import percent

REACHES = (1, 2)  # bones
CHANCE = 0.95  # share of random draws of edges inside the interval of chance


def summarise_skeleton(
    keypoints: np.ndarray, edges: np.ndarray, joints: np.ndarray | None = None, bones: np.ndarray | None = None
) -> dict[str, Any]:
    """Lengths of the active edges, and their agreement with the true bones where these are known.

    Args:
        keypoints: (F, J, 3), finite.
        edges: (E, 2) pairs of keypoints; E may be 0.
        joints: (F, K, 3) true joints, NaN where not annotated.
        bones: (B, 2) pairs of joints.

    Returns:
        ``edges`` E, ``pairs`` of keypoints in all, ``frames``; ``cv`` and ``cv_all_pairs``, medians, and ``lengths``, a
        row for each edge, with ``mean`` and ``sd`` in the keypoints' unit and ``cv``. With bones also ``joint`` (J,)
        and ``distance`` (J,) of the assignment, ``bones`` between the ends in each row (None where no path leads),
        and what :func:`bone_agreement` tells of them. A number that does not exist is None.

    Raises:
        InputError: shapes that do not fit, or an edge or bone between ends that do not exist.
    """
    keypoints = np.asarray(keypoints, dtype=np.float64)
    if keypoints.ndim != 3 or keypoints.shape[2] != 3 or 0 in keypoints.shape or not np.isfinite(keypoints).all():
        raise InputError(f"keypoints: expected finite positions of shape (F, J, 3), got {keypoints.shape}")
    count = keypoints.shape[1]
    edges = _pairs("edges", edges, count)
    every = _every_pair(count)
    mean, deviation, variation = _lengths(keypoints, edges)
    rows: list[dict[str, Any]] = [
        {"keypoints": edge, "mean": float(m), "sd": float(s), "cv": _known(v)}
        for edge, m, s, v in zip(edges.tolist(), mean, deviation, variation)
    ]
    summary: dict[str, Any] = {
        "edges": len(edges),
        "pairs": len(every),
        "frames": len(keypoints),
        "cv": _median(variation),
        "cv_all_pairs": _median(_lengths(keypoints, every)[2]),
        "lengths": rows,
    }
    if joints is None or bones is None or len(bones) == 0:
        return summary
    joint, distance = assign_joints(keypoints, joints)
    apart = bone_distances(bones, np.asarray(joints).shape[1])
    for row, (i, j) in zip(rows, joint[edges]):
        row["bones"] = int(apart[i, j]) if np.isfinite(apart[i, j]) else None
    return summary | {"joint": joint.tolist(), "distance": distance.tolist(), **bone_agreement(edges, joint, apart)}


def assign_joints(keypoints: np.ndarray, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The joint that each keypoint moves with: index (J,), and the mean distance (J,) left without the mean offset.

    Args:
        keypoints: (F, J, 3), finite.
        joints: (F, K, 3), NaN where not annotated; a joint annotated in fewer than two frames is given to no keypoint.

    Raises:
        InputError: another number of frames, or no joint that is annotated in two frames.
    """
    joints = np.asarray(joints, dtype=np.float64)
    if joints.ndim != 3 or joints.shape[2] != 3 or len(joints) != len(keypoints):
        raise InputError(f"joints: expected shape ({len(keypoints)}, K, 3), got {joints.shape}")
    valid = np.isfinite(joints).all(axis=2)  # (F, K)
    frames = valid.sum(axis=0)
    if not (frames >= 2).any():
        raise InputError("joints: none is annotated in two frames")
    weight = valid / np.maximum(frames, 1)  # (F, K), sums to 1 over the frames
    cost = np.empty((keypoints.shape[1], joints.shape[1]))
    for j in range(keypoints.shape[1]):  # one at a time: (F, K, 3) in memory, not (F, J, K, 3)
        offset = np.where(valid[..., None], keypoints[:, j, None] - joints, 0.0)
        moved = offset - np.einsum("fk,fki->ki", weight, offset)
        cost[j] = np.sum(weight * np.linalg.norm(moved, axis=2), axis=0)
    cost[:, frames < 2] = np.inf
    joint = cost.argmin(axis=1)
    return joint, cost[np.arange(len(joint)), joint]


def bone_agreement(edges: np.ndarray, joint: np.ndarray, apart: np.ndarray) -> dict[str, Any]:
    """How many of the edges between different joints join near ones, beside all pairs of keypoints.

    Args:
        edges: (E, 2) pairs of keypoints.
        joint: (J,) the joint of each keypoint.
        apart: (K, K) bones between two joints, of :func:`bone_distances`.

    Returns:
        The number of edges ``counted``, and ``agreement``: for each of :data:`REACHES` the ``share`` of them that are
        at most so many ``bones`` long, the same share over ``all_pairs``, and the ``interval`` that holds this share
        in :data:`CHANCE` of the draws of so many different pairs. None where nothing is counted.

    Raises:
        InputError: an edge between keypoints that do not exist.
    """
    drawn, every = (
        apart[i, j][i != j] for i, j in (joint[_pairs("edges", edges, len(joint))].T, joint[_every_pair(len(joint))].T)
    )
    return {
        "counted": len(drawn),
        "agreement": [
            {
                "bones": reach,
                "share": _share(drawn <= reach),
                "all_pairs": _share(every <= reach),
                "interval": _chance_interval(every <= reach, len(drawn)),
            }
            for reach in REACHES
        ],
    }


def bone_distances(bones: np.ndarray, joints: int) -> np.ndarray:
    """(K, K) number of bones on the shortest path between two joints, infinite where no path leads.

    Raises:
        InputError: a bone between joints that do not exist.
    """
    bones = _pairs("bones", bones, joints)
    graph = csr_matrix((np.ones(len(bones)), tuple(bones.T)), shape=(joints, joints))
    return shortest_path(graph, directed=False, unweighted=True)


def format_skeleton(summary: Mapping[str, Any]) -> str:
    """A summary as text for the terminal."""
    if not summary["edges"]:
        return "skeleton: no edges"
    return "\n  ".join([f"skeleton: {summary['edges']} of {summary['pairs']} edges active", *describe_edges(summary)])


def describe_edges(summary: Mapping[str, Any]) -> list[str]:
    """A sentence on the lengths of the active edges, and one on the bones where these are known; none without edges."""
    if not summary["edges"]:
        return []
    lines = [
        f"over {summary['frames']} frames their lengths vary by {percent(summary['cv'])} (SD / mean, median), "
        f"those of all pairs of keypoints by {percent(summary['cv_all_pairs'])}"
    ]
    if "agreement" in summary:
        near, far = (f"{percent(row['share'])} ({percent(row['all_pairs'])})" for row in summary["agreement"])
        lines.append(
            f"of {summary['counted']} between different true joints, {near} join neighbours and {far} joints at most "
            "two bones apart (in brackets: all pairs of keypoints)"
        )
    return lines


def _lengths(keypoints: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, SD and SD / mean of the lengths of edges (E, 2), each (E,)."""
    mean, deviation = np.empty(len(edges)), np.empty(len(edges))
    for e, (i, j) in enumerate(edges):
        length = np.linalg.norm(keypoints[:, i] - keypoints[:, j], axis=1)
        mean[e], deviation[e] = length.mean(), length.std()
    return mean, deviation, np.divide(deviation, mean, out=np.full(len(edges), np.nan), where=mean > 0)


def _chance_interval(hits: np.ndarray, drawn: int) -> list[float] | None:
    """Least and largest share of hits among so many pairs drawn without replacement, hypergeometric, equal tails."""
    if drawn == 0:
        return None
    return [float(count) / drawn for count in hypergeom.interval(CHANCE, len(hits), int(hits.sum()), drawn)]


def _every_pair(count: int) -> np.ndarray:
    return np.stack(np.triu_indices(count, 1), axis=1)


def _pairs(name: str, pairs: np.ndarray, count: int) -> np.ndarray:
    array = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    if ((array < 0) | (array >= count)).any():
        raise InputError(f"{name}: expected pairs of numbers from 0 to {count - 1}, got {array.min()} to {array.max()}")
    return array


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None
