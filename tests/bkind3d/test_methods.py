"""Every discovery method: its geometry from hand-made maps, its shapes, gradients, training and resumption."""

import csv
import os
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tiny_model
import torch
import yaml
from small_rig import ring
from tiny_scene import GRID, SIZE, cameras, heatmaps, truth
from torch import Tensor, nn

from benchmarks import probes
from bkind3d.checkpoints import checkpoints
from bkind3d.config import Config, DataConfig, LossConfig, TrainConfig, load_config, save_config
from bkind3d.errors import InputError
from bkind3d.evaluation.evaluate import evaluate
from bkind3d.logs import COLUMNS
from bkind3d.losses import Objective
from bkind3d.models.depth import backproject, center_depth, expected_depth
from bkind3d.models.discovery import DiscoveryModel, box_center, box_radius
from bkind3d.models.keypoint3d import Keypoint3dModel, consistency_error
from bkind3d.models.methods import METHODS, PENALTIES, Method
from bkind3d.models.points import draw_points
from bkind3d.models.targets import difference_target, frame_target
from bkind3d.models.triangulation import reprojection_error
from bkind3d.models.views import centred
from bkind3d.predict import predict
from bkind3d.report import build_report
from bkind3d.run import build_model, load_model
from bkind3d.sims.simulate import simulate_rig
from bkind3d.train import Trainer, resume, train
from bkind3d_kernels import VoxelGrid
from bkind3d_kernels.geometry import project_points

NAMES: tuple[Method, ...] = get_args(Method)
HEATMAP_METHODS: tuple[Method, ...] = ("triangulation", "depth", "keypoint3d")
FOREGROUND = {"containment", "silhouette", "identity", "rigidity"}
OWN_TERMS = {"volumetric": (), "triangulation": ("reprojection",), "depth": (), "keypoint3d": ("consistency",)}
TINY = replace(tiny_model.TINY, map_stride=2)
LOSS = LossConfig(target_channels="grey", network="none", pixel_scales=2, regularise_after=0.0)


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def make(method: Method, bottleneck: str = "edges") -> DiscoveryModel:
    torch.manual_seed(0)
    return METHODS[method].model(replace(TINY, bottleneck=bottleneck), outputs=1)


every_model = pytest.mark.parametrize(
    ("method", "bottleneck"), [(method, bottleneck) for method in NAMES for bottleneck in ("edges", "points")]
)


# -- networks ----------------------------------------------------------------------------------------------------------


@every_model
def test_shapes_loss_and_gradients(method: Method, bottleneck: str) -> None:
    model, pairs = make(method, bottleneck), images(2, 2, 3)
    found = model(pairs, cameras(), GRID)
    assert found.positions.shape == (2, 2, 4, 3)
    assert found.confidence.shape == (2, 2, 4)
    assert found.difference.shape == (2, 3, 1, *SIZE)
    assert set(found.penalties) <= set(PENALTIES)
    target = model.target(pairs, LOSS)
    assert target.shape == found.difference.shape
    objective = Objective(LOSS, float(GRID.side))
    for _ in range(2):  # edges have no average length in the first
        terms = objective(found, target, model.skeleton, 0.0)
    expected = {"loss", "reconstruction", "length", "separation", *found.penalties}
    assert set(terms) == expected
    assert all(term.isfinite() for term in terms.values())
    terms["loss"].backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    silent = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias in front of a normalisation is the one thing that cannot matter.
    assert [name for name in silent if not name.endswith(".bias")] == []
    assert all(p.grad.isfinite().all() for p in trained.values() if p.grad is not None)
    assert ("skeleton.parameter" in trained) == (bottleneck == "edges")


