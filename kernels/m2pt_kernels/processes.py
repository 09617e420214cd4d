"""Run worker processes of `cases`, which may hang or die, and read their output until then."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from threading import Event, Timer, current_thread, main_thread
from typing import IO, Any, cast

from .cases import Row, Shape

PATIENCE = 90.0
"""Seconds without a line after which a process is given up."""

WORKER = [sys.executable, "-m", "m2pt_kernels.cases"]


class LostError(Exception):
    """A process did not end as it should; the message says how it ended."""


class Workers:
    """Starts processes. None outlives the block; SIGTERM exits with status 143."""

    def __init__(self, on_gpu: bool) -> None:
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0" if on_gpu else "1"}
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def __enter__(self) -> "Workers":
        if current_thread() is main_thread():
            self._at_sigterm = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for process in tuple(self._running):
            process.kill()
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, self._at_sigterm)

    def answers(self, requests: list[dict[str, Any]]) -> Iterator[tuple[str, Row]]:
        """Start a process and yield its lines about rows, each "begun" or "done".

        Raises:
            LostError: after its last line, if it did not end as it should.
        """
        with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+") as stderr:
            stdin.writelines(f"{json.dumps(request)}\n" for request in requests)
            stdin.seek(0)
            process = subprocess.Popen(
                WORKER, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, text=True, env=self._environment
            )
            stdout = cast(IO[str], process.stdout)  # a pipe
            self._running.add(process)
            try:
                while not self._ended and (line := _line(process, stdout)):
                    yield _parsed(line)
                if self._ended:
                    raise LostError("stopped")
                status = process.wait()
            finally:
                process.kill()
                stdout.close()
                self._running.discard(process)
            if status < 0:
                raise LostError(f"ended by {signal.Signals(-status).name}")
            if status > 0:
                stderr.seek(0)
                raise LostError(f"status {status}: {_reason(stderr.read())}")


def _line(process: subprocess.Popen[str], stdout: IO[str]) -> str:
    """Return the next line, or an empty one when the process has ended.

    Raises:
        LostError: neither happened in time.
    """
    late = Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = Timer(PATIENCE, give_up)
    timer.start()
    try:
        line = stdout.readline()
        if not line:
            process.wait()
    finally:
        timer.cancel()
    if late.is_set():
        raise LostError(f"no end in {PATIENCE:.0f} s")
    return line


def _parsed(line: str) -> tuple[str, Row]:
    try:
        ((event, fields),) = json.loads(line).items()
    except ValueError as error:
        raise LostError(f"unexpected output: {line.strip()}") from error
    return event, Row(**fields | {"shape": Shape(*fields["shape"])})


def _reason(stderr: str) -> str:
    """Return the line that names an error, otherwise the last one."""
    lines = stderr.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if "Error" in line.partition(":")[0]), lines[-1])
