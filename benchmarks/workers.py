"""Contestants in processes of their own: one compiles, fails or runs out of memory without harm to the others."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .measure import Contestant, Probe, Skipped, out_of_memory
from .problems import Case

EXIT_SECONDS = 10.0


class Worker:
    """A :class:`~benchmarks.measure.Contestant` in a fresh process, on the CPU.

    The process is forked from a server that has imported torch and has computed nothing.
    """

    def __init__(self, case: Case, competitor: str, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, case, competitor, threads), daemon=False)
        self.process.start()
        theirs.close()

    def probe(self, limit: int, seconds: float) -> Probe:
        return self._call("probe", limit, seconds=seconds)

    def round(self, repeats: int = 1) -> dict[str, float]:
        return self._call("round", repeats)

    def errors(self, truth: Path) -> dict[str, Any]:
        return self._call("errors", truth)

    def _call(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Have the process call a method and return its result, or raise its exception."""
        try:
            self.pipe.send((method, arguments))
            if not self.pipe.poll(seconds):
                raise Skipped(f"budget: no answer within {seconds:.0f} s")
            failed, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            raise RuntimeError(f"its process ended with status {self.process.exitcode}") from None
        if failed:
            raise answer
        return answer

    def close(self) -> None:
        self.pipe.close()  # the process ends when it reads that
        self.process.join(EXIT_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, case: Case, competitor: str, threads: int) -> None:
    """Answer calls until the other end closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the pipe
    torch.set_num_threads(threads)
    contestant: Contestant | None = None
    limit = 0
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            contestant = contestant or Contestant(case, competitor)
            limit = arguments[0] if method == "probe" else limit
            answer = False, getattr(contestant, method)(*arguments)
        except Exception as error:  # noqa: BLE001
            answer = True, _portable(error, limit)
        pipe.send(answer)


def _portable(error: Exception, limit: int) -> Exception:
    """An exception that can be sent, its message one line."""
    text = str(error)
    if out_of_memory(error):
        return Skipped(f"needs more memory than the limit of {limit / 1e9:.1f} GB")
    traceback.print_exception(error)
    return RuntimeError(f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300])