@every_model
def test_a_box_that_follows_the_body(method: Method, bottleneck: str) -> None:
    """Where the body is in the world does not matter: its keypoints come along, and everything else stays the same."""
    torch.manual_seed(0)
    model = METHODS[method].model(replace(TINY, bottleneck=bottleneck), outputs=1, follows=True)
    shift = torch.tensor([0.3, -0.2, 0.1])
    elsewhere = centred(cameras(), -shift[None])  # the same pictures of a world that is elsewhere
    here, there = model(images(2, 2, 3), cameras(), GRID), model(images(2, 2, 3), elsewhere, GRID)
    torch.testing.assert_close(there.positions, here.positions + shift, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(there.difference, here.difference, rtol=1e-2, atol=2e-3)
    found = (
        model.detect(images(2, 3), elsewhere, GRID).positions - model.detect(images(2, 3), cameras(), GRID).positions
    )
    torch.testing.assert_close(found, shift.expand_as(found), rtol=1e-4, atol=2e-4)
    # The cameras' middle pixels meet in the box's middle, where an untrained volume puts its keypoints.
    fixed = make(method, bottleneck)(images(2, 2, 3), elsewhere, GRID).positions
    assert not torch.allclose(fixed, there.positions, atol=1e-3) or method == "triangulation"


@every_model
def test_samples_times_and_views_keep_their_places(method: Method, bottleneck: str) -> None:
    """A batch equals its samples and moments one by one, and the order of the views does not matter."""
    model, pairs = make(method, bottleneck).eval(), images(2, 2, 3)
    whole, order = model(pairs, cameras(), GRID), torch.tensor([2, 0, 1])
    for n in range(2):
        one = model(pairs[n : n + 1], cameras(), GRID)
        torch.testing.assert_close(one.difference[0], whole.difference[n], rtol=1e-4, atol=1e-4)
        for t in range(2):
            alone = model.detect(pairs[n : n + 1, t], cameras(), GRID)
            torch.testing.assert_close(alone.positions[0], whole.positions[n, t], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone.confidence[0], whole.confidence[n, t], rtol=1e-4, atol=1e-5)
    permuted = model(pairs[:, :, order], cameras()[:, order], GRID)
    torch.testing.assert_close(permuted.positions, whole.positions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.difference, whole.difference[:, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(permuted.penalties, whole.penalties)


@pytest.mark.parametrize("method", NAMES)
def test_untrained_keypoints_are_apart_and_near_the_box(method: Method) -> None:
    positions = make(method).detect(images(4, 3), cameras(), GRID).positions
    assert (positions - box_center(GRID)[:, None]).norm(dim=-1).max() < GRID.side
    assert torch.pdist(positions.mean(0)).min() > 0.003


def test_state_holds_what_the_method_uses() -> None:
    parts = {method: {name.split(".")[0] for name in make(method).state_dict()} for method in NAMES}
    shared = {"encoder", "geometry", "skeleton", "reconstruction"}
    assert parts == {"volumetric": shared | {"volume"}} | dict.fromkeys(HEATMAP_METHODS, shared)


# -- geometry: hand-made maps in, known points out ---------------------------------------------------------------------


def raw_depth(points: Tensor) -> Tensor:
    """What depth maps must hold at each point of each view, (N, M, J), by the documented parametrisation."""
    _, depth = project_points(cameras(), points[:, None])
    center = center_depth(cameras(), GRID)[..., None]
    return ((depth - center) / torch.minimum(box_radius(GRID), 0.95 * center)).atanh()


def test_triangulation_lands_on_the_points() -> None:
    maps = heatmaps(truth(), (24, 32), TINY.heatmap_gain)
    found = make("triangulation").lift(maps, cameras().expand(2, -1, -1, -1), SIZE, GRID)
    torch.testing.assert_close(found.positions, truth(), rtol=0, atol=1e-4)
    assert found.penalties["reprojection"] < 1e-9
    assert (found.confidence > 0.25).all()


def test_depth_lands_on_the_points() -> None:
    """A view's only depth map holds, around each point, the depth of that point."""
    for j in range(4):  # one point at a time: points may share pixels
        points = truth()[:, j : j + 1].expand(-1, 4, -1)
        depths = raw_depth(points)[:, :, :1, None, None].expand(-1, -1, -1, 24, 32)
        maps = torch.cat([heatmaps(points, (24, 32), TINY.heatmap_gain), depths], dim=2)
        found = make("depth").lift(maps, cameras().expand(2, -1, -1, -1), SIZE, GRID)
        torch.testing.assert_close(found.positions, points, rtol=0, atol=1e-4)


def test_keypoint3d_lands_on_the_points() -> None:
    depths = raw_depth(truth())[..., None, None].expand(-1, -1, -1, 24, 32)
    maps = torch.cat([heatmaps(truth(), (24, 32), TINY.heatmap_gain), depths], dim=2)
    found = make("keypoint3d").lift(maps, cameras().expand(2, -1, -1, -1), SIZE, GRID)
    torch.testing.assert_close(found.positions, truth(), rtol=0, atol=1e-4)
    assert found.penalties["consistency"] < 1e-8


def test_volumetric_lands_on_the_points() -> None:
    """With the heatmaps' probabilities themselves in the volume, to a fraction of a voxel."""
    torch.manual_seed(0)
    fine = VoxelGrid.box((0.1, -0.1, 0.0), (1.0, 1.2, 0.6), (41, 49, 25))
    model = METHODS["volumetric"].model(replace(TINY, aggregation="mean", logit_gain=60.0), outputs=1)
    maps = heatmaps(truth(), (48, 64), 1.0).exp()
    model.volume = nn.Identity()  # type: ignore[assignment]
    model.volume.head = nn.Conv3d(maps.shape[2], maps.shape[2], 1, bias=False)  # type: ignore[assignment]
    nn.init.dirac_(model.volume.head.weight)
    maps = torch.nn.functional.avg_pool2d(maps.flatten(0, 1), 5, stride=1, padding=2).unflatten(0, (2, 3))
    maps = maps / maps.amax((-2, -1), keepdim=True)
    found = model.lift(maps, cameras().expand(2, -1, -1, -1), SIZE, fine)
    assert (found.positions - truth()).norm(dim=-1).max() < 0.05


def test_confident_views_count_more() -> None:
    """One view misplaces a keypoint with a flat heatmap: the peak's weight keeps it near the truth."""
    points, gain = truth(), TINY.heatmap_gain
    maps = heatmaps(points, (24, 32), gain)
    maps[:, 1] = 0.0
    depths = raw_depth(points)[:, :, :1, None, None].expand(-1, -1, -1, 24, 32)
    projections = cameras().expand(2, -1, -1, -1)
    triangulated = make("triangulation").lift(maps, projections, SIZE, GRID).positions
    assert (triangulated - points).norm(dim=-1).max() < 0.01
    lifted = make("depth").lift(torch.cat([maps, depths], dim=2), projections, SIZE, GRID).positions
    assert (lifted - points)[:, 0].norm(dim=-1).max() < 0.01


def test_keypoint3d_shares_views_by_the_softmax_of_mean_logits() -> None:
    depths = raw_depth(truth())[..., None, None].expand(-1, -1, -1, 24, 32).clone()
    maps = torch.cat([heatmaps(truth(), (24, 32), TINY.heatmap_gain), depths], dim=2)
    maps[:, 2, 4:] += 0.3  # the third view is wrong about every depth
    maps[:, 2, 0] -= 1000.0  # and gives keypoint 0 none of its attention
    found = make("keypoint3d").lift(maps, cameras().expand(2, -1, -1, -1), SIZE, GRID)
    error = (found.positions - truth()).norm(dim=-1)
    assert error[:, 0].max() < 1e-4
    assert error[:, 1:].min() > 0.01


def test_backproject_inverts_project_points() -> None:
    points = truth()
    for projections in (cameras(), 2.5 * cameras()):
        pixels, depth = project_points(projections, points[:, None])
        lifted = backproject(pixels, depth, projections)
        torch.testing.assert_close(lifted, points[:, None].expand_as(lifted), rtol=0, atol=1e-5)


def test_depth_reaches_the_corners_of_the_box() -> None:
    """The radius of the box, by hand: half of √(1² + 1.2² + 0.6²); a whole depth map of ±∞ lands there."""
    assert float(box_radius(GRID)) == pytest.approx(0.5 * 2.8**0.5)
    maps = torch.zeros(1, 3, 5, 24, 32)
    for sign in (-1.0, 1.0):
        maps[:, :, 4] = sign * torch.inf
        depth = expected_depth(torch.full((1, 3, 4, 24, 32), 1 / 768), maps[:, :, 4:], cameras(), GRID)
        expected = center_depth(cameras(), GRID)[..., None] + sign * box_radius(GRID)
        torch.testing.assert_close(depth, expected.expand(1, 3, 4))


def test_depth_stays_in_front_of_a_camera_inside_the_box() -> None:
    model, grid = make("depth"), VoxelGrid.cube((0.0, 0.0, 0.0), 12.0, 8)  # the cameras stand at radius 3
    maps = torch.cat([torch.randn(1, 3, 4, 24, 32), torch.full((1, 3, 1, 24, 32), -1e3)], dim=2)
    assert model.lift(maps, cameras(), SIZE, grid).positions.isfinite().all()
    depth = project_points(cameras(), model.lift(maps[:, :1], cameras()[:, :1], SIZE, grid).positions[:, None])[1]
    assert (depth[:, 0] > 0).all()


# -- terms of the objective --------------------------------------------------------------------------------------------


def test_reprojection_error_by_hand() -> None:
    """5 pixels in an image 64 wide; it moves the points, not the detections."""
    points = truth().requires_grad_()
    pixels, _ = project_points(cameras(), points[:, None])
    detected = (pixels.detach() + torch.tensor([3.0, 4.0])).requires_grad_()
    error = reprojection_error(points, detected, cameras(), SIZE)
    assert float(error.detach()) == pytest.approx((5 / 64) ** 2, rel=1e-4)
    error.backward()
    assert points.grad is not None
    assert points.grad.abs().sum() > 0
    assert detected.grad is None
    behind = ring(3).centers[:1].float()[None] * 1.5
    alone = reprojection_error(behind, torch.zeros(1, 1, 1, 2), cameras()[:, :1], SIZE)
    assert float(alone) == 0


def test_consistency_error_by_hand() -> None:
    """Two views 0.2 sides apart along x: 0.1² over three coordinates; gradient as with detached pairs."""
    lifted = torch.tensor([[[[0.0, 1, 2]], [[0.4, 1, 2]]]], requires_grad=True)  # (1, 2, 1, 3)
    error = consistency_error(lifted, torch.tensor(2.0))
    assert float(error.detach()) == pytest.approx(0.1**2 / 3)
    (ours,) = torch.autograd.grad(error, lifted)
    pairs = (lifted[:, :, None] - lifted[:, None].detach()).square().mean() / 2.0**2
    torch.testing.assert_close(ours, torch.autograd.grad(pairs, lifted)[0])


def test_weights_of_the_terms() -> None:
    model, pairs = make("keypoint3d"), images(1, 2, 3)
    found, target = model(pairs, cameras(), GRID), model.target(pairs, LOSS)
    losses = []
    for weight in (0.0, 1.0, 3.0):
        config = replace(LOSS, consistency=weight, regularise_after=10.0)
        losses.append(Objective(config, float(GRID.side))(found, target, model.skeleton, 0.0)["loss"])
    torch.testing.assert_close(losses[1] - losses[0], found.penalties["consistency"])
    torch.testing.assert_close(losses[2] - losses[0], 3 * found.penalties["consistency"])


def test_targets() -> None:
    pairs = images(2, 2, 3)
    for method in NAMES:
        expected = frame_target if method == "keypoint3d" else difference_target
        torch.testing.assert_close(make(method).target(pairs, LOSS), expected(pairs, LOSS))
    torch.testing.assert_close(frame_target(pairs, LossConfig()), pairs[:, 1])
    torch.testing.assert_close(frame_target(pairs, LOSS), pairs[:, 1].mean(2, keepdim=True))


# -- points ------------------------------------------------------------------------------------------------------------


def test_points_by_hand() -> None:
    pixels = torch.tensor([[[10.5, 6.5], [30.0, 20.0]]])
    scale, front = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])
    fine, coarse = draw_points(pixels, scale, front, SIZE, [SIZE, (24, 32)], [3.0, 1.5])
    assert (fine.shape, coarse.shape) == ((1, 2, 48, 64), (1, 2, 24, 32))
    assert float(fine[0, 0, 6, 10]) == pytest.approx(np.exp(-(0.5**2 + 0.5**2) / 3**2), rel=1e-5)
    assert float(fine[0, 1, 20, 30]) == pytest.approx(1.0)
    assert float(fine[0, 1, 23, 34]) == pytest.approx(np.exp(-25 / 6**2), rel=1e-5)
    # (10.5 + 0.5) / 2 − 0.5 = 5, (6.5 + 0.5) / 2 − 0.5 = 3
    assert float(coarse[0, 0, 3, 5]) == pytest.approx(1.0)
    hidden = draw_points(pixels, scale, ~front, SIZE, [SIZE], [3.0])[0]
    assert not hidden.any()


def test_points_far_outside_have_finite_gradients() -> None:
    pixels = torch.tensor([[[-1e9, 3.0], [5.0, 1e18]]], requires_grad=True)
    maps = draw_points(pixels, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), SIZE, [SIZE], [1.0])[0]
    maps.sum().backward()
    assert not maps.any()
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()


