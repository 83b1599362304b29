"""Worlds of gloo processes that run the command line, forked from one process that has imported everything once.

As a script: reads a JSON list of [number of processes, port, arguments] and runs one after another.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def run_worlds(*worlds: tuple[int, list[str]]) -> None:
    """Run each command line in as many processes; all must end well."""
    numbered = [(count, 29520 + place, arguments) for place, (count, arguments) in enumerate(worlds)]
    command = [sys.executable, str(Path(__file__)), json.dumps(numbered)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def fork(rank: int, count: int, port: int, arguments: list[str]) -> int:
    from bkind3d.cli import main

    process = os.fork()
    if process:
        return process
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    if count > 1:
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    status = 1
    try:
        main(arguments)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)  # gloo's threads can abort an interpreter on its way out


if __name__ == "__main__":
    for count, port, arguments in json.loads(sys.argv[1]):
        processes = [fork(rank, count, port, arguments) for rank in range(count)]
        if any([os.waitpid(process, 0)[1] for process in processes]):
            sys.exit(f"{count} processes failed: {arguments}")
