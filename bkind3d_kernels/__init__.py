"""Fast torch operations for lifting many camera views into 3D keypoints.

Five operations, each a function and a module, and the grid that places voxels in the world:
:func:`unproject`, :func:`soft_argmax3d`, :func:`linear_soft_argmax3d`, :func:`rasterize_edges`, :func:`group_norm_act`
and :class:`VoxelGrid`.
"""

from importlib import metadata

from . import backends, geometry
from .backends import BackendUnavailable, explain, resolve
from .geometry import VoxelGrid, VoxelGridModule
from .group_norm_act import GroupNormAct, group_norm_act
from .linear_soft_argmax3d import LinearSoftArgmax3d, linear_soft_argmax3d
from .rasterize_edges import EdgeRasterizer, rasterize_edges
from .soft_argmax3d import SoftArgmax3d, soft_argmax2d, soft_argmax3d
from .unproject import Unproject, unproject

__all__ = [
    "BackendUnavailable",
    "EdgeRasterizer",
    "GroupNormAct",
    "LinearSoftArgmax3d",
    "SoftArgmax3d",
    "Unproject",
    "VoxelGrid",
    "VoxelGridModule",
    "__version__",
    "backends",
    "explain",
    "geometry",
    "group_norm_act",
    "linear_soft_argmax3d",
    "rasterize_edges",
    "resolve",
    "soft_argmax2d",
    "soft_argmax3d",
    "unproject",
]

try:
    __version__ = metadata.version("bkind3d")  # that of pyproject.toml
except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+not.installed"

backends.load()
