"""The skeleton as a tree: what it makes of the lengths that it observes."""

import itertools

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from bkind3d.models.skeleton import STIFFNESS, TREE_MOMENTUM, Skeleton, spanning_tree
from bkind3d_kernels.geometry import all_pairs


def skeleton_of(keypoints: int, mean: float = 2.0) -> Skeleton:
    return Skeleton(keypoints, "softplus", mean, 1.0, 0.3)


def bending_chain(moments: int, bones: int, generator: torch.Generator) -> Tensor:
    """Keypoints (moments, bones + 1, 3) of a chain of bones of length 1, each turned from the last by up to 130°."""
    bends = 130 * torch.rand(moments, bones, generator=generator)
    axes = torch.randn(moments, bones, 3, generator=generator)
    tips = []
    for angles, directions in zip(bends, axes, strict=True):
        facing, place, row = Rotation.identity(), torch.zeros(3), [torch.zeros(3)]
        for angle, axis in zip(angles, directions, strict=True):
            across = torch.linalg.cross(axis, torch.tensor([1.0, 0, 0]))
            facing = facing * Rotation.from_rotvec((angle * across / across.norm()).numpy(), degrees=True)
            place = place + torch.from_numpy(facing.apply([1.0, 0, 0])).float()
            row.append(place)
        tips.append(torch.stack(row))
    return torch.stack(tips)


def moments_of(lengths: Tensor) -> Tensor:
    """What `Skeleton.observe` takes of lengths (B, E): (2, E)."""
    return torch.stack([lengths.mean(0), lengths.square().mean(0)])


def joined(pairs: Tensor, keypoints: int) -> bool:
    """Whether edges (E, 2) join all keypoints."""
    reached = {0}
    for _ in range(keypoints):
        reached |= {int(b) for a, b in pairs.tolist() + pairs.flip(1).tolist() if int(a) in reached}
    return len(reached) == keypoints


def test_spanning_tree_against_all_trees() -> None:
    pairs = all_pairs(5)
    for seed in range(5):
        costs = torch.rand(10, generator=torch.Generator().manual_seed(seed)) + 0.01
        trees = [list(edges) for edges in itertools.combinations(range(10), 4) if joined(pairs[list(edges)], 5)]
        assert len(trees) == 5**3  # Cayley
        best = min(trees, key=lambda edges: float(costs[edges].sum()))
        assert spanning_tree(costs, pairs).nonzero().flatten().tolist() == best


@pytest.mark.parametrize("seed", range(3))
def test_the_bones_of_a_chain_are_found(seed: int) -> None:
    """Keypoints in a mixed order; two that no bone joins are often nearer to each other than a bone is long."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(7, generator=generator)
    skeleton = skeleton_of(7)
    nearer = 0
    for _ in range(20):
        keypoints = bending_chain(8, 6, generator)
        across = (keypoints[:, 2:] - keypoints[:, :-2]).norm(dim=-1)
        nearer += int((across < 1).sum())
        lengths = skeleton.lengths(keypoints[:, order])
        skeleton.observe(moments_of(lengths))
    assert nearer > 50
    bones = {frozenset(order[pair].tolist()) for pair in skeleton.pairs[skeleton.tree]}
    assert bones == {frozenset((j, j + 1)) for j in range(6)}


def test_a_stiff_edge_is_preferred_to_a_shorter_one_that_varies() -> None:
    """Three keypoints: edges of length 1 and 1.2 that do not vary, and one of 0.9 ± 0.4."""
    skeleton = skeleton_of(3)
    skeleton.observe(moments_of(torch.tensor([[1.0, 0.5, 1.2], [1.0, 1.3, 1.2]])))
    assert 0.9 * (1 + STIFFNESS * (0.4 / 0.9) ** 2) > 1.2
    assert skeleton.tree.tolist() == [True, False, True]


@pytest.mark.parametrize("keypoints", [2, 3, 12])
def test_the_tree_joins_all_keypoints(keypoints: int) -> None:
    skeleton = skeleton_of(keypoints)
    assert (skeleton.weights > 0.3).sum() == skeleton.active.sum()  # nothing observed: those above the threshold
    random = torch.rand(6, keypoints, 3, generator=torch.Generator().manual_seed(0))
    skeleton.observe(moments_of(skeleton.lengths(random)))
    assert int(skeleton.tree.sum()) == keypoints - 1
    assert joined(skeleton.pairs[skeleton.tree], keypoints)
    skeleton.parameter.data.fill_(-9.0)  # whatever the weights
    assert torch.equal(skeleton.active, skeleton.tree)


def test_keypoints_in_one_place_have_a_tree_too() -> None:
    skeleton = skeleton_of(5)
    for spread in (0.0, 1.0):
        skeleton.observe(moments_of(skeleton.lengths(spread * torch.rand(4, 5, 3))))
        assert int(skeleton.tree.sum()) == 4


def test_without_edges_nothing_is_observed() -> None:
    skeleton = skeleton_of(0)
    skeleton.observe(torch.zeros(2, 0))
    assert skeleton.active.shape == (0,)


def test_observations_are_a_running_mean() -> None:
    skeleton = skeleton_of(3)
    first, second = torch.rand(2, 3) + 1, torch.rand(2, 3) + 1
    skeleton.observe(first)
    torch.testing.assert_close(skeleton.observed, first)
    skeleton.observe(second)
    torch.testing.assert_close(skeleton.observed, TREE_MOMENTUM * first + (1 - TREE_MOMENTUM) * second)


def test_what_was_observed_is_in_the_state() -> None:
    skeleton, other = skeleton_of(6), skeleton_of(6)
    skeleton.observe(moments_of(torch.rand(8, 15, generator=torch.Generator().manual_seed(0)) + 0.1))
    assert {"parameter", "average", "known", "observed", "tree"} == set(skeleton.state_dict())
    other.load_state_dict(skeleton.state_dict())
    assert torch.equal(other.active, skeleton.active)
    again = moments_of(torch.rand(8, 15, generator=torch.Generator().manual_seed(1)) + 0.1)
    for one in (skeleton, other):
        one.observe(again)
    assert torch.equal(other.observed, skeleton.observed)
    assert torch.equal(other.tree, skeleton.tree)
