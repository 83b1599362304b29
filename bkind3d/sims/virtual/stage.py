"""The arena around a virtual subject, and pictures of it through any calibrated camera.

MuJoCo draws a pinhole picture, twice as fine and wide enough for the lens; each pixel of the sensor is the mean of
2 × 2 bilinear samples of it, taken where the lens sees them. Rotation and pinhole follow from MuJoCo's camera, which
looks along -z with y up: R = diag(1, -1, -1) xmatᵀ, f = (H / 2) / tan(fovy / 2), pixel centres at integers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import sparse

from bkind3d.cameras import Cameras
from bkind3d.sims.studio import smooth_noise
from bkind3d.sims.virtual.engine import load_mujoco, open_drawing, picture_asset
from bkind3d.sims.virtual.subject import ROOM_GROUP, SUBJECT_GROUP, Subject

_FINER = 2  # samples per pixel along each axis
_TEXELS = 512


def build_model(subject: Subject, cameras: Cameras, lenses: dict[str, Lens], rng: np.random.Generator) -> Any:
    """The compiled `mujoco.MjModel` of the arena with the subject and its cameras."""
    load_mujoco()
    from dm_control import mjcf

    arena = mjcf.RootElement()
    arena.compiler.angle = "radian"
    sides = 8  # tiles from the middle to the edge
    arena.asset.add("texture", name="floor", type="2d", file=picture_asset(_floor(rng)))
    arena.asset.add("material", name="floor", texture="floor", texrepeat=[2 * sides] * 2, specular=0, reflectance=0)
    arena.asset.add(
        "texture",
        type="skybox",
        builtin="gradient",
        rgb1=[0.62, 0.64, 0.68],
        rgb2=[0.40, 0.42, 0.46],
        width=64,
        height=384,
    )
    half = sides * subject.tile
    arena.worldbody.add("geom", name="floor", type="plane", size=[half, half, 1], material="floor", group=ROOM_GROUP)
    for direction, strength in (((0.35, 0.25, -0.9), 0.62), ((-0.6, -0.3, -0.5), 0.25)):
        arena.worldbody.add(
            "light", directional=True, castshadow=False, pos=[0, 0, 3], dir=direction, diffuse=[strength] * 3,
            specular=[0.1] * 3, ambient=[0] * 3,
        )  # fmt: skip
    for name, rotation, center in zip(cameras.names, cameras.rotation, cameras.centers):
        arena.worldbody.add(
            "camera", name=name, pos=center.numpy(), xyaxes=[*rotation[0].tolist(), *(-rotation[1]).tolist()],
            fovy=lenses[name].fovy,
        )  # fmt: skip
    walker = subject.walker(rng)
    walker.model = "walker"
    arena.attach(walker).add("freejoint")
    model = mjcf.Physics.from_mjcf_model(arena).model.ptr
    # Only now: set in the arena, these would clash with the walker's own on attaching.
    model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.46, 0.14
    model.vis.headlight.specular[:] = 0.0
    model.vis.quality.offsamples = 0  # the pictures are averaged down anyway
    model.vis.map.znear, model.vis.map.zfar = 0.05 / model.stat.extent, 50 / model.stat.extent
    return model


class Lens:
    """From MuJoCo's pinhole picture to that of one calibrated camera.

    Args:
        camera: one camera.
    """

    def __init__(self, camera: Cameras) -> None:
        width, height = camera.image_size[0].tolist()
        self.width, self.height = width, height
        x = (torch.arange(width * _FINER, dtype=torch.float64) + 0.5) / _FINER - 0.5
        y = (torch.arange(height * _FINER, dtype=torch.float64) + 0.5) / _FINER - 0.5
        pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        straight = camera.undistort_points(pixels[None])[0] if camera.distortion.any() else pixels
        homogeneous = torch.cat([straight, torch.ones_like(straight[..., :1])], dim=-1)
        rays = (homogeneous @ torch.linalg.inv(camera.intrinsics[0]).T)[..., :2].numpy()  # x / z, y / z
        fine = np.array([width * _FINER, height * _FINER])
        focal = float(((fine - 2) / 2 / np.abs(rays).max(axis=(0, 1))).min())
        self.fovy = math.degrees(2 * math.atan(fine[1] / 2 / focal))
        self._weights = _weights(rays * focal + (fine - 1) / 2, fine)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Pinhole picture (2 H, 2 W, 3) uint8 to what the sensor sees: (H, W, 3) float32."""
        return (self._weights @ picture.reshape(-1, 3).astype(np.float32)).reshape(self.height, self.width, 3)


