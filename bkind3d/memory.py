"""How much memory a training step takes, found without computing anything.

The step of the given settings is taken with tensors that have shapes and no values (torch's fake tensors), forward and
backward, and every storage that it makes is counted from its first use until it is let go. So nothing is fitted: what a
network keeps is what this counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bkind3d.config import COARSEST_STRIDE, Config
from bkind3d.losses import Objective
from bkind3d.models.body import Body
from bkind3d.models.views import as_floats, foreground_only
from bkind3d.run import build_model
from bkind3d_kernels import VoxelGrid

MOMENTS = {"adamw": 2, "sgd": 1}  # tensors in the shape of each weight that an optimiser keeps
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations inside the block return.

    Attributes:
        live: Of those that something still holds.
        peak: The most that `live` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for value in tree_leaves(outputs):
            if isinstance(value, Tensor):
                self._take(value.untyped_storage())
        return outputs

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def free(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


class _PoolingAsOnGpu(TorchFunctionMode):
    """Pooling of volumes keeps its dtype under autocast, as on a GPU; the CPU's autocast gives float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.max_pool3d:
            with torch.autocast("cpu", enabled=False):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    with _PoolingAsOnGpu(), torch.autocast("cpu", PRECISIONS[precision], enabled=precision != "no"):
        yield


def training_memory(config: Config, views: int, voxels: tuple[int, int, int]) -> int:
    """Peak of the bytes allocated in a training step: weights, gradients, optimiser state, batch and all in between.

    What the libraries below take for themselves comes on top: workspace of convolutions, on a GPU some hundred MB of
    the driver and what the allocator cannot use.

    Args:
        config: All settings, valid ones; its project is not read, nor are files of weights.
        views: Number of cameras M.
        voxels: Shape (X, Y, Z) of the grid.
    """
    config = replace(
        config,
        model=replace(config.model, encoder_weights="none"),
        loss=replace(config.loss, network_weights="random"),
    )
    count = Allocations()
    # The step is that of `Trainer._train_step`, where the gradients of the step before live until the loss is there.
    with FakeTensorMode(allow_non_fake_inputs=True), count:
        model = build_model(config).train()
        objective = Objective(config.loss, 1.0).train()
        weights = list(model.parameters())
        state = [torch.empty_like(weight) for weight in weights for _ in range(MOMENTS[config.train.optimizer])]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        batch = _batch(config, views)
        images, body = as_floats(batch["images"]), None
        if config.data.foreground:
            images = foreground_only(images, as_floats(batch["masks"]))
            body = Body(batch["distances"], 1.0)
        grid = VoxelGrid.box((0.0, 0.0, 0.0), voxels, voxels)
        grid = model.training_grid(grid, (0.0, 0.0, 1.0), 2 * config.train.batch, torch.Generator())
        with _autocast(config.train.precision):
            found = model(images, batch["projections"], grid, body)
        target = model.target(images, config.loss)
        terms = objective(found, target, model.skeleton, config.loss.regularise_after)
        for weight in weights:
            weight.grad = None
        terms["loss"].backward()
        del state
    return count.peak


def _batch(config: Config, views: int) -> dict[str, Tensor]:
    """What the loader gives, in its shapes and dtypes."""
    n, side = config.train.batch, config.data.window
    height, width = (side, side) if side else (config.data.height, config.data.width)
    pictures = (n, 2, views, height, width)
    batch = {
        "images": torch.empty(n, 2, views, 3, height, width, dtype=torch.uint8),
        "projections": torch.empty((n, 2, views, 3, 4) if side else (n, views, 3, 4)),
    }
    if config.data.foreground:
        batch["masks"] = torch.empty(pictures, dtype=torch.uint8)
        batch["distances"] = torch.empty(pictures)
    return batch


@dataclass(frozen=True)
class Saving:
    """What a training step takes with other settings.

    Args:
        change: The settings, such as "train.batch 2".
        bytes: That it then takes.
    """

    change: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a training step takes, and what it takes with one setting changed.

    Args:
        bytes: That it takes.
        savings: The changes that lower it, the least first.
    """

    bytes: int
    savings: list[Saving]

    def line(self) -> str:
        """Both, in words."""
        less = [f"{gigabytes(saving.bytes)} with {saving.change}" for saving in self.savings]
        return "; ".join([gigabytes(self.bytes), *less])


def estimate(config: Config, views: int, voxels: tuple[int, int, int]) -> Estimate:
    """What a training step takes, and which settings lower it; arguments as :func:`training_memory`."""
    before = training_memory(config, views, voxels)
    found = [Saving(change, training_memory(other, views, shape)) for change, other, shape in _changes(config, voxels)]
    lower = [saving for saving in found if saving.bytes < before]
    return Estimate(before, sorted(lower, key=lambda saving: saving.bytes))


def _changes(config: Config, voxels: tuple[int, int, int]) -> Iterator[tuple[str, Config, tuple[int, int, int]]]:
    """One setting after the other, changed: its name and new value, all settings, the grid's shape."""
    data, model, train = config.data, config.model, config.train
    volumetric = config.method == "volumetric"
    stages: tuple[Literal["none", "volume", "all"], ...] = ("none", "volume", "all")
    for stage in stages[stages.index(train.checkpointing) + 1 :] if model.norm == "group" else ():
        if volumetric or stage == "all":
            yield f"train.checkpointing {stage}", replace(config, train=replace(train, checkpointing=stage)), voxels
    if train.precision == "no":
        yield "train.precision bf16", replace(config, train=replace(train, precision="bf16")), voxels
    if train.batch > 1:
        half = train.batch // 2
        yield f"train.batch {half}", replace(config, train=replace(train, batch=half)), voxels
    if volumetric and model.voxels >= 4:
        half = model.voxels // 2
        x, y, z = (max(1, round(side * half / model.voxels)) for side in voxels)
        yield f"model.voxels {half}", replace(config, model=replace(model, voxels=half)), (x, y, z)
    if volumetric and model.cascade and model.cascade_voxels >= 4:
        half = model.cascade_voxels // 2
        yield f"model.cascade_voxels {half}", replace(config, model=replace(model, cascade_voxels=half)), voxels
    less = _three_quarters(COARSEST_STRIDE[model.encoder])
    if data.window:
        side = less(data.window)
        yield f"data.window {side}", replace(config, data=replace(data, window=side)), voxels
    else:
        height, width = less(data.height), less(data.width)
        smaller = replace(config, data=replace(data, height=height, width=width))
        yield f"data.height {height} data.width {width}", smaller, voxels


def _three_quarters(stride: int) -> Callable[[int], int]:
    """Three quarters of a length, rounded down to a multiple of `stride` that is not 0."""
    return lambda length: max(stride, length * 3 // 4 // stride * stride)


def gigabytes(count: int) -> str:
    """A number of bytes to two digits, as "51 GB"."""
    return f"{float(f'{count / 1e9:.2g}'):g} GB"
