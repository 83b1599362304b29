"""What the networks get to see: the body alone, in windows that follow it, with the cameras of the windows."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_rig import ring

from bkind3d.config import Config, DataConfig
from bkind3d.data.window import body_corners, cut, look, shifted
from bkind3d.models.views import GREY, body_middle, centred, foreground_only
from bkind3d.run import open_inputs
from bkind3d_kernels.geometry import project_points

SIZE = (44, 60)
VIEWS = 4


def test_the_room_is_grey_and_the_body_as_it_was() -> None:
    images = torch.rand(2, 3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    masks = (torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    seen = foreground_only(images, masks)
    body = (masks == 1)[:, :, None].expand_as(images)
    assert torch.equal(seen[body], images[body])
    assert (seen[~body] == GREY).all()
    half = foreground_only(images, torch.full((2, 3, *SIZE), 0.5))
    torch.testing.assert_close(half, 0.5 * images + 0.5 * GREY)


@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(0, 29), st.integers(0, 29), st.integers(1, 30), st.integers(1, 30)),
)
def test_the_window_has_the_body_in_its_middle(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    top, left, height, width = box
    mask = np.zeros((30, 30), np.uint8)
    mask[top : top + height, left : left + width] = 255
    y, x = np.nonzero(mask)
    corner = body_corners(mask, size)
    middle = corner + (np.array([size[1], size[0]]) - 1) / 2
    body = np.array([(x.min() + x.max()) / 2, (y.min() + y.max()) / 2])
    assert (np.abs(middle - body) <= 0.5).all()


def test_without_a_body_the_window_is_in_the_middle_of_the_frame() -> None:
    assert body_corners(np.zeros((2, 20, 31), np.uint8), (10, 11)).tolist() == [[10, 5], [10, 5]]
    assert body_corners(np.full((20, 31), 127, np.uint8), (10, 11)).tolist() == [10, 5]  # less than half is no body


@given(st.tuples(st.integers(1, 12), st.integers(1, 12)), st.integers(-20, 20), st.integers(-20, 20))
def test_a_window_holds_the_frame_and_zeros_beyond(size: tuple[int, int], x: int, y: int) -> None:
    frame = np.random.default_rng(0).integers(1, 255, (9, 11, 3), dtype=np.uint8)
    window = cut(frame[None], np.array([[x, y]]), size)[0]
    padded = np.zeros((9 + 80, 11 + 80, 3), np.uint8)
    padded[40:49, 40:51] = frame
    np.testing.assert_array_equal(window, padded[40 + y : 40 + y + size[0], 40 + x : 40 + x + size[1]])


def test_projections_of_windows() -> None:
    """A point is seen at the same pixel of the room, counted from the window's corner, at the same depth."""
    projections = ring(VIEWS, (SIZE[1], SIZE[0])).projection_matrices()
    corners = np.random.default_rng(0).integers(-9, 9, (3, VIEWS, 2))
    points = torch.rand(3, 1, 5, 3, generator=torch.Generator().manual_seed(0)).double() - 0.5
    whole, depth = project_points(projections.expand(3, -1, -1, -1), points)
    window, same = project_points(shifted(projections.expand(3, -1, -1, -1), corners), points)
    torch.testing.assert_close(window, whole - torch.from_numpy(corners)[:, :, None])
    torch.testing.assert_close(same, depth)


