"""The command `bkind3d`, also as `python -m bkind3d`; a base installation has it without what it needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; where a package of the extra `train` is missing, end with one line and exit code 2."""
    try:
        from bkind3d.cli import main as run
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.split(".")[0] in ("bkind3d", "bkind3d_kernels"):
            raise
        print(
            f"bkind3d: error: the command needs {missing}, which is not installed: pip install 'bkind3d[train]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
