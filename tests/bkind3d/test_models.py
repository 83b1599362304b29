"""The networks: shapes, symmetry over views, key names, weight files, and gradients that reach everything."""

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation
from tiny_model import TINY
from torch import Tensor

from bkind3d.config import ModelConfig
from bkind3d.errors import InputError
from bkind3d.models.encoder import ResNetEncoder, SmallEncoder, build_encoder
from bkind3d.models.skeleton import Skeleton
from bkind3d.models.vgg import CONVOLUTIONS, WIDTHS, VggFeatures
from bkind3d.models.volume import VolumeNetwork
from bkind3d.models.volumetric import SHIFT, VolumetricModel, turned
from bkind3d_kernels import SoftArgmax3d, VoxelGrid


def ring(views: int, size: int, radius: float = 3.0) -> torch.Tensor:
    """Pinhole cameras on a circle that look at the origin: (1, M, 3, 4)."""
    rows = []
    for turn in torch.arange(views) * 2 * torch.pi / views + 0.3:
        center = torch.tensor([radius * torch.cos(turn), radius * torch.sin(turn), 1.0])
        forward = -center / center.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0]))
        right = right / right.norm()
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        middle = (size - 1) / 2
        intrinsics = torch.tensor([[1.5 * size, 0, middle], [0, 1.5 * size, middle], [0, 0, 1]])
        rows.append(intrinsics @ torch.cat([rotation, (-rotation @ center)[:, None]], dim=1))
    return torch.stack(rows)[None]


def test_an_operation_without_kernels_in_a_backend_takes_another() -> None:
    config = ModelConfig(backend="cuda")
    assert [config.backend_of(op) for op in ("unproject", "linear_soft_argmax3d")] == ["cuda", "auto"]
    assert ModelConfig(backend="reference").backend_of("linear_soft_argmax3d") == "reference"


@pytest.fixture
def model() -> VolumetricModel:
    torch.manual_seed(0)
    return VolumetricModel(TINY, outputs=1)


def test_shapes(model: VolumetricModel) -> None:
    images = torch.rand(2, 2, 3, 3, 32, 48)
    grid = VoxelGrid.box((0.0, 0.0, 0.0), (2.0, 2.0, 1.0), (9, 7, 5))
    found = model(images, ring(3, 32), grid)
    assert found.positions.shape == (2, 2, 4, 3)
    assert found.confidence.shape == (2, 2, 4)
    assert found.difference.shape == (2, 3, 1, 32, 48)
    assert (found.positions[..., :2].abs() <= 1).all()
    assert (found.positions[..., 2].abs() <= 0.5).all()


def test_times_and_samples_keep_their_places(model: VolumetricModel) -> None:
    """A batch equals its samples one by one: nothing is mixed between samples, times or views."""
    images, grid, cameras = torch.rand(2, 2, 3, 3, 32, 32), VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8), ring(3, 32)
    whole = model(images, cameras, grid)
    for n in range(2):
        one = model(images[n : n + 1], cameras, grid)
        torch.testing.assert_close(one.positions[0], whole.positions[n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.difference[0], whole.difference[n], rtol=1e-4, atol=1e-4)
        for t in range(2):
            alone = model.detect(images[n : n + 1, t], cameras, grid)
            torch.testing.assert_close(alone.positions[0], whole.positions[n, t], rtol=1e-4, atol=1e-5)


def test_symmetric_over_views(model: VolumetricModel) -> None:
    images, grid, cameras = torch.rand(1, 2, 3, 3, 32, 32), VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8), ring(3, 32)
    order = torch.tensor([2, 0, 1])
    straight, permuted = model(images, cameras, grid), model(images[:, :, order], cameras[:, order], grid)
    torch.testing.assert_close(permuted.positions, straight.positions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.difference, straight.difference[:, order], rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_parameter(model: VolumetricModel) -> None:
    found = model(torch.rand(1, 2, 3, 3, 32, 32), ring(3, 32), VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8))
    found.difference.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias in front of a normalisation is the one thing that cannot matter.
    assert [name for name in silent if not name.endswith(".bias")] == []


def test_keypoints_start_apart(model: VolumetricModel) -> None:
    """The gain breaks the symmetry: keypoints that all start in the centre never part."""
    found = model.detect(torch.rand(1, 3, 3, 32, 32), ring(3, 32), VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8))
    assert torch.pdist(found.positions[0]).min() > 0.02


