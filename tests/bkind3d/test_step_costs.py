"""What a training step keeps for its backward pass, and what it copies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from bkind3d.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig, validate
from bkind3d.errors import InputError
from bkind3d.models.layers import channels_last, leading
from bkind3d.models.methods import Method
from bkind3d.models.reconstruction import ReconstructionDecoder
from bkind3d.models.volume import VolumeNetwork
from bkind3d.train import Trainer
from bkind3d_kernels import GroupNormAct

PAPER = (16, 32, 64, 128, 128, 128, 128)  # ModelConfig.volume_channels


class Kept:
    """Bytes that autograd keeps, each storage once, weights left out."""

    def __init__(self, network: nn.Module) -> None:
        self.weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self.storages: dict[int, Any] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def without_autocast(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward = module.forward

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(x)

    return run


def as_autocast_runs_torchs(norm: GroupNormAct, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Group normalisation, an addition and a ReLU as CUDA's autocast runs them: in float32, contiguous in and out."""
    with torch.autocast("cpu", enabled=False):
        y = nn.functional.group_norm(x.float().contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        y = y if residual is None else y + residual
        return y.relu_() if norm.activation == "relu" else y


@pytest.mark.parametrize(
    ("torchs", "checkpointing", "least", "most"),
    [(False, False, 13e9, 14e9), (False, True, 4e9, 5e9), (True, False, 33e9, 34e9)],
)
def test_the_volume_network_keeps_each_activation_once_and_in_bfloat16(
    torchs: bool, checkpointing: bool, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 moments of 64 × 64 × 33 voxels, the paper's network under autocast; nothing is computed."""
    if torchs:
        monkeypatch.setattr(GroupNormAct, "forward", as_autocast_runs_torchs)
    network = VolumeNetwork(32, 15, PAPER, 7, 3, "group")
    channels_last(network)
    network.checkpointing = checkpointing
    network.pool.forward = without_autocast(network.pool)  # the CPU's autocast gives float32 there, CUDA's does not
    kept = Kept(network)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        volume = torch.empty(48, 32, 64, 64, 33, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            features = network(volume.requires_grad_())
    assert features.shape == (48, 32, 64, 64, 33)
    if not torchs:
        assert features.dtype == torch.bfloat16
        assert features.is_contiguous(memory_format=torch.channels_last_3d)
    assert volume.nbytes < least <= kept.bytes <= most


def gradients(network: nn.Module, run: Callable[[], Tensor]) -> tuple[int, list[Tensor]]:
    """Kept bytes, and the output and gradients of the weights."""
    kept = Kept(network)
    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        output = run()
    output.square().sum().backward()
    found = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return kept.bytes, [output, *found]


def test_checkpointing_keeps_less_and_changes_no_bit() -> None:
    torch.manual_seed(0)
    volume_network = VolumeNetwork(4, 3, (4, 8, 8), 3, 2, "group")
    decoder = ReconstructionDecoder((8, 16), (2, 4), (4, 2), (16, 8), 2, 3, "group")
    volume = torch.randn(2, 4, 9, 8, 7).to(memory_format=torch.channels_last_3d).requires_grad_()
    features = [torch.randn(2, 8, 12, 16).requires_grad_(), torch.randn(2, 16, 6, 8).requires_grad_()]
    drawn = [torch.rand(2, 2, 6, 8).requires_grad_(), torch.rand(2, 2, 12, 16).requires_grad_()]
    for network, run in (
        (volume_network, lambda: volume_network(volume)),
        (decoder, lambda: decoder(features, drawn, (24, 32))),
    ):
        channels_last(network)
        expected_bytes, expected = gradients(network, run)
        network.checkpointing = True
        less, got = gradients(network, run)
        assert less < 0.6 * expected_bytes
        assert len(got) == len(expected) > 5
        assert all(map(torch.equal, got, expected))


def test_the_gradient_of_a_leading_part_has_the_strides_of_the_whole() -> None:
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    part = leading(x, 2)
    assert torch.equal(part, x[:2])
    (gradient,) = torch.autograd.grad((part * part).sum(), x)
    assert gradient.stride() == x.stride()
    assert torch.equal(gradient[:2], 2 * x[:2])
    assert not gradient[2:].any()
    assert torch.autograd.gradcheck(lambda x: leading(x, 3), x)


# ---- a step of training ----


@pytest.fixture
def trainer(rig: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(method: Method, **changes: Any) -> Trainer:
        config = Config(
            project=rig,
            cache=rig.parent / "cache",
            method=method,
            data=DataConfig(height=64, width=64, gap=4, window=40),
            model=ModelConfig(
                keypoints=4, encoder="small", pyramid_channels=8, channels=4, voxels=16, volume_channels=(4, 4, 8),
                volume_stem=3, volume_blocks=1, edge_strides=(8, 4), edge_sigmas=(1.0, 1.5), decoder_channels=(8, 8),
                turn_volume=True, silhouette_strides=(4, 2),
            ),
            loss=LossConfig(
                target_channels="grey", network="none", pixel_scales=2, regularise_after=1.0, **changes.pop("loss", {})
            ),
            train=TrainConfig(steps=3, batch=3, **changes),
        )  # fmt: skip
        validate(config)
        return Trainer(config, tmp_path / "run", progress=False)

    return make


# Where copies of maps and volumes come from, and why they stay. By the outermost operation of a forward pass, or the
# node of the backward pass.
REASONS = {
    "UpsampleBilinear2DBackward0": "the gradient of a part of a joined tensor has gaps, which torch's kernel closes",
    "group_norm_actBackward": "descriptors are sampled from contiguous features",
    "SliceBackward0": "similarities of descriptors without those of a picture with itself",
    "SelectBackward0": "maps of one channel without it",
    "_LeadingBackward": "zeros for the frames t + gap",
    "ConvolutionBackward0": "the gradient of maps or a joined tensor's part; weights of a few kilobytes",
    "ViewBackward0": "drawn maps, one channel, by time and view",
    "PowBackward0": "a factor of one element",
    "AmaxBackward0": "health of heatmaps",
    "softmax": "heatmaps, keypoint by keypoint",
    "contiguous": "pictures come with their channels first",
    "flatten": "pictures and masks of both times side by side",
    "to": "bytes to floats",
}


def copies(training: Trainer) -> set[str]:
    """Where a step copies what has at least three dimensions and is not small."""
    batches = training._batches()
    training._train_step(*next(batches))
    batch = next(batches)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        training._train_step(*batch)
    found = set()
    for event in recorded.events():
        shape = event.input_shapes[0] if event.input_shapes else []
        if event.name != "aten::copy_" or len(shape) < 3 or torch.Size(shape).numel() < 2048:
            continue
        chain = [""]
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("autograd::engine"):
            chain.append(parent.name.removeprefix("aten::"))
            parent = parent.cpu_parent
        found.add(chain[-1])
    return found


def test_maps_are_copied_for_known_reasons_alone(trainer: Callable[..., Trainer]) -> None:
    found = set.union(*(copies(trainer(method)) for method in ("volumetric", "triangulation")))
    assert found == set(REASONS)


def test_checkpointing_changes_no_step(trainer: Callable[..., Trainer]) -> None:
    def losses(**changes: Any) -> list[float]:
        training = trainer("volumetric", **changes)
        return [float(training._train_step(*batch)["loss"]) for batch, _ in zip(training._batches(), range(3))]

    expected = losses()
    assert len(expected) == 3
    assert losses(checkpointing="volume") == expected
    assert losses(checkpointing="all") == expected


def test_fewer_second_looks(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    training = trainer("volumetric", loss={"equivariance_share": 0.5})
    looks = []
    locate = training.model._locate
    monkeypatch.setattr(training.model, "_locate", lambda maps, *rest: looks.append(len(maps)) or locate(maps, *rest))
    row = training._train_step(*next(training._batches()))
    assert looks == [6, 2]
    assert float(row["equivariance"]) > 0


def test_settings_that_cannot_be() -> None:
    for changes, message in (
        (
            {"train": TrainConfig(checkpointing="volume"), "model": ModelConfig(norm="batch")},
            r"train\.checkpointing: expected none, or model\.norm group",
        ),
        (
            {"model": ModelConfig(backend="bogus")},
            r"model\.backend: expected auto, cuda, cpp, triton, reference, got bogus",
        ),
        ({"loss": LossConfig(equivariance_share=0.0)}, r"loss\.equivariance_share: expected a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            validate(Config(**changes))