def _weights(samples: np.ndarray, size: np.ndarray) -> sparse.csr_array:
    """Weights (H W, 4 H W) float32 of the fine picture in each pixel; `samples` (2 H, 2 W, 2) are places x, y in it."""
    width, height = size.tolist()
    row, column = np.indices(samples.shape[:2]) // _FINER
    target = (row * (width // _FINER) + column).ravel()
    corner = np.floor(samples)
    fraction = samples - corner
    shape = (width * height // _FINER**2, width * height)
    total = sparse.csr_array(shape, dtype=np.float32)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = np.abs(1 - dx - fraction[..., 0]) * np.abs(1 - dy - fraction[..., 1]) / _FINER**2
        source = (corner[..., 1] + dy) * width + corner[..., 0] + dx
        entries = weight.ravel().astype(np.float32), (target.astype(np.int32), source.ravel().astype(np.int32))
        total += sparse.csr_array(entries, shape=shape)
    return total


class Stage:
    """Draws a model, posed, through its cameras; to be closed after use.

    The room does not change, so it is drawn once per camera; then the subject alone, in front of it by depth.

    Args:
        model: from :func:`build_model`.
        data: the `mujoco.MjData` that holds the pose.
        lenses: by name of the camera, all of one picture size.
    """

    def __init__(self, model: Any, data: Any, lenses: dict[str, Lens]) -> None:
        self.mujoco = load_mujoco()
        self.model, self.data, self.lenses = model, data, lenses
        lens = next(iter(lenses.values()))
        self.size = _FINER * lens.height, _FINER * lens.width
        self.context, self.drawing = open_drawing(model, *self.size)
        self.scene = self.mujoco.MjvScene(model, maxgeom=model.ngeom + 10)
        for flag in ("SHADOW", "REFLECTION", "HAZE"):
            self.scene.flags[getattr(self.mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        self.rooms = {name: self._draw(name, ROOM_GROUP) for name in lenses}

    def picture(self, camera: str) -> np.ndarray:
        """What that camera sees: (H, W, 3) float32, 0 to 255."""
        color, depth = self._draw(camera, SUBJECT_GROUP)
        room, room_depth = self.rooms[camera]
        seen = np.where((depth < room_depth)[..., None], color, room)
        return self.lenses[camera](seen[::-1])  # OpenGL's rows run upwards

    def _draw(self, camera: str, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Colours (2 H, 2 W, 3) uint8 and depths (2 H, 2 W) of one group of geoms; the skin is the subject's."""
        mujoco = self.mujoco
        options = mujoco.MjvOption()
        for groups in (options.geomgroup, options.sitegroup, options.skingroup):
            groups[:] = 0
        options.geomgroup[group] = 1
        options.skingroup[0] = group == SUBJECT_GROUP
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = group == ROOM_GROUP
        view = mujoco.MjvCamera()
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.model.camera(camera).id
        mujoco.mj_camlight(self.model, self.data)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, self.data, options, None, view, everything, self.scene)
        rectangle = mujoco.MjrRect(0, 0, self.size[1], self.size[0])
        mujoco.mjr_render(rectangle, self.scene, self.drawing)
        color, depth = np.empty((*self.size, 3), np.uint8), np.empty(self.size, np.float32)
        mujoco.mjr_readPixels(color, depth, rectangle, self.drawing)
        return color, depth

    def close(self) -> None:
        """Give the drawing context back."""
        self.drawing.free()
        self.context.free()


def _floor(rng: np.random.Generator) -> np.ndarray:
    """A stained floor (N, N, 3) uint8 that repeats without a seam."""
    shape = (_TEXELS, _TEXELS)
    grain = 0.5 * smooth_noise(rng, shape, 5) + 0.5 * smooth_noise(rng, shape, 31)
    color = (0.34 + 0.14 * grain)[..., None] * np.array([0.92, 1.0, 0.96])
    return (255 * color).astype(np.uint8)