@pytest.mark.parametrize("shape", [(16, 16, 16), (24, 24, 12), (13, 7, 5), (2, 3, 1)])
def test_volume_network_takes_any_shape(shape: tuple[int, int, int]) -> None:
    network = VolumeNetwork(3, 5, (4, 4, 8, 8), 7, 3, "group")
    assert network.head(network(torch.rand(1, 3, *shape))).shape == (1, 5, *shape)


def test_volume_network_of_the_paper() -> None:
    """148 GMAC for one 64³ volume with C = 32 and J = 15, counted on the meta device."""
    network = VolumeNetwork(32, 15, ModelConfig().volume_channels, 7, 3, "group").to("meta")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network.head(network(torch.empty(1, 32, 64, 64, 64, device="meta")))
    assert counter.get_total_flops() / 2e9 == pytest.approx(148, rel=0.05)


def test_the_head_is_a_convolution_inside_the_soft_argmax() -> None:
    """Positions and gradients are those of a convolution and a soft-argmax; no tensor of the logits' size is kept."""
    torch.manual_seed(0)
    model = VolumetricModel(replace(TINY, keypoints=5), outputs=1)
    grid = VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8)
    maps, cameras = torch.rand(2, 3, TINY.channels, 8, 8), ring(3, 8).expand(2, -1, -1, -1)
    kept: list[tuple[int, ...]] = []

    def found(positions: Tensor, peak: Tensor) -> tuple[Tensor, ...]:
        parameters = list(model.volume.parameters())
        gradients = torch.autograd.grad(positions.square().sum() + peak.sum(), parameters, allow_unused=True)
        return positions, peak, *(g for g, p in zip(gradients, parameters) if p is not model.volume.head.bias)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        fused = model._look(model.volume, maps, cameras, grid)
    logits = model.volume.head(model.volume(model.unproject(maps, cameras, grid)))
    assert tuple(logits.shape) not in kept
    plain = SoftArgmax3d(temperature=1 / TINY.logit_gain, return_peak=True)(logits, grid)
    for a, b in zip(found(*fused), found(*plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_keys_and_sizes(depth: int) -> None:
    encoder = ResNetEncoder(depth)
    keys = set(encoder.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.1.bn2.bias"} <= keys
    assert "layer2.0.downsample.0.weight" in keys
    assert ("layer1.0.downsample.0.weight" in keys) == (depth == 50)
    # torchvision's backbones without the classifier: 11.18 and 23.51 million parameters.
    assert sum(p.numel() for p in encoder.parameters()) == {18: 11_176_512, 50: 23_508_032}[depth]
    for feature, stride, channels in zip(encoder(torch.rand(1, 3, 64, 96)), encoder.strides, encoder.channels):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)


def test_resnet_weights_from_file(tmp_path) -> None:
    torch.manual_seed(1)
    source = ResNetEncoder(18)
    state = source.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    save_file(state, tmp_path / "resnet18.safetensors")
    torch.save(state, tmp_path / "resnet18.pth")
    for name in ("resnet18.safetensors", "resnet18.pth"):
        loaded = build_encoder("resnet18", str(tmp_path / name))
        torch.testing.assert_close(loaded.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("encoder", "content", "message"),
    [
        ("small", None, "small encoder has no published weights"),
        ("resnet50", {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "not the weights of torchvision's resnet50"),
        ("resnet18", {"other": torch.zeros(1)}, "not the weights of torchvision's resnet18"),
    ],
)
def test_foreign_encoder_weights(tmp_path, encoder: str, content: dict | None, message: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(content or {"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=message):
        build_encoder(encoder, str(path))


def test_unreadable_encoder_weights(tmp_path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"not a file of torch")
    with pytest.raises(InputError, match=r"broken\.pth: not a readable state dict"):
        build_encoder("resnet18", str(tmp_path / "broken.pth"))
    with pytest.raises(InputError, match="no such weights file"):
        build_encoder("resnet18", str(tmp_path / "absent.pth"))


def test_small_encoder_sizes() -> None:
    encoder = SmallEncoder()
    for feature, stride, channels in zip(encoder(torch.rand(2, 3, 32, 48)), encoder.strides, encoder.channels):
        assert feature.shape == (2, channels, 32 // stride, 48 // stride)


def test_wrong_strides_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.map_stride"):
        VolumetricModel(ModelConfig(**{**TINY.__dict__, "map_stride": 3}), 1)
    with pytest.raises(InputError, match=r"model\.edge_strides"):
        VolumetricModel(ModelConfig(**{**TINY.__dict__, "edge_strides": (4, 8)}), 1)


# -- skeleton ----------------------------------------------------------------------------------------------------------


def test_skeleton_averages_move_for_active_edges_alone() -> None:
    skeleton = Skeleton(3, "softplus", 0.0, 0.0, 0.3)
    skeleton.parameter.data = torch.tensor([2.0, -5.0, 2.0])
    assert skeleton.active.tolist() == [True, False, True]
    skeleton.update_averages(torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]), 0.9)
    assert skeleton.average.tolist() == [2.0, 0.0, 4.0]
    skeleton.update_averages(torch.tensor([[3.0, 9.0, 4.0]]), 0.9)
    torch.testing.assert_close(skeleton.average, torch.tensor([2.1, 0.0, 4.0]))
    assert skeleton.known.tolist() == [True, False, True]
    assert {"parameter", "average", "known", "observed", "tree"} == set(skeleton.state_dict())


def test_skeleton_activations() -> None:
    for name, function in (("softplus", torch.nn.functional.softplus), ("relu", torch.relu)):
        skeleton = Skeleton(4, name, 0.1, 1.0, 0.3)
        torch.testing.assert_close(skeleton.weights, function(skeleton.parameter))


# -- VGG ---------------------------------------------------------------------------------------------------------------


def test_vgg_has_torchvisions_names_and_sizes() -> None:
    network = VggFeatures("vgg19", "random", 5)
    assert network.state_dict()["features.0.weight"].shape == (64, 3, 3, 3)
    assert network.state_dict()["features.30.weight"].shape == (512, 512, 3, 3)  # conv5_2 of torchvision's vgg19
    assert VggFeatures("vgg16", "random", 5).state_dict()["features.26.weight"].shape == (512, 512, 3, 3)
    sizes = [tuple(feature.shape[1:]) for feature in network(torch.rand(1, 3, 32, 32))]
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_vgg_random_weights_depend_on_the_seed_alone() -> None:
    first, second = VggFeatures("vgg16", "random", 2, seed=3), VggFeatures("vgg16", "random", 2, seed=3)
    torch.testing.assert_close(first.state_dict(), second.state_dict())
    assert not torch.equal(
        first.state_dict()["features.0.weight"], VggFeatures("vgg16", "random", 2, seed=4).features[0].weight
    )


def test_vgg_from_torchvision_file(tmp_path) -> None:
    source = VggFeatures("vgg16", "random", 3, seed=1)
    save_file(source.state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.safetensors")
    loaded = VggFeatures("vgg16", str(tmp_path / "vgg16.safetensors"), 3)
    torch.testing.assert_close(loaded.state_dict(), source.state_dict())
    with pytest.raises(InputError, match=r'"features\.14\.weight" is missing'):
        VggFeatures("vgg16", str(tmp_path / "vgg16.safetensors"), 4)


def test_vgg_from_hed_file(tmp_path) -> None:
    """HED's VGG-16 takes BGR in 0 to 255 less its mean; the loaded network takes RGB in 0 to 1 and must agree."""
    rng = np.random.default_rng(0)
    previous = 3
    kernels: list[tuple[np.ndarray, np.ndarray]] = []
    with h5py.File(tmp_path / "hed.weights.h5", "w") as file:
        for block in range(2):
            for index in range(CONVOLUTIONS["vgg16"][block]):
                name = f"block{block + 1}/layers/conv2d{f'_{index}' if index else ''}/vars"
                kernel = rng.normal(0, 0.05, (3, 3, previous, WIDTHS[block])).astype(np.float32)
                bias = rng.normal(0, 1, WIDTHS[block]).astype(np.float32)
                file[f"{name}/0"], file[f"{name}/1"] = kernel, bias
                kernels.append((kernel, bias))
                previous = WIDTHS[block]
    images = torch.rand(1, 3, 8, 8)
    bgr = 255 * images.flip(1) - torch.tensor([104.007, 116.669, 122.679]).view(3, 1, 1)
    expected = bgr
    for kernel, bias in kernels[:2]:
        weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
        expected = torch.relu(torch.nn.functional.conv2d(expected, weight, torch.from_numpy(bias), padding=1))
    got = VggFeatures("vgg16", str(tmp_path / "hed.weights.h5"), 2)(images)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="HED weights are a VGG-16"):
        VggFeatures("vgg19", str(tmp_path / "hed.weights.h5"), 2)
    with pytest.raises(InputError, match="not the HED weights"):
        VggFeatures("vgg16", str(tmp_path / "hed.weights.h5"), 3)


@pytest.mark.parametrize("up", [(0.0, 0.0, 1.0), (0.0, -2.0, 0.0), (1.0, 1.0, 1.0)])
def test_the_volume_turns_about_the_vertical_through_its_centre(up: tuple[float, float, float]) -> None:
    grid = VoxelGrid.box((0.5, -1.0, 2.0), (1.0, 1.2, 0.6), (5, 7, 4)).to(dtype=torch.float64)
    angles = torch.tensor([0.0, 0.3, math.pi / 2, math.pi])
    center, axis = torch.tensor([0.5, -1.0, 2.0]).double(), np.array(up) / np.linalg.norm(up)
    still = grid.coordinates()[0] - center
    for angle, points in zip(angles, turned(grid, up, angles, torch.zeros(4, 3)).coordinates(), strict=True):
        matrix = Rotation.from_rotvec(float(angle) * axis).as_matrix()
        torch.testing.assert_close(points - center, still @ torch.from_numpy(matrix).T, rtol=0, atol=1e-6)


def test_a_shift_goes_along_the_sides_of_the_turned_grid() -> None:
    grid = VoxelGrid.box((0.5, -1.0, 2.0), (1.0, 1.2, 0.6), (5, 7, 4)).to(dtype=torch.float64)
    angles = torch.tensor([0.0, math.pi / 2])
    shift = torch.tensor([[0.1, 0.2, -0.5], [0.1, 0.2, -0.5]])
    there, here = (turned(grid, (0, 0, 1), angles, moved).coordinates() for moved in (shift, torch.zeros(2, 3)))
    sides = torch.tensor([1.0, 1.2, 0.6]).double()
    x, y, z = (shift[0] * sides).tolist()
    expected = torch.tensor([[x, y, z], [-y, x, z]]).double()
    torch.testing.assert_close(there - here, expected[:, None, None, None].expand_as(here), rtol=0, atol=1e-6)


def test_every_moment_of_a_training_step_has_a_turn_and_a_shift_of_its_own() -> None:
    grid = VoxelGrid.cube((0.0, 0.0, 0.0), 1.0, 4)
    config = replace(TINY, turn_volume=True)
    first = VolumetricModel(config, 1).training_grid(grid, (0, 0, 1), 50, torch.Generator())
    assert first.affine.shape == (50, 3, 4)
    assert torch.pdist(first.affine[:, 0, :2]).min() > 1e-5
    torch.testing.assert_close(first.affine[:, 2, :3], grid.affine[0, 2, :3].expand(50, 3), rtol=0, atol=1e-6)
    centers = first.coordinates().mean((1, 2, 3)).abs()
    assert 0.9 * SHIFT < centers[:, 2].max() <= SHIFT + 1e-6
    assert centers[:, :2].norm(dim=-1).max() <= SHIFT * 2**0.5 + 1e-6
    again = VolumetricModel(config, 1).training_grid(grid, (0, 0, 1), 50, torch.Generator())
    assert torch.equal(first.affine, again.affine)
    still = VolumetricModel(replace(config, turn_volume=False), 1)
    assert still.training_grid(grid, (0, 0, 1), 6, torch.Generator()) is grid


def test_the_turn_error_compares_two_looks_with_the_motion() -> None:
    torch.manual_seed(0)
    model, images, projections = (
        VolumetricModel(replace(TINY, turn_volume=True), 1),
        torch.rand(2, 2, 3, 3, 32, 32),
        ring(3, 32),
    )
    still = VoxelGrid.cube((0.0, 0.0, 0.0), 2.0, 8)
    grid = model.training_grid(still, (0, 0, 1), 4, torch.Generator())
    found = model(images, projections, grid)
    other = VoxelGrid(grid.affine[[3, 0]], grid.shape)
    again = model.detect(images[:, 0], projections, other)
    error = (again.positions - found.positions[:, 0]).square().sum(-1).mean(0)
    spread = found.positions.flatten(0, 1).var(0, correction=0).sum(-1)
    expected = (error / (2 * spread + 0.02**2)).mean()
    torch.testing.assert_close(found.penalties["equivariance"], expected)
    assert expected > 1e-5
    assert model.eval()(images, projections, still).penalties == {}
