"""What was once found out about large files, so that they need not be read for it again.

A file counts as unchanged as long as its size and its two times of change are the same. The ledger is a JSON file that
may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bkind3d.documents import read_json
from bkind3d.errors import InputError
from bkind3d.files import write_text


class Ledger:
    """Findings about files, on disk once :meth:`save` was called.

    Args:
        path: of the JSON file; one that is missing or no JSON counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._findings: dict[str, list[Any]] = {}
        self._changed = False
        with contextlib.suppress(InputError):
            content = read_json(path) if path.exists() else {}
            self._findings = {key: entry for key, entry in content.items() if _is_finding(entry)}

    @classmethod
    def of_cache(cls, directory: Path) -> Ledger:
        """The ledger of a folder of cached frames."""
        return cls(directory / ".ledger")

    def knows(self, kind: str, file: Path) -> bool:
        """Whether a finding of that kind is there and the file unchanged."""
        entry = self._findings.get(_key(kind, file))
        return entry is not None and entry[0] == _stamp(file)

    def recall(self, kind: str, file: Path, find: Callable[[Path], Any]) -> Any:
        """The finding of that kind about a file: what JSON can hold; found by ``find`` where it is not known."""
        if not self.knows(kind, file):
            stamp = _stamp(file)
            self._findings[_key(kind, file)] = [stamp, find(file)]
            self._changed = True
        return self._findings[_key(kind, file)][1]

    def save(self) -> None:
        """Write what is new."""
        if self._changed:
            write_text(self.path, json.dumps(self._findings))
            self._changed = False


def _is_finding(entry: Any) -> bool:
    """Whether an entry is a stamp and what was found: a digest, or what a video holds."""
    if not (isinstance(entry, list) and len(entry) == 2):
        return False
    found = entry[1]
    return isinstance(found, str) or (
        isinstance(found, list) and len(found) == 4 and all(isinstance(value, int | float) for value in found)
    )


def _key(kind: str, file: Path) -> str:
    return f"{kind} {file.absolute()}"


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
