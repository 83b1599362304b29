import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_rig import ring
from torch.utils.data import DataLoader

from bkind3d.data import CachedRecording, FrameCache, PairDataset, gap_in_frames
from bkind3d.data.pairs import pair_rows
from bkind3d.errors import InputError

RIGS = {"a": ring(2, (6, 4)), "b": ring(2, (6, 4), radius=4.0)}


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    """Two recordings of 5 and 3 frames; frame t of camera m is filled with 10 t + m, plus 100 in the second."""
    recordings = {}
    for number, (name, count) in enumerate([("a", 5), ("b", 3)]):
        frames = np.zeros((count, 2, 4, 6, 3), dtype=np.uint8)
        frames += (100 * number + 10 * np.arange(count))[:, None, None, None, None].astype(np.uint8)
        frames += np.arange(2)[:, None, None, None].astype(np.uint8)
        np.save(tmp_path / f"{name}.npy", frames)
        recordings[name] = CachedRecording(
            name, "train", 30.0, tmp_path / f"{name}.npy", frames.shape, RIGS[name], np.arange(count)
        )
    return FrameCache(recordings=recordings, key="k")


def test_every_pair_once_and_none_over_an_end(cache: FrameCache) -> None:
    pairs = PairDataset(cache, ["a", "b"], 2)
    assert len(pairs) == 3 + 1
    items = torch.stack([pairs[index][0] for index in range(len(pairs))])
    assert items.shape == (4, 2, 2, 3, 4, 6)
    assert items.dtype == torch.uint8
    assert items[:, :, :, 0, 0, 0].tolist() == [
        [[0, 1], [20, 21]],
        [[10, 11], [30, 31]],
        [[20, 21], [40, 41]],
        [[100, 101], [120, 121]],
    ]
    assert (items == items[..., :1, :1, :1]).all()
    assert [pairs.locate(index) for index in range(4)] == [(0, 0, 2), (0, 1, 3), (0, 2, 4), (1, 0, 2)]
    torch.testing.assert_close(pairs[-1], pairs[3])
    for index in (4, -5):
        with pytest.raises(IndexError):
            pairs[index]


def test_reverse_gives_the_later_frame_first(cache: FrameCache) -> None:
    forward, backward = PairDataset(cache, ["a", "b"], 2), PairDataset(cache, ["a", "b"], 2, reverse=True)
    assert len(forward) == len(backward)
    for index in range(len(forward)):
        torch.testing.assert_close(backward[index][0], forward[index][0].flip(0))


