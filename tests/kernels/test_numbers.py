"""Numbers of NumPy are taken wherever Python's are."""

import numpy as np
import pytest
import torch

from bkind3d_kernels import (
    GroupNormAct,
    LinearSoftArgmax3d,
    SoftArgmax3d,
    VoxelGrid,
    group_norm_act,
    linear_soft_argmax3d,
    rasterize_edges,
    soft_argmax3d,
)


def test_numbers_of_numpy_are_numbers() -> None:
    three = np.int64(3)
    grid = VoxelGrid.cube((0.0, 0.0, 0.0), np.float32(2), three)
    assert [type(side) for side in grid.shape] == [int] * 3
    logits, features = torch.zeros(1, 2, 3, 3, 3), torch.zeros(1, 4, 3, 3, 3)
    centre = torch.zeros(1, 2, 3)
    for half in (np.float32(0.5), np.float16(0.5), np.int8(1)):
        torch.testing.assert_close(soft_argmax3d(logits, grid, temperature=half), centre)
        linear = linear_soft_argmax3d(features, torch.zeros(2, 4), None, grid, temperature=half)
        torch.testing.assert_close(linear, centre)
        assert rasterize_edges(torch.zeros(1, 2, 2), torch.ones(1), (three, three), half).shape == (1, 3, 3)
        y = group_norm_act(features, np.int32(2), torch.ones(4), torch.zeros(4), eps=half)
        assert y.shape == features.shape
    assert "temperature=0.5" in str(SoftArgmax3d(temperature=np.float32(0.5)))
    assert GroupNormAct(np.int64(2), np.int64(4)).weight.shape == (4,)
    assert LinearSoftArgmax3d(np.int64(4), np.int64(2)).weight.shape == (2, 4)
    with pytest.raises(ValueError, match=r"temperature .*: expected a finite number above 0"):
        soft_argmax3d(logits, grid, temperature=np.float32(np.nan))
    with pytest.raises(ValueError, match=r"grid.shape .*: expected three integers"):
        VoxelGrid(grid.affine, (np.int64(0), 2, 2))