@pytest.mark.parametrize("bottleneck", ["edges", "points"])
def test_nothing_is_drawn_behind_a_camera(bottleneck: str) -> None:
    """A mirror image would tell the decoder of a keypoint that the camera cannot see."""
    model = make("volumetric", bottleneck)
    behind = 1.5 * ring(3).centers[:1].float()[None].expand(1, 4, 3)
    drawn = model.draw(behind, cameras(), SIZE, GRID)
    assert [level.shape[:2] for level in drawn] == [(3, 4 if bottleneck == "points" else 1)] * 2
    assert all(not level[0].any() for level in drawn)
    assert all(level.any() for level in model.draw(truth(1), cameras(), SIZE, GRID))


def test_keypoint3d_draws_near_points_wider() -> None:
    model = make("keypoint3d", "points")
    assert isinstance(model, Keypoint3dModel)
    center = center_depth(cameras(), GRID)[..., None]
    torch.testing.assert_close(
        model.point_scale(center * torch.tensor([1.0, 0.5, 2.0, 0.01]), cameras(), GRID),
        torch.tensor([1.0, 2.0, 0.5, 10.0]).expand(1, 3, 4),
    )


# -- runs --------------------------------------------------------------------------------------------------------------

MakeConfig = Callable[..., Config]


@pytest.fixture
def config(rig: Path) -> MakeConfig:
    """Settings small enough for tests, without the foreground; keyword arguments change those of training."""

    def make(method: Method, bottleneck: str = "edges", *, foreground: bool = False, **changes: object) -> Config:
        return Config(
            project=rig,
            cache=rig.parent / "cache",
            method=method,
            data=DataConfig(height=32, width=32, gap=4, foreground=foreground),
            model=replace(TINY, map_stride=4, bottleneck=bottleneck, silhouette_strides=(4, 2)),
            loss=LOSS,
            train=TrainConfig(
                **{"steps": 6, "batch": 3, "log_every": 1, "sample_every": 3, "save_every": 3, "warmup": 2} | changes  # type: ignore[arg-type]
            ),
        )

    return make


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without its clock."""
    with (run / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("method", "bottleneck"), [("triangulation", "edges"), ("keypoint3d", "points")])
def test_resumed_run_equals_an_unbroken_one(
    config: MakeConfig, tmp_path: Path, method: Method, bottleneck: str
) -> None:
    settings = config(method, bottleneck)
    assert train(settings, tmp_path / "whole", progress=False)
    broken = tmp_path / "broken"
    interrupted = Trainer(settings, broken, progress=False)
    for folder in ("checkpoints", "samples"):
        (broken / folder).mkdir(parents=True)
    save_config(settings, broken / "config.yaml")
    after_step = interrupted._after_step

    def press(*arguments: object) -> None:
        after_step(*arguments)  # type: ignore[arg-type]
        if interrupted.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    interrupted._after_step = press  # type: ignore[method-assign]
    assert interrupted.train() is False
    torch.manual_seed(12345)  # whatever happened in between
    assert resume(broken, progress=False) is True
    states = [load_model(run, settings)[0].state_dict() for run in (tmp_path / "whole", broken)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    optimizers = [
        torch.load(checkpoints(run)[-1][1] / "optimizer.bin", weights_only=False)
        for run in (tmp_path / "whole", broken)
    ]
    torch.testing.assert_close(optimizers[1]["state"], optimizers[0]["state"], rtol=0, atol=0)
    assert rows(tmp_path / "whole") == rows(broken)
    for row in rows(broken):
        assert {name for name in PENALTIES if float(row[name]) > 0} == set(OWN_TERMS[method])


@every_model
def test_the_foreground_has_its_terms_in_every_method(
    config: MakeConfig, tmp_path: Path, method: Method, bottleneck: str
) -> None:
    """Points have no skeleton, hence neither silhouette nor rigidity."""
    settings = config(method, bottleneck, foreground=True, steps=2, sample_every=2)
    assert train(settings, tmp_path / "run", progress=False)
    asked = {"containment", "identity"} | ({"silhouette", "rigidity"} if bottleneck == "edges" else set())
    for row in rows(tmp_path / "run"):
        found = {name: float(row[name]) for name in PENALTIES}
        # There is no tree yet in the first step.
        assert {name for name, value in found.items() if value > 0} - FOREGROUND <= set(OWN_TERMS[method])
        assert {name for name in FOREGROUND if found[name] > 0} == asked - (
            {"rigidity"} if row["step"] == "1" else set()
        )
        terms = {name: getattr(LOSS, name) * value for name, value in found.items()}
        regular = LOSS.length * float(row["length"]) + LOSS.separation * float(row["separation"])
        expected = float(row["reconstruction"]) + regular + sum(terms.values())
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-4)
    assert rows(tmp_path / "run")[-1]["active_edges"] == ("3" if bottleneck == "edges" else "0")
    before, after = build_model(settings), load_model(tmp_path / "run", settings)[0]
    assert before.body is not None
    assert after.body is not None
    assert not torch.equal(before.body.descriptors.head.weight, after.body.descriptors.head.weight)
    if bottleneck == "edges":
        assert not torch.equal(before.body.capsules.radii, after.body.capsules.radii)


@pytest.mark.parametrize(
    ("method", "bottleneck", "foreground"), [("depth", "points", True), ("keypoint3d", "points", False)]
)
def test_the_whole_way(config: MakeConfig, tmp_path: Path, method: Method, bottleneck: str, foreground: bool) -> None:
    """Training, prediction, evaluation and report, without a skeleton."""
    run = tmp_path / "run"
    train(config(method, bottleneck, foreground=foreground, steps=3), run, progress=False)
    assert load_config(run / "config.yaml").method == method
    assert len(predict(run, progress=False)) == 2
    result = evaluate(run, every=2, progress=False)
    assert all(np.isfinite(row["mpjpe"]) for row in result["rows"])
    probed = probes.row(run, every=2)
    assert float(probed["linear"]) == pytest.approx(result["rows"][0]["mpjpe"], abs=1e-4)
    assert float(probed["linear_on_fit_frames"]) < float(probed["linear"])
    other = simulate_rig(tmp_path / "other", frames=8, test_frames=6, image_size=(48, 48), workers=1, progress=False)
    elsewhere = probes.row(run, every=2, project=other)
    assert (elsewhere["fit_frames"], elsewhere["test_frames"]) == (4, 3)
    assert load_config(run / "config.yaml").project == config(method).project
    build_report(run)
    page = (run / "report.html").read_text()
    assert "drawn as points" in page
    assert ("Consistency" in page) == (method == "keypoint3d")
    assert '"edges": []' in (run / "skeleton.json").read_text()


@pytest.mark.parametrize("method", HEATMAP_METHODS)
def test_loss_falls(config: MakeConfig, tmp_path: Path, method: Method) -> None:
    settings = config(method, steps=40, sample_every=1000, save_every=1000)
    train(settings, tmp_path / "run", progress=False)
    loss = np.array([float(row["reconstruction"]) for row in rows(tmp_path / "run")])
    assert loss[-10:].mean() < 0.8 * loss[:3].mean()


def test_runs_from_before_methods_go_on(config: MakeConfig, tmp_path: Path) -> None:
    """config.yaml without `method` is volumetric; metrics.csv without today's columns gets them, and keeps its rows."""
    run = tmp_path / "run"
    train(config("volumetric", steps=2), run, progress=False)
    expected = rows(run)
    content = yaml.safe_load((run / "config.yaml").read_text())
    del content["method"], content["model"]["bottleneck"], content["model"]["heatmap_gain"]
    for name in PENALTIES:
        del content["loss"][name]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    with (run / "metrics.csv").open() as file:
        old = [{key: value for key, value in row.items() if key not in PENALTIES} for row in csv.DictReader(file)]
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, old[0])
        writer.writeheader()
        writer.writerows(old)
    assert resume(run, steps=3, progress=False)
    assert load_config(run / "config.yaml") == config("volumetric", steps=3)
    assert rows(run)[:2] == expected
    assert (run / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert len(rows(run)) == 3


def test_the_registry_names_files_and_settings() -> None:
    """A method's model is in the file of its name, and each of its penalties is a setting with that weight."""
    names = [penalty.name for method in METHODS.values() for penalty in method.penalties]
    assert len(set(names)) == len(names)
    assert len({method.title for method in METHODS.values()}) == len(METHODS) == len(NAMES)
    assert set(PENALTIES) == {*names, *FOREGROUND}
    for name, method in METHODS.items():
        assert method.model.__module__ == f"bkind3d.models.{name}"
        for penalty in method.penalties:
            assert getattr(LossConfig(), penalty.name) == penalty.weight
            assert penalty.help in (LossConfig.__doc__ or "")
    settings = [item.name for item in fields(LossConfig)]
    assert settings[-len(PENALTIES) :] == list(PENALTIES)


def test_wrong_names_are_refused(config: MakeConfig, tmp_path: Path) -> None:
    for section, name in ((None, "method"), ("model", "bottleneck")):
        settings = config("volumetric")
        setattr(settings if section is None else settings.model, name, "nonsense")
        with pytest.raises(InputError, match=rf"{name}: expected .*nonsense"):
            train(settings, tmp_path / "run", progress=False)


def test_a_checkpoint_of_another_method_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    train(config("depth", steps=1), tmp_path / "run", progress=False)
    for method in ("triangulation", "volumetric"):
        with pytest.raises(InputError, match="corrupt or foreign checkpoint"):
            load_model(tmp_path / "run", config(method))


def test_same_seed_same_network(config: MakeConfig) -> None:
    for method in NAMES:
        first, second = (build_model(config(method)).state_dict() for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