def test_channels_are_not_mixed_up(cache: FrameCache, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 2, 4, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", frames)
    item = PairDataset(cache, ["a"], 1)[2][0].numpy()
    np.testing.assert_array_equal(item, frames[[2, 3]].transpose(0, 1, 4, 2, 3))


def test_workers_and_pickles(cache: FrameCache) -> None:
    pairs = PairDataset(cache, ["a", "b"], 1)
    expected = [torch.stack(parts) for parts in zip(*(pairs[index] for index in range(len(pairs))))]
    again = pickle.loads(pickle.dumps(pairs))
    torch.testing.assert_close([torch.stack(parts) for parts in zip(*(again[k] for k in range(len(again))))], expected)
    loaded = [torch.cat(parts) for parts in zip(*DataLoader(pairs, batch_size=2, num_workers=2))]
    torch.testing.assert_close(loaded, expected)


def test_items_carry_the_projections_of_their_recording(cache: FrameCache) -> None:
    pairs = PairDataset(cache, ["a", "b"], 1)
    assert len(pairs) == 4 + 2
    for index in range(len(pairs)):
        expected = RIGS["ab"[pairs.locate(index)[0]]].projection_matrices().float()
        torch.testing.assert_close(pairs[index][1], expected)
    assert not torch.allclose(pairs[0][1], pairs[5][1])


@pytest.mark.parametrize(
    ("clock", "gap", "rows"),
    [
        ([0, 1, 2, 3], 2, [[0, 2], [1, 3]]),
        ([1, 4, 5, 6, 9], 3, [[0, 1], [3, 4]]),  # by row, 1 and 6 would be a pair
        ([0, 5, 20, 21, 25, 40], 20, [[0, 2], [1, 4], [2, 5]]),  # 21 and 40 are 19 apart: never shorter
        ([0, 22, 43], 20, [[0, 1], [1, 2]]),  # up to a tenth later
        ([0, 23, 44], 20, [[1, 2]]),
        ([0, 240, 260], 20, [[1, 2]]),
    ],
)
def test_pairs_go_by_the_clock_and_not_by_rows(clock: list[int], gap: int, rows: list[list[int]]) -> None:
    assert pair_rows(np.array(clock), gap).tolist() == rows


def test_a_recording_without_pairs_is_refused(cache: FrameCache) -> None:
    sparse = dataclasses.replace(cache.recordings["a"], clock=64 * np.arange(5))
    with pytest.raises(
        InputError, match=r"recording 'a': gap: no two of its moments are 20 frames apart \(most are 64\)"
    ):
        PairDataset(FrameCache({"a": sparse}, "k"), ["a"], 20)
    assert len(PairDataset(FrameCache({"a": sparse}, "k"), ["a"], 64)) == 4


@pytest.mark.parametrize(
    ("gap", "fps", "frames"),
    [
        ("0.4 s", 25, 10),
        ("0.4s", 30, 12),
        ("0.66 s", 30, 20),
        ("400 ms", 60, 24),
        ("4e-1 s", 50, 20),
        (12, 30, 12),
        ("12", 30, 12),
        ("1 frame", 30, 1),
        ("12 frames", 60, 12),
    ],
)
def test_gap(gap: str | int, fps: float, frames: int) -> None:
    assert gap_in_frames(gap, fps) == frames


@given(frames=st.integers(1, 10_000), fps=st.floats(1, 1000))
def test_gap_in_seconds_is_the_nearest_frame(frames: int, fps: float) -> None:
    assert gap_in_frames(f"{frames / fps!r} s", fps) == frames
    assert gap_in_frames(f"{(frames + 0.4) / fps!r} s", fps) == frames


@pytest.mark.parametrize("gap", ["0 s", 0, "0", "0.01 s", "-0.4 s", -3, "-3 frames"])
def test_gap_that_is_not_positive_is_refused(gap: str | int) -> None:
    with pytest.raises(InputError, match=r"gap: .* at 30 frames per second; the two frames of a pair must differ"):
        gap_in_frames(gap, 30)


@pytest.mark.parametrize("gap", ["soon", "", "0.4 m", "nan s", "inf s", "0.4.1 s", True, "0.4"])
def test_gap_that_is_not_understood_is_refused(gap: str) -> None:
    with pytest.raises(InputError, match=r"gap: .*(is not understood|has no unit)"):
        gap_in_frames(gap, 30)


def test_gap_longer_than_the_recording(cache: FrameCache) -> None:
    assert gap_in_frames(4, 30, 5) == 4
    with pytest.raises(InputError, match="gap: '1 s' is 30 frames, but the recording has only 30"):
        gap_in_frames("1 s", 30, 30)
    with pytest.raises(InputError, match="recording 'b': gap: 3 is 3 frames, but the recording has only 3"):
        PairDataset(cache, ["a", "b"], 3)


def test_other_refusals(cache: FrameCache) -> None:
    with pytest.raises(InputError, match="no recording to draw from"):
        PairDataset(cache, [], 1)
    with pytest.raises(InputError, match="there is no recording 'c' in the cache"):
        PairDataset(cache, ["c"], 1)
    slow = dataclasses.replace(cache.recordings["b"], fps=25.0)
    mixed = FrameCache({**cache.recordings, "b": slow}, "k")
    with pytest.raises(InputError, match="recordings 'a' and 'b' run at 30 and 25 frames per second"):
        PairDataset(mixed, ["a", "b"], 1)
