"""The processes that read data: they end, in seconds, with the block that uses them, however that ends."""

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
    try:
        with _delayed_interrupt():
            batches, workers = _started(loader)
        with _no_handler_of_dead_children():
            try:
                yield batches
            except (EOFError, OSError, RuntimeError) as error:  # workers send their own errors as values
                if not wait([worker.sentinel for worker in workers], timeout=1):
                    raise
                raise ChildProcessError(f"{LOST}: {error}") from None
    finally:
        with _no_handler_of_dead_children(), _delayed_interrupt():
            _end(batches, workers)


def leave_to_parent(worker: int) -> None:
    """To be called in each worker: signals and errors are for the process that trains.

    SIGTERM is often sent to all processes of a job, and Ctrl-C always is, but that process has to finish its step, for
    which it needs data. Python's thread that hands over tensors complains where that process stops in the middle.
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
    """Ask the workers to end, and kill those that do not: they ignore SIGTERM, by which Python would end them."""
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


@contextmanager
def _no_handler_of_dead_children() -> Iterator[None]:
    """torch's handler raises its error wherever the program is, be it in the middle of writing a file. Without it a
    dead worker is noticed, within seconds, when its batch is asked for."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        _restore(signal.SIGCHLD, before)


@contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: it would leave workers that nobody knows yet, or that nobody ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        _restore(signal.SIGINT, before)
        if asked:
            signal.raise_signal(signal.SIGINT)


def _restore(number: signal.Signals, handler: Any) -> None:
    """Set a handler again, unless it was not Python's own."""
    if handler is not None:
        signal.signal(number, handler)
