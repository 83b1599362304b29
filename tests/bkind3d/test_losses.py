"""Target and losses against hand-computed values."""

import math

import numpy as np
import pytest
import torch

from bkind3d.config import LossConfig
from bkind3d.errors import InputError
from bkind3d.losses import Objective, ReconstructionLoss, length_loss, separation_loss
from bkind3d.models.body import OnBody
from bkind3d.models.discovery import Reconstruction
from bkind3d.models.skeleton import Skeleton
from bkind3d.models.targets import difference_target

GREY = LossConfig(target_channels="grey", network="none", pixel_scales=2)


def ssim_by_hand(a: np.ndarray, b: np.ndarray, y: int, x: int, window: int = 11) -> tuple[float, float]:
    """SSIM and its luminance term of one pixel, far from the border, from the definition (Wang et al. 2004)."""
    r = np.arange(window) - window // 2
    kernel = np.exp(-(r[:, None] ** 2 + r[None] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    half = window // 2
    p, q = (i[y - half : y + half + 1, x - half : x + half + 1] for i in (a, b))
    mp, mq = (kernel * p).sum(), (kernel * q).sum()
    vp, vq = (kernel * p * p).sum() - mp**2, (kernel * q * q).sum() - mq**2
    covariance = (kernel * p * q).sum() - mp * mq
    luminance = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
    return luminance * (2 * covariance + 9e-4) / (vp + vq + 9e-4), luminance


def test_target_is_one_minus_ssim() -> None:
    images = torch.rand(1, 2, 2, 3, 24, 28, generator=torch.Generator().manual_seed(0))
    target = difference_target(images, LossConfig())
    assert target.shape == (1, 2, 3, 24, 28)
    structure = difference_target(images, LossConfig(target="contrast-structure"))
    first, second = images[0, :, 1, 2].double().numpy()
    for y, x in ((8, 9), (12, 20)):
        similarity, luminance = ssim_by_hand(first, second, y, x)
        assert float(target[0, 1, 2, y, x]) == pytest.approx(1 - similarity, abs=1e-4)
        assert float(structure[0, 1, 2, y, x]) == pytest.approx(1 - similarity / luminance, abs=1e-4)


def test_target_of_equal_frames_is_zero_and_grey_has_one_channel() -> None:
    frame = torch.rand(1, 1, 2, 3, 16, 16)
    target = difference_target(frame.expand(-1, 2, -1, -1, -1, -1), GREY)
    assert target.shape == (1, 2, 1, 16, 16)
    assert target.abs().max() < 1e-5


def test_reconstruction_loss_of_nothing_is_the_number_of_terms() -> None:
    """Each term is measured in units of its target's mean square."""
    target = torch.rand(2, 3, 1, 16, 16)
    loss = ReconstructionLoss(GREY)
    assert float(loss(torch.zeros_like(target), target)) == pytest.approx(2.0, rel=1e-5)
    assert float(loss(target, target)) == 0


def test_reconstruction_loss_scales_are_state_and_move_in_training_alone() -> None:
    target = torch.rand(1, 1, 1, 16, 16)
    loss = ReconstructionLoss(GREY)
    loss(target, target)
    before = loss.scales.clone()
    loss.eval()
    loss(target, 5 * target)
    torch.testing.assert_close(loss.scales, before)
    loss.train()
    loss(target, 5 * target)
    torch.testing.assert_close(loss.scales, before * (0.99 + 0.01 * 25))
    assert set(loss.state_dict()) == {"scales", "known"}


def test_perceptual_terms_use_every_block_and_send_gradient() -> None:
    loss = ReconstructionLoss(LossConfig(network="vgg16", blocks=3, pixel_scales=1))
    assert loss.scales.shape == (4,)
    assert set(loss.state_dict()) == {"scales", "known"}
    reconstruction = torch.rand(1, 2, 3, 16, 16, requires_grad=True)
    loss(reconstruction, torch.rand(1, 2, 3, 16, 16)).backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.abs().sum() > 0


def test_frozen_network_moves_with_the_loss() -> None:
    loss = ReconstructionLoss(LossConfig(network="vgg16", blocks=1)).double()
    assert loss._network[0].features[0].weight.dtype == torch.float64


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        ReconstructionLoss(LossConfig(network="none", pixel_scales=0))


def test_length_loss() -> None:
    skeleton = Skeleton(3, "relu", 1.0, 0.0, 0.3)
    skeleton.parameter.data[1] = -1.0  # edge (0, 2) is not active
    positions = torch.tensor([[[0.0, 0, 0], [3.0, 0, 0], [3.0, 4.0, 0]]])  # lengths 3, 5, 4
    skeleton.known.fill_(True)
    skeleton.average.copy_(torch.tensor([0.5, 0.0, 0.2]))
    # side 10: |0.3 − 0.5| + |0.4 − 0.2|; the inactive edge does not count
    assert float(length_loss(skeleton, positions, 10.0)) == pytest.approx(0.4, rel=1e-5)
    # the same scene in millimetres costs the same
    assert float(length_loss(skeleton, 1000 * positions, 10_000.0)) == pytest.approx(0.4, rel=1e-5)


def test_length_loss_without_active_edges_is_zero_not_nan() -> None:
    skeleton = Skeleton(3, "relu", -1.0, 0.0, 0.3)
    positions = torch.rand(2, 3, 3, requires_grad=True)
    loss = length_loss(skeleton, positions, 1.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert positions.grad is not None
    assert (positions.grad == 0).all()


def test_separation_loss() -> None:
    positions = torch.tensor([[[0.0, 0, 0], [2.0, 0, 0], [0.0, 4.0, 0]]])
    sigma, side = 0.1, 10.0
    squared = np.array([0.2, 0.4, math.hypot(0.2, 0.4)]) ** 2
    expected = 2 * np.exp(-squared / (2 * sigma**2)).sum()  # i ≠ j counts each pair twice
    assert float(separation_loss(positions, side, sigma)) == pytest.approx(expected, rel=1e-5)


def test_coinciding_keypoints_have_finite_gradients() -> None:
    skeleton = Skeleton(3, "relu", 1.0, 0.0, 0.3)
    skeleton.known.fill_(True)
    positions = torch.zeros(1, 3, 3, requires_grad=True)
    (length_loss(skeleton, positions, 1.0) + separation_loss(positions, 1.0, 0.1)).backward()
    assert positions.grad is not None
    assert positions.grad.isfinite().all()


def test_curriculum() -> None:
    """Length and separation join after `regularise_after` epochs, with their weights."""
    torch.manual_seed(0)
    config = LossConfig(
        target_channels="grey", network="none", length=2.0, separation=3.0, regularise_after=1.5, separation_sigma=0.3
    )
    skeleton = Skeleton(3, "relu", 1.0, 0.0, 0.3)
    objective = Objective(config, unit=2.0)
    target = torch.rand(2, 2, 1, 8, 8)
    found = Reconstruction(torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3), torch.rand(2, 2, 1, 8, 8))
    objective(found, target, skeleton, 0.0)  # sets the averages and the scales
    objective.eval()
    early, late = (objective(found, target, skeleton, epoch) for epoch in (1.49, 1.5))
    assert float(early["loss"]) == float(early["reconstruction"])
    expected = late["reconstruction"] + 2.0 * late["length"] + 3.0 * late["separation"]
    torch.testing.assert_close(late["loss"], expected)
    assert float(late["length"]) > 0
    assert float(late["separation"]) > 0


FOREGROUND = {"containment": 0.2, "silhouette": 0.7, "identity": 1.1, "rigidity": 0.05}
WEIGHTS = {"containment": 2.0, "silhouette": 3.0, "identity": 0.5, "rigidity": 4.0}


def found_with(on_body: bool) -> Reconstruction:
    """Random keypoints and maps of three keypoints, with or without terms of the foreground."""
    generator = torch.Generator().manual_seed(5)
    terms = {name: torch.tensor(value) for name, value in FOREGROUND.items()} if on_body else {}
    return Reconstruction(
        torch.rand(2, 2, 3, 3, generator=generator), torch.rand(2, 2, 3), torch.rand(2, 2, 1, 8, 8), terms,
        OnBody(terms, torch.ones(4, 3), torch.ones(3)) if on_body else None,
    )  # fmt: skip


def test_terms_of_the_foreground_are_added_with_their_weights() -> None:
    config = LossConfig(target_channels="grey", network="none", regularise_after=10.0, **WEIGHTS)
    skeleton = Skeleton(3, "softplus", 1.0, 0.0, 0.3)
    terms = Objective(config, unit=1.0)(found_with(on_body=True), torch.rand(2, 2, 1, 8, 8), skeleton, 0.0)
    assert {name: float(terms[name]) for name in FOREGROUND} == pytest.approx(FOREGROUND)
    expected = float(terms["reconstruction"]) + 2 * 0.2 + 3 * 0.7 + 0.5 * 1.1 + 4 * 0.05
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)


def test_the_tree_is_found_where_the_foreground_is_known_and_in_training() -> None:
    config = LossConfig(target_channels="grey", network="none")
    for on_body, training in ((True, True), (True, False), (False, True)):
        skeleton, target = Skeleton(3, "softplus", 1.0, 0.0, 0.3), torch.rand(2, 2, 1, 8, 8)
        found = found_with(on_body)
        Objective(config, unit=2.0).train(training)(found, target, skeleton, 0.0)
        assert int(skeleton.tree.sum()) == (2 if on_body and training else 0)
        if on_body and training:
            lengths = skeleton.lengths(found.positions.flatten(0, 1)) / 2
            expected = torch.stack([lengths.mean(0), lengths.square().mean(0)])
            torch.testing.assert_close(skeleton.observed, expected)


@pytest.mark.parametrize("on_body", [False, True])
def test_without_weights_for_the_foreground_the_objective_is_the_papers(on_body: bool) -> None:
    """Equation 4 by hand: every term from its formula, over all pairs of keypoints."""
    config = LossConfig(
        target_channels="grey", network="none", length=0.1, separation=0.01, separation_sigma=0.05,
        regularise_after=0.0, containment=0.0, silhouette=0.0, identity=0.0, rigidity=0.0,
    )  # fmt: skip
    skeleton, unit = Skeleton(3, "softplus", 1.0, 0.0, 0.3), 2.0
    found, target = found_with(on_body), torch.rand(2, 2, 1, 8, 8)
    objective = Objective(config, unit)
    objective(found, target, skeleton, 0.0)  # sets the scales and the averages
    objective.eval()
    expected = float((found.difference - target).square().mean() / target.square().mean())
    positions = found.positions.flatten(0, 1).double().numpy() / unit
    distances = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)  # (4, 3, 3)
    joined = skeleton.pairs[skeleton.active].tolist()
    assert len(joined) == (2 if on_body else 3)
    average = distances.mean(0)
    expected += 0.1 * np.mean([sum(abs(one[i, j] - average[i, j]) for i, j in joined) for one in distances])
    expected += 0.01 * (np.exp(-(distances**2) / (2 * 0.05**2)).sum((1, 2)) - 3).mean()
    assert float(objective(found, target, skeleton, 0.0)["loss"]) == pytest.approx(expected, rel=1e-4)
