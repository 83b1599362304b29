"""The CUDA kernel of soft_argmax3d, emulated on the CPU: packs and blocks, their order, and what it alone refuses."""

import pytest
import torch
from cases import soft_argmax3d as cases
from cases.soft_argmax3d import backward, compare, forward, last, logits_of, random_grads
from hypothesis import given, settings
from native import emulation

pytestmark = pytest.mark.skipif(emulation.MISSING is not None, reason=str(emulation.MISSING))
OPERATORS = torch.ops.bkind3d_emulated
# One slab in packs of 16 bytes, several, lines that fit no pack, long lines, more keypoints than a block takes.
SHAPES = [(2, 3, 4, 5, 8), (1, 2, 11, 32, 32), (1, 2, 13, 27, 31), (1, 2, 1, 2, 5200), (2, 37, 4, 3, 7)]


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    emulation.load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_strides(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = logits_of(*shape, dtype=dtype)
    compare(OPERATORS, logits, 0.7)
    views = cases.strided(logits)
    for name in ("channels last", "slice", "every second", "not aligned", "z first", "batch last"):
        compare(OPERATORS, views[name])


@settings(max_examples=40, deadline=None)
@given(**cases.volumes([1, 2, 17, 33], most_voxels=6000))
def test_any_shape(n, joints, shape, temperature, dtype, channels_last) -> None:
    logits = logits_of(n, joints, *shape, dtype=dtype)
    compare(OPERATORS, last(logits) if channels_last else logits, temperature)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_order_of_blocks_and_threads_changes_nothing(channels_last: bool) -> None:
    logits = logits_of(1, 3, 20, 20, 32)
    logits = last(logits) if channels_last else logits
    results = []
    for descending in (False, True):
        with emulation.order(descending=descending):
            outputs = forward(OPERATORS, logits)
            results.append((*outputs, backward(OPERATORS, random_grads(outputs[0]), logits, 1.0, outputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("channels_last", [False, True])
def test_argmax_is_the_lowest_index_from_the_last_block_and_thread(channels_last: bool) -> None:
    for shape, places in cases.LARGE_TIES[OPERATORS.name]:
        logits = cases.tied_logits(shape, places)
        with emulation.order(descending=True):
            cases.check_ties(OPERATORS, last(logits) if channels_last else logits, places)


def test_volumes_whose_places_are_no_32_bit_numbers_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"logits: expected fewer than 2\^31 voxels"):
        forward(OPERATORS, torch.zeros(()).expand(1, 2, 2, 2, 2**29))