@pytest.fixture
def recording() -> SimpleNamespace:
    """Frames of noise in which a white block moves, with its masks and cameras."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 200, (5, VIEWS, *SIZE, 3), dtype=np.uint8)
    masks = np.zeros((5, VIEWS, *SIZE), np.uint8)
    for t in range(5):
        for view in range(VIEWS):
            y, x = 3 + 7 * t, 2 + 11 * view
            frames[t, view, y : y + 4, x : x + 6] = 255
            masks[t, view, y : y + 4, x : x + 6] = 255
    projections = ring(VIEWS, (SIZE[1], SIZE[0])).projection_matrices().float()
    return SimpleNamespace(frames=frames, masks=masks, projections=projections)


def test_looking_through_a_window(recording: SimpleNamespace) -> None:
    frames, masks, projections = look(recording, np.array([4, 1]), 16)
    assert (frames.shape, masks.shape, projections.shape) == (
        (2, VIEWS, 16, 16, 3), (2, VIEWS, 16, 16), (2, VIEWS, 3, 4),
    )  # fmt: skip
    assert (masks == 255).sum((2, 3)).tolist() == [[24] * VIEWS] * 2  # the whole block, also where the window leaves it
    assert (frames[masks == 255] == 255).all()
    y, x = np.nonzero(masks[0, 2])
    assert (x.min(), x.max(), y.min(), y.max()) == (5, 10, 6, 9)
    # The window's camera has moved as far as the block has.
    column = 2 + 11 * 2 - 5
    expected = recording.projections[2, 0] - column * recording.projections[2, 2]
    torch.testing.assert_close(projections[0, 2, 0], expected)


def test_without_a_window_frames_are_whole(recording: SimpleNamespace) -> None:
    frames, masks, projections = look(recording, np.array([4, 1]), 0)
    np.testing.assert_array_equal(frames, recording.frames[[4, 1]])
    np.testing.assert_array_equal(masks, recording.masks[[4, 1]])
    assert torch.equal(projections, recording.projections.expand(2, -1, -1, -1))


# -- the box around the body -------------------------------------------------------------------------------------------


def windows_around(points: torch.Tensor, side: int) -> torch.Tensor:
    """Projections (N, M, 3, 4) of windows that have points (N, 3) in their middle, to a pixel."""
    whole = ring(VIEWS, (SIZE[1], SIZE[0])).projection_matrices().expand(len(points), -1, -1, -1)
    seen, _ = project_points(whole, points[:, None, None])
    return shifted(whole, np.round(seen[:, :, 0].numpy() - (side - 1) / 2).astype(np.int64))


@pytest.mark.parametrize("lost", [False, True])
@given(seed=st.integers(0, 1000))
def test_the_middle_of_the_windows(lost: bool, seed: int) -> None:
    """Within the rounding of the windows to whole pixels, also where one of four views looks at something else."""
    points = 0.4 * torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)).double() - 0.2
    windows = windows_around(points, 17)
    if lost:
        windows[:, seed % VIEWS] = shifted(windows[:, seed % VIEWS], np.array([[25, -30]] * 3))
    found = body_middle(windows, (17, 17), torch.zeros(3).double(), 1.0)
    pixel = 1 / 17  # of a world unit, roughly: the ring's cameras see a metre over as many pixels
    assert (found - points).norm(dim=-1).max() < (2.5 if lost else 1) * pixel


def test_a_world_that_is_moved() -> None:
    projections = ring(VIEWS, (SIZE[1], SIZE[0])).projection_matrices().expand(3, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 1, 5, 3, generator=generator).double() - 0.5
    shift = torch.rand(3, 3, generator=generator).double()
    expected = project_points(projections, points)
    found = project_points(centred(projections, shift), points - shift[:, None, None])
    torch.testing.assert_close(found, expected)


def test_a_box_around_the_body_where_there_is_nothing_to_train_on(own_rig: Path) -> None:
    """The body is measured in the test recordings, and the box is as large as its size says, not as the volume."""
    content = yaml.safe_load(own_rig.read_text())
    trained = open_inputs(Config(own_rig, data=DataConfig(height=48, width=48, window=24)), progress=False)
    content["recordings"] = [recording for recording in content["recordings"] if recording["split"] == "test"]
    own_rig.write_text(yaml.safe_dump(content))
    inputs = open_inputs(Config(own_rig, data=DataConfig(height=48, width=48, window=24, box=1.5)), progress=False)
    assert inputs.body_size == pytest.approx(trained.body_size, rel=0.5)
    sides = inputs.grid.affine[0].diagonal() * (torch.tensor(inputs.grid.shape) - 1)
    torch.testing.assert_close(sides, torch.full((3,), 1.5 * inputs.body_size))
