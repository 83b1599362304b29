"""The registry of discovery methods: a new one is a file beside this one, and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bkind3d.models.body import BODY_TERMS
from bkind3d.models.depth import DepthModel
from bkind3d.models.discovery import DiscoveryModel
from bkind3d.models.keypoint3d import Keypoint3dModel
from bkind3d.models.triangulation import TriangulationModel
from bkind3d.models.volumetric import VolumetricModel


@dataclass(frozen=True)
class Penalty:
    """A term that a method adds to the training objective.

    Args:
        name: Its key in `Lifted.penalties`, its column in metrics.csv, and the setting of its weight, `loss.<name>`.
        weight: Default of that setting.
        help: What `bkind3d train --help` says of that setting.
    """

    name: str
    weight: float
    help: str


@dataclass(frozen=True)
class DiscoveryMethod:
    """A way of turning views into 3D keypoints.

    Args:
        name: Of the setting `method`, and of the model's file.
        title: What tables call it.
        model: Its networks.
        penalties: The terms of the objective that no other method has.
    """

    name: str
    title: str
    model: type[DiscoveryModel]
    penalties: tuple[Penalty, ...] = ()


METHODS = {
    method.name: method
    for method in (
        DiscoveryMethod(
            "triangulation",
            "triangulation + reprojection",
            TriangulationModel,
            (
                Penalty(
                    "reprojection",
                    1.0,
                    "Weight of the reprojection error of the triangulation method, whose unit is the square of the "
                    "image's longest side.",
                ),
            ),
        ),
        DiscoveryMethod("depth", "depth map", DepthModel),
        DiscoveryMethod(
            "keypoint3d",
            "Keypoint3D",
            Keypoint3dModel,
            (
                Penalty(
                    "consistency",
                    0.01,
                    "Weight of the spread of the views' keypoints in the Keypoint3D method, whose unit is the square "
                    "of the volume's longest side. A still background leaves its reconstruction loss near 0.03: a "
                    "weight of 0.1 already holds keypoints still as well, because still ones agree best.",
                ),
            ),
        ),
        DiscoveryMethod(
            "volumetric",
            "BKinD-3D",
            VolumetricModel,
            (
                Penalty(
                    "equivariance",
                    1.0,
                    "Weight of the squared distance between the keypoints of one moment in two turns of the volume, "
                    "relative to how far each keypoint moves, for the volumetric method where `model.turn_volume` is "
                    "set.",
                ),
            ),
        ),
    )
}
# As the command line lists them: the paper's own method first.
NAMES = tuple(sorted(METHODS, key=lambda name: name != "volumetric"))
METHOD_PENALTIES = tuple(penalty for method in METHODS.values() for penalty in method.penalties)
# Every term of the objective beside reconstruction, length and separation: those of some methods and the foreground's.
PENALTIES = (*(penalty.name for penalty in METHOD_PENALTIES), *BODY_TERMS)

if TYPE_CHECKING:
    Method = str
else:  # so that the command line refuses any other
    Method = Literal[NAMES]
