"""Edge maps: the skeleton's weighted edges drawn into images as Gaussian-profiled line segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .checks import check_device, check_floating, check_positive, check_scalar, check_shape, check_tensor, describe
from .geometry import GEOMETRY_DTYPES, INTEGERS, all_pairs, as_int, checks_values

Size = tuple[int, int]
Edges = Tensor | Sequence[Sequence[int]]


def rasterize_edges(
    keypoints: Tensor,
    weights: Tensor,
    size: Size | Sequence[Size],
    sigma: float | Sequence[float],
    *,
    edges: Edges | None = None,
    backend: str = "auto",
) -> Any:
    r"""Draw weighted edges between keypoints; each pixel shows its strongest edge (BKinD-3D, Section 3.1.3).

    .. math:: \mathrm{map}(p) = \max\left(0, \max_e \; w_e \exp(-d_e(p)^2 / \sigma^2)\right)

    with :math:`d_e(p)` the distance of pixel p to the *segment* between the edge's keypoints. (The paper prints the
    exponent without its minus sign.) Edges with w ≤ 0 are not drawn. The gradient goes to the endpoints and the weight
    of the winning edge, the lowest index in a tie. A zero-length segment is a point, with finite gradients. Keypoints
    may lie anywhere, also outside the map.

    Args:
        keypoints: (N, K, 2), order (x, y), in pixels of the map (of the first map of several), centres at integers;
            float32 or float64.
        weights: (E,) or (N, E), floating.
        size: (H, W) of the map, or a sequence of them.
        sigma: σ > 0 in pixels of its own map: a number, or a sequence as long as that of sizes. A number may be a
            tensor (), which is read (a GPU is waited for) and gets no gradient.
        edges: (E, 2) int64 index pairs, or a list of pairs, which is copied to the device of the keypoints at each
            call; all pairs i < j in lexicographic order by default. The range of a tensor is checked on the CPU only,
            and not while tracing.
        backend: "auto", or a name in :data:`bkind3d_kernels.backends.BACKENDS`.

    Returns:
        Map (N, H, W) in the dtype of the keypoints, or for several sizes a list of maps: the keypoints are then
        rescaled from the first size to each by the pixel-centre rule, u' = (u + 0.5)·w/W − 0.5. Distances and σ are in
        pixels of each map. Gradients: keypoints and weights.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; the message names it.
        TypeError: an argument is not a tensor.
        BackendUnavailable: the backend that was named cannot run here.

    Example:
        >>> import torch
        >>> from bkind3d_kernels import rasterize_edges
        >>> keypoints = torch.tensor([[[1.0, 1.0], [3.0, 1.0]]])
        >>> rasterize_edges(keypoints, torch.tensor([1.0]), (3, 5), 1.0)[0, 1]
        tensor([0.3679, 1.0000, 1.0000, 1.0000, 0.3679])
    """
    sizes, sigmas, single = _sizes(size, sigma)
    check_tensor("keypoints", keypoints, "(N, K, 2)")
    if keypoints.shape[2] != 2:
        raise ValueError(f"keypoints {describe(keypoints)}: expected (N, K, 2)")
    if keypoints.dtype not in GEOMETRY_DTYPES:
        raise ValueError(f"keypoints {describe(keypoints)}: expected float32 or float64, got {keypoints.dtype}")
    if edges is None:
        edges = all_pairs(keypoints.shape[1], keypoints.device)  # made there: a copy would end a CUDA graph's capture
    else:
        edges = as_edges(edges, keypoints.device)
        _check_edges(edges, keypoints.shape[1])
        check_device("edges", edges, "keypoints", keypoints)
    _check_weights(weights, keypoints, edges.shape[0])
    if weights.dtype != keypoints.dtype:
        weights = weights.to(keypoints.dtype)
    if weights.ndim == 1:
        weights = weights.expand(keypoints.shape[0], -1)
    run = backends.implementation("rasterize_edges", backend, keypoints.device, keypoints.dtype)
    maps = run(keypoints, weights, edges, sizes, sigmas)
    return maps[0] if single else maps


def _sizes(size: Any, sigma: Any) -> tuple[list[Size], list[float], bool]:
    """Sizes and sigmas as lists, and whether one map was asked for."""
    expected = "expected (H, W) of at least 1, or a sequence of them"
    if not isinstance(size, (tuple, list)) or not size:
        raise ValueError(f"size {size!r}: {expected}")
    single = not isinstance(size[0], (tuple, list))
    sizes = [size] if single else list(size)
    sigmas = [sigma] if single else sigma
    for s in sizes:
        if not isinstance(s, (tuple, list)) or len(s) != 2 or not all(isinstance(x, INTEGERS) and x >= 1 for x in s):
            raise ValueError(f"size {size!r}: {expected}")
    if not isinstance(sigmas, (tuple, list)) or len(sigmas) != len(sizes):
        raise ValueError(f"sigma {sigma!r}: expected a sequence of {len(sizes)} numbers, one for each size")
    sigmas = [_number(s) for s in sigmas]
    return [(as_int(s[0]), as_int(s[1])) for s in sizes], [float(s) for s in sigmas], single


def _number(sigma: Any) -> float:
    if isinstance(sigma, Tensor):
        check_scalar("sigma", sigma)
        if sigma.requires_grad and torch.is_grad_enabled():
            raise ValueError("sigma: no gradient goes to it; expected a number, or a tensor that requires no gradient")
        sigma = sigma.item()
    check_positive("sigma", sigma)
    return sigma


def as_edges(edges: Any, device: torch.device | str | None = None) -> Tensor:
    """A list of index pairs as a tensor (E, 2) on ``device``; a tensor as it is."""
    if isinstance(edges, Tensor):
        return edges
    pairs = edges if isinstance(edges, (list, tuple)) else [edges]
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(i, INTEGERS) for i in pair):
            raise TypeError(f"edges: expected a tensor (E, 2) or a list of index pairs, got {pair!r} in it")
    return torch.tensor([[as_int(i), as_int(j)] for i, j in pairs], dtype=torch.int64, device=device).reshape(-1, 2)


def _check_edges(edges: Any, keypoints: int) -> None:
    check_tensor("edges", edges, "(E, 2)")
    if edges.shape[1] != 2:
        raise ValueError(f"edges {describe(edges)}: expected (E, 2)")
    if edges.dtype != torch.int64:
        raise ValueError(f"edges {describe(edges)}: expected int64, got {edges.dtype}")
    if checks_values(edges) and not 0 <= int(edges.min()) <= int(edges.max()) < keypoints:
        raise ValueError(
            f"edges {describe(edges)}: expected keypoint indices 0 to {keypoints - 1}, "
            f"found {int(edges.min())} to {int(edges.max())}"
        )


def _check_weights(weights: Any, keypoints: Tensor, count: int) -> None:
    check_shape("weights", weights, (count,), (keypoints.shape[0], count), why=", a weight for each edge")
    check_floating("weights", weights)
    check_device("weights", weights, "keypoints", keypoints)


class EdgeRasterizer(nn.Module):
    """:func:`rasterize_edges` with its sizes, sigmas and edges fixed; no parameters.

    Args:
        size: (H, W), or a sequence of them.
        sigma: σ > 0, or a sequence as long as that of sizes.
        edges: (E, 2) int64 or a list of pairs, a buffer that is not in the state; all pairs by default.
        backend: "auto" or a backend's name.

    Example:
        >>> from bkind3d_kernels import EdgeRasterizer
        >>> EdgeRasterizer([(8, 8), (16, 16)], [1.0, 1.5])
        EdgeRasterizer(size=[(8, 8), (16, 16)], sigma=[1.0, 1.5], edges=all pairs, backend=auto)
    """

    edges: Tensor | None

    def __init__(
        self,
        size: Size | Sequence[Size],
        sigma: float | Sequence[float],
        *,
        edges: Edges | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _sizes(size, sigma)
        backends.check_name(backend)
        self.size = size
        self.sigma = sigma
        self.backend = backend
        self.register_buffer("edges", None if edges is None else as_edges(edges), persistent=False)

    def forward(self, keypoints: Tensor, weights: Tensor) -> Any:
        """Map (N, H, W), or a list of maps; arguments as in :func:`rasterize_edges`."""
        return rasterize_edges(keypoints, weights, self.size, self.sigma, edges=self.edges, backend=self.backend)

    def extra_repr(self) -> str:
        """The options."""
        edges = "all pairs" if self.edges is None else describe(self.edges)
        return f"size={self.size}, sigma={self.sigma}, edges={edges}, backend={self.backend}"
