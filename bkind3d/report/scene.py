"""The interactive 3D view of a report: cameras with their images, the volume and the moving skeleton, in one HTML text.

viser serves scenes over a socket; here a server on the loopback address lives just long enough to record one.
"""

import contextlib
import io
import socket

import numpy as np
import viser
import viser.transforms

from bkind3d.cameras import Cameras
from bkind3d.report.inputs import Scene

SCENE_FRAMES = 300
FRUSTUM = 0.22  # all sizes here in sides of the volume
DOT = 0.022
LINE = 0.006
INK, FAINT = (60, 66, 74), (160, 166, 174)


def scene_html(
    scene: Scene,
    cameras: Cameras,
    positions: np.ndarray,
    edges: np.ndarray,
    images: np.ndarray,
    fps: float,
    colours: np.ndarray,
) -> str:
    """Record a scene with a play bar.

    The volume's centre becomes the origin and its longest side 1, so that any unit of length looks the same.

    Args:
        scene: with the volume.
        cameras: of the images.
        positions: (F, J, 3) keypoints in world units.
        edges: (E, 2) keypoint pairs.
        images: (M, H, W, 3) uint8, shown in the cameras' frustums.
        fps: frames per second of ``positions``.
        colours: (J, 3) uint8 of the keypoints.

    Returns:
        A whole HTML document that needs no network.
    """
    side = float(scene.sides.max())
    points = ((positions - scene.center) / side).astype(np.float32)
    kept = np.isfinite(points).all(axis=(0, 2))
    edges = edges[kept[edges].all(axis=1)].astype(np.int64)
    # viser prints where it listens; nobody is to connect here.
    with contextlib.redirect_stdout(io.StringIO()):
        server = viser.ViserServer(host="127.0.0.1", port=_free_port(), verbose=False)
        try:
            _add_surroundings(server, scene, cameras, images, side)
            return _record(server, points, kept, edges, fps, colours[kept])
        finally:
            server.stop()


def _record(
    server: viser.ViserServer, points: np.ndarray, kept: np.ndarray, edges: np.ndarray, fps: float, colours: np.ndarray
) -> str:
    dots = server.scene.add_point_cloud(
        "/skeleton/keypoints",
        points[0, kept],
        colours,
        point_size=DOT,
        point_shape="circle",
        point_shading="flat",
        precision="float32",
    )
    lines = server.scene.add_line_segments("/skeleton/edges", points[0][edges], INK, thickness=LINE)
    recording = server.get_scene_serializer()
    for moment in points:
        dots.points = moment[kept]
        lines.points = moment[edges]
        recording.insert_sleep(1.0 / fps)
    return recording.as_html()


def _add_surroundings(
    server: viser.ViserServer, scene: Scene, cameras: Cameras, images: np.ndarray, side: float
) -> None:
    server.scene.set_up_direction(tuple(scene.up))
    server.scene.configure_environment_map(None)
    server.scene.world_axes.visible = False
    box = _box_edges(scene.sides / side)
    server.scene.add_line_segments("/volume", box, FAINT, thickness=1.2, thickness_units="screen")
    centers = (cameras.centers.numpy() - scene.center) / side
    for m, name in enumerate(cameras.names):
        rotation, fov, aspect = _view(cameras, m)
        server.scene.add_camera_frustum(
            f"/cameras/{name}",
            fov=fov,
            aspect=aspect,
            scale=FRUSTUM,
            thickness=1.2,
            thickness_units="screen",
            color=INK,
            image=images[m],
            format="jpeg",
            jpeg_quality=85,
            position=centers[m],
            wxyz=viser.transforms.SO3.from_matrix(rotation).wxyz,
        )
    server.initial_camera.position = _viewpoint(centers, scene.up)
    server.initial_camera.look_at = np.zeros(3)
    server.initial_camera.fov = np.deg2rad(40.0)


def _view(cameras: Cameras, m: int) -> tuple[np.ndarray, float, float]:
    """Camera-to-world rotation (3, 3), vertical field of view (rad) and aspect of view m's image.

    A frustum is drawn with its axis through the middle of the image, where a cropped camera has no principal point: it
    is turned towards the ray of the middle pixel.
    """
    intrinsics = cameras.intrinsics[m].numpy()
    width, height = cameras.image_size[m].tolist()
    ray = np.linalg.solve(intrinsics, [(width - 1) / 2, (height - 1) / 2, 1.0])
    z = ray / np.linalg.norm(ray)
    x = np.array([1.0, 0.0, 0.0]) - z[0] * z
    x /= np.linalg.norm(x)
    turn = np.stack([x, np.cross(z, x), z], axis=1)
    fov = 2 * np.arctan(height / 2 / (intrinsics[1, 1] * np.linalg.norm(ray)))
    return cameras.rotation[m].numpy().T @ turn, float(fov), width / height


def _viewpoint(centers: np.ndarray, up: np.ndarray) -> np.ndarray:
    """(3,) a place to look from: between the first two cameras, raised, near enough to see the skeleton.

    All in sides of the volume, around its centre; distant cameras do not carry the view along.
    """
    up = up / np.linalg.norm(up)
    between = centers[:2].mean(axis=0)
    level = between - (between @ up) * up
    if np.linalg.norm(level) < 1e-3:
        level = np.cross(up, [1.0, 0.0, 0.0] if abs(up[0]) < 0.9 else [0.0, 1.0, 0.0])
    distance = np.clip(1.2 * np.median(np.linalg.norm(centers, axis=1)), 1.8, 3.0)
    direction = level / np.linalg.norm(level) + 0.45 * up
    return distance * direction / np.linalg.norm(direction)


def _box_edges(sides: np.ndarray) -> np.ndarray:
    """(12, 2, 3) edges of a box around the origin."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    pairs = [(a, b) for a in range(8) for b in range(a + 1, 8) if np.abs(corners[a] - corners[b]).sum() == 1]
    return (corners * sides)[np.array(pairs)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
