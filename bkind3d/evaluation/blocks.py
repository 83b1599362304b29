"""Blocks of consecutive frames. Neighbouring frames resemble each other, so whole blocks are held out, never frames."""

import numpy as np

from bkind3d.errors import InputError

INNER_BLOCKS = 10


def block_numbers(frames: int, blocks: int) -> np.ndarray:
    """(F,) the block of each frame: ``blocks`` runs of consecutive frames whose lengths differ by at most one.

    Raises:
        InputError: fewer than two blocks, or more than frames.
    """
    if not 2 <= blocks <= frames:
        raise InputError(f"blocks: expected between 2 and the number of frames ({frames}), got {blocks}")
    return np.arange(frames) * blocks // frames


def inner_blocks(frames: int, blocks: np.ndarray | None) -> np.ndarray:
    """(F,) the blocks that may be held out inside the training frames: those given, or ten equal runs of frames.

    A single block cannot be held out from itself: it is cut into runs as well.
    """
    if blocks is None or len(np.unique(blocks)) < 2:
        return block_numbers(frames, min(INNER_BLOCKS, frames))
    return blocks
