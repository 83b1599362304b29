"""Each operation once more, in NumPy float64 and plain loops, by formulas other than those of the package."""

from itertools import product

import numpy as np


def unproject(features, projections, affine, shape, aggregation, unseen, view_mask, view_weights):
    """Volume (N, C, X, Y, Z) and counts: world point first, then the camera, then a tent function over all pixels."""
    n, m, c, h, w = features.shape
    volume, counts = np.zeros((n, c, *shape)), np.zeros((n, *shape), int)
    for b, i, j, k in product(range(n), *map(range, shape)):
        world = affine[b % len(affine)] @ [i, j, k, 1]
        values, seen = np.zeros((m, c)), np.zeros(m, bool)
        for view in range(m):
            x, y, depth = projections[b, view] @ [*world, 1]
            if depth <= 0 or not view_mask[b, view]:
                continue
            u, v = x / depth, y / depth
            if not (-1 <= u < w and -1 <= v < h):
                continue
            seen[view] = True
            tent_x = np.maximum(0, 1 - np.abs(u - np.arange(w)))
            tent_y = np.maximum(0, 1 - np.abs(v - np.arange(h)))
            values[view] = np.einsum("chw,h,w->c", features[b, view], tent_y, tent_x)
        volume[b, :, i, j, k] = aggregate(values, seen, aggregation, unseen, view_weights[b])
        counts[b, i, j, k] = seen.sum()
    return volume, counts


def aggregate(values, seen, aggregation, unseen, weights):
    """Values (M, C) to (C,): the list of views that take part is made first."""
    parts = [v for v in range(len(values)) if seen[v] or unseen == "zero"]
    if not parts:
        return np.zeros(values.shape[1])
    values, weights = values[parts], weights[parts]
    if aggregation == "softmax":
        e = np.exp(values)
        return (e * values).sum(0) / e.sum(0)
    if aggregation == "weighted":
        return (weights * values).sum(0) / (weights.sum(0) if unseen == "exclude" else 1)
    return {"mean": np.mean, "sum": np.sum, "max": np.max}[aggregation](values, axis=0)


def soft_argmax3d(logits, affine, temperature):
    """Coordinates (N, J, 3), peak (N, J), covariance (N, J, 3, 3), summed in world units voxel by voxel."""
    n, joints, *shape = logits.shape
    mean, peak, cov = np.zeros((n, joints, 3)), np.zeros((n, joints)), np.zeros((n, joints, 3, 3))
    for b, j in product(range(n), range(joints)):
        p = np.exp((logits[b, j] - logits[b, j].max()) / temperature)
        p /= p.sum()
        peak[b, j] = p.max()
        world = {ijk: affine[b % len(affine)] @ [*ijk, 1] for ijk in product(*map(range, shape))}
        for ijk, x in world.items():
            mean[b, j] += p[ijk] * x
        for ijk, x in world.items():
            cov[b, j] += p[ijk] * np.outer(x - mean[b, j], x - mean[b, j])
    return mean, peak, cov


def linear_soft_argmax3d(features, weight, bias, affine, temperature):
    """The same of logits that are made one voxel at a time."""
    n, _, *shape = features.shape
    logits = np.zeros((n, len(weight), *shape))
    for b, x, y, z in product(range(n), *map(range, shape)):
        logits[b, :, x, y, z] = weight @ features[b, :, x, y, z] + bias
    return soft_argmax3d(logits, affine, temperature)


def rasterize_edges(keypoints, weights, edges, size, sigma):
    """Map (N, H, W): distance to the segment by cases, from angles at the ends."""
    maps = np.zeros((len(keypoints), *size))
    for b, y, x in product(range(len(keypoints)), range(size[0]), range(size[1])):
        for e, (i, j) in enumerate(edges):
            d = segment_distance(np.array([x, y]), keypoints[b, i], keypoints[b, j])
            maps[b, y, x] = max(maps[b, y, x], weights[b, e] * np.exp(-(d**2) / sigma**2))
    return maps


def group_norm_act(x, groups, weight, bias, eps, residual, relu):
    """The variance is half the mean squared difference of all pairs; no mean is taken off first."""
    y = np.zeros(x.shape)
    members = x.shape[1] // groups
    for n, g in product(range(len(x)), range(groups)):
        values = x[n, g * members : (g + 1) * members].ravel()
        variance = (np.subtract.outer(values, values) ** 2).mean() / 2
        for c in range(g * members, (g + 1) * members):
            y[n, c] = weight[c] * (x[n, c] - values.mean()) / np.sqrt(variance + eps) + bias[c]
    y = y if residual is None else y + residual
    return np.where(y > 0, y, 0) if relu else y


def segment_distance(p, a, b):
    """Distance of p to the segment a–b: to an end beyond it, else twice the triangle's area over its base."""
    ab, ap, bp = b - a, p - a, p - b
    if ab @ ap <= 0:
        return np.hypot(*ap)
    if ab @ bp >= 0:
        return np.hypot(*bp)
    return abs(ab[0] * ap[1] - ab[1] * ap[0]) / np.hypot(*ab)
