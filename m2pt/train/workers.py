"""Processes that read data: they end within seconds of the block that uses them, however it ends."""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

PR_SET_PDEATHSIG = 1
PATIENCE = 3
"""Seconds that workers get to end by themselves."""
LOST = "data: a process that reads samples (machine.workers) was lost"


@contextmanager
def received(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """What a loader yields; its workers end with the block.

    Raises:
        ChildProcessError: a worker was lost, by a signal or by its own exit.
    """
    batches: Any = None
    workers: Sequence[BaseProcess] = ()
    handler: Any = None
    try:
        with _delayed_interrupt():
            batches, workers = _started(loader)
            handler = _without_handler_of_dead_children()
        yield batches
    except (EOFError, OSError, RuntimeError) as error:  # workers send their own errors as values
        if not workers or not wait([worker.sentinel for worker in workers], timeout=1):
            raise
        raise ChildProcessError(f"{LOST}: {error}") from None
    finally:
        with _delayed_interrupt():
            _end(batches, workers)
            _restore("SIGCHLD", handler)


def leave_to_parent(worker: int) -> None:
    """Leave signals and errors to the process that trains; call this in each worker.

    SIGTERM is often sent to all processes of a job, and Ctrl-C always is, but that process has to finish its step and
    needs data for it. Python's thread that hands over tensors complains if that process stops midway.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *error: None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also in the middle of a sample


def _started(loader: DataLoader) -> tuple[Any, Sequence[BaseProcess]]:
    others = active_children()
    try:
        batches: Any = iter(loader)
    except (OSError, RuntimeError) as error:
        _kill([child for child in active_children() if child not in others])
        raise ChildProcessError(f"{LOST}: {error}") from None
    return batches, getattr(batches, "_workers", ())


def _end(batches: Any, workers: Sequence[BaseProcess]) -> None:
    """Ask the workers to end, and kill those that do not: they ignore SIGTERM, with which Python would end them."""
    if batches is not None and workers:
        deadline = threading.Timer(PATIENCE, _kill, [workers])
        deadline.start()
        batches._shutdown_workers()
        deadline.cancel()
    _kill(workers)


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _without_handler_of_dead_children() -> Any:
    """Remove torch's handler, which raises its error wherever the program is, even in the middle of writing a file.
    Without it a dead worker is noticed within seconds, when its batch is requested.

    Returns:
        The handler; None if there is none, or if this thread may not set it.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return None
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block: it would leave workers that nothing knows of yet, or that nothing ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        _restore("SIGINT", before)
        for number in asked:
            signal.raise_signal(number)


def _restore(name: str, handler: Any) -> None:
    """Set the handler of a signal again, if it was one that Python knows."""
    if handler is not None:
        signal.signal(getattr(signal, name), handler)
