"""The memory that is foretold for a training step: what it counts, and which setting it names."""

from dataclasses import replace

import torch
from tiny_model import TINY
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bkind3d.config import Config, DataConfig, LossConfig, TrainConfig
from bkind3d.memory import Allocations, estimate, gigabytes, training_memory
from bkind3d.train import out_of_memory

SETTINGS = Config(
    method="volumetric",
    data=DataConfig(height=64, width=64, foreground=False),
    model=replace(TINY, voxels=32),
    loss=LossConfig(network="none"),
    train=TrainConfig(batch=4),
)
CUBE = (32, 32, 32)


def test_allocations_are_counted_once_and_until_they_are_let_go() -> None:
    def work() -> Tensor:
        first = torch.empty(1000)
        second = first + 1
        return second.view(10, 100)[2:]

    with FakeTensorMode(), Allocations() as count:
        kept = work()
        assert (count.live, count.peak) == (4000, 8000)
        del kept
    assert count.live == 0


def test_memory_goes_with_the_batch() -> None:
    two, four = (training_memory(replace(SETTINGS, train=TrainConfig(batch=batch)), 4, CUBE) for batch in (2, 4))
    assert 1.9 * two < four < 2 * two  # the weights are the same


def test_the_setting_that_helps_most_is_named() -> None:
    found = estimate(SETTINGS, 4, CUBE)
    best, *others = found.savings
    assert best.change == "model.voxels 16"  # the volume has nearly all of it
    smaller = replace(SETTINGS, model=replace(SETTINGS.model, voxels=16))
    assert best.bytes == training_memory(smaller, 4, (16, 16, 16)) < 0.4 * found.bytes
    names = {saving.change for saving in found.savings}
    assert {"train.batch 2", "train.checkpointing volume", "train.checkpointing all", "train.precision bf16"} < names
    assert all(best.bytes <= saving.bytes < found.bytes for saving in others)
    assert out_of_memory(SETTINGS, 4, CUBE) == (
        f"out of memory: a training step takes about {gigabytes(found.bytes)}; model.voxels 16 lowers that most, "
        f"to {gigabytes(best.bytes)}"
    )


def test_the_papers_sizes_take_no_memory_here() -> None:
    """Tens of gigabytes, and half precision keeps half of most of it; nothing of it is allocated."""
    paper = Config(method="volumetric", data=DataConfig(foreground=False), train=TrainConfig(batch=8))
    whole = training_memory(paper, 6, (64, 64, 64))
    half = training_memory(replace(paper, train=TrainConfig(batch=8, precision="bf16")), 6, (64, 64, 64))
    assert 30e9 < whole < 60e9
    assert 0.45 * whole < half < 0.75 * whole


def test_bytes_in_words() -> None:
    counts = (50_900_000_000, 1_234_000_000, 81_000_000)
    assert [gigabytes(count) for count in counts] == [
        "51 GB",
        "1.2 GB",
        "0.081 GB",
    ]
