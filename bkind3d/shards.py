"""Shares of a list of recordings, for processes that work side by side without knowing of each other."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bkind3d.errors import InputError


def share(names: Sequence[str], shard: str | None) -> list[str]:
    """The names that one of several processes takes; together they take each name once.

    Args:
        names: All names.
        shard: "i/n", counted from 1: every n-th name from the i-th on. All names when left out.

    Raises:
        InputError: It is not of that form, or i is not within 1 to n.
    """
    if shard is None:
        return list(names)
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"shard: expected i/n with i from 1 to n, such as 1/4, got {shard}")
    place, count = int(found[1]), int(found[2])
    return list(names[place - 1 :: count])
