"""Functions in Python processes of their own, wherever the caller is: a script, a notebook, a prompt, standard input.

What `multiprocessing` spawns runs the caller's main module again, which there is none of in standard input, and which a
script must guard itself against. These processes import the function's module and nothing else.
"""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")
Report = Callable[[Any], None]


def call_each(
    function: Callable[[Argument, Report], Result],
    arguments: Sequence[Argument],
    workers: int,
    *,
    report: Report = lambda message: None,
    fresh: bool = False,
) -> Iterator[Result]:
    """Call a function with each argument, several at a time in processes of their own.

    Args:
        function: Of a module; takes the argument, and a function by which it tells the caller how far it is.
        arguments: What `pickle` can hold, like the results and the messages.
        workers: Number of processes.
        report: What is done with the messages; called by several threads.
        fresh: Whether each call has a process that has done nothing else.

    Returns:
        The results as they come. An error ends the rest: calls that have begun are waited for, no other begins.

    Raises:
        RuntimeError: A process ended by itself. Else whatever the function raises.
    """
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def call(argument: Argument) -> Result:
        try:
            worker = idle.get_nowait()
        except Empty:
            worker = _Worker()
        try:
            result = worker.call(function, argument, report)
        except BaseException:
            worker.close()
            raise
        if fresh:
            worker.close()
        else:
            idle.put(worker)
        return result

    pool = ThreadPoolExecutor(max(1, min(workers, len(arguments))))
    futures = [pool.submit(call, argument) for argument in arguments]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        while not idle.empty():
            idle.get().close()


class _Worker:
    """A process that calls functions, one after another, until it is closed."""

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        code = f"import sys; sys.path[:] = {[str(path) for path in sys.path]}; from {__name__} import _serve; "
        command = [sys.executable, "-c", f"{code}_serve({theirs.fileno()})"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()

    def call(self, function: Callable[..., Any], argument: Any, report: Report) -> Any:
        """What the function returns; raises what it raises."""
        try:
            _send(self.pipe, (function, argument))
            while True:
                kind, content = _receive(self.pipe)
                if kind == "result":
                    return content
                if kind == "error":
                    raise content
                report(content)
        except (EOFError, ConnectionError):
            raise RuntimeError(
                f"the process of {function.__qualname__} ended by itself, with exit code {self.process.wait()}"
            ) from None

    def close(self) -> None:
        """Let the process end, and wait until it has."""
        self.pipe.close()
        self.process.wait()


def _serve(descriptor: int) -> None:
    """Answer calls until the caller closes the pipe."""
    with Connection(descriptor) as pipe:
        while True:
            try:
                function, argument = _receive(pipe)
            except EOFError:
                return
            try:
                answer = "result", function(argument, lambda message: _send(pipe, ("report", message)))
            except BaseException as error:  # noqa: BLE001  (the caller raises it)
                if not isinstance(error, KeyboardInterrupt):
                    error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
                answer = "error", error
            _send(pipe, answer)


def _send(pipe: Connection, content: Any) -> None:
    """Send by value: a connection's own `send` would share the memory of tensors, which only a child can open."""
    pipe.send_bytes(pickle.dumps(content))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())
