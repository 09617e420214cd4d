"""Data workers that fail, end, hang, or are interrupted: the run ends in seconds, says why, and can be resumed."""

import ctypes
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_equal, no_plots
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from two_processes import FORKSERVER

import m2pt.train.workers
from m2pt.cli import RESUMING, main
from m2pt.data.embedded import TensorSamples
from m2pt.train.batches import Batches, StreamedSamples, running
from m2pt.train.distributed import World
from m2pt.train.log import read_log
from m2pt.train.recipe import Machine
from m2pt.train.workers import received

pytestmark = pytest.mark.slow

SETTINGS = ["model.overrides.embed_dim=16", "model.overrides.depth=1", "model.overrides.num_heads=2"]
SETTINGS += ["data.batch_size=120", "schedule.epochs=2", "run.log_steps=1", "run.checkpoint_steps=1"]
LOST = "m2pt: error: data: a process that reads samples (machine.workers) was lost: "


class UnusualError(BaseException):
    """An exception that is no `Exception`."""


def fail(error):
    raise error


FAILURES = {
    "RuntimeError": lambda: fail(RuntimeError("out of shared memory")),
    "MemoryError": lambda: fail(MemoryError()),
    "KeyError": lambda: fail(KeyError("label")),
    "ImportError": lambda: fail(ImportError("no such codec")),
    "RecursionError": lambda: FAILURES["RecursionError"](),
    "two lines": lambda: fail(AssertionError("one\ntwo")),
    "StopIteration": lambda: fail(StopIteration()),
}
ENDS = {
    "exit": lambda: os._exit(1),
    "exit without an error": lambda: os._exit(0),
    "SystemExit": lambda: sys.exit(3),
    "KeyboardInterrupt": lambda: fail(KeyboardInterrupt()),
    "BaseException": lambda: fail(UnusualError()),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segmentation fault": lambda: ctypes.string_at(0),
    "abort": lambda: os.abort(),
}
HANGS = {
    "sleeps": lambda: time.sleep(1000),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "busy": lambda: ctypes.PyDLL(None).sleep(1000),  # without giving up Python's lock
}


def command(out, *more):
    return ["train", "tiny_image", *SETTINGS, "--out", str(out), *more]


def run(arguments, log, failure, sample, milliseconds=None):
    """A training process in which the `sample`-th sample that a process reads fails; with a time Ctrl-C comes twice so
    long after data workers begin to start."""
    os.setsid()  # so that a signal can be sent to it and its data workers together, as Ctrl-C does
    multiprocessing.set_start_method("fork", force=True)
    no_plots(pytest.MonkeyPatch())
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    m2pt.train.workers.PATIENCE = 0.5  # nothing that ends by itself here takes longer
    _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.5,)  # torch looks for lost workers every 5 s
    read, done = TensorSamples.read, []

    def failing(dataset, index):
        done.append(index)
        if len(done) == sample:
            Path(f"{log}.failing").touch()
            (FAILURES | ENDS | HANGS)[failure]()
        return read(dataset, index)

    TensorSamples.read = failing
    if milliseconds is not None:
        init = DataLoader.__iter__

        def interrupted(loader):
            threading.Timer(milliseconds / 1000, press_twice, [os.getpid()]).start()
            return init(loader)

        DataLoader.__iter__ = interrupted
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def start():
    processes = []

    def start(arguments, log, failure="", sample=0, milliseconds=None):
        process = FORKSERVER.Process(target=run, args=(arguments, log, failure, sample, milliseconds))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ended(process, status, seconds=20):
    """The process ends in time, with this status, and leaves no other one behind."""
    process.join(seconds)
    assert process.exitcode == status
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def wait_for_failure(log):
    """Until a worker has failed, and the process that trains waits for it."""
    while not Path(f"{log}.failing").exists():
        time.sleep(0.01)
    time.sleep(0.5)


def press_twice(group):
    """Ctrl-C, and once more because the step does not end; a signal that comes before the last was seen is none."""
    os.killpg(group, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(group, signal.SIGINT)


def error_in(log):
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("m2pt:"))
    assert "Traceback" not in log.read_text()
    return line


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("failure", FAILURES)
def test_any_exception_ends_the_run_with_a_line_that_says_where_it_was_raised(tmp_path, start, failure, workers):
    process = start(command(tmp_path / "out", f"machine.workers={workers}"), tmp_path / "log", failure, 500)
    assert ended(process, 2)
    kind = "AssertionError: one two" if failure == "two lines" else failure
    line = error_in(tmp_path / "log")
    assert line.startswith("m2pt: error: data: sample ") and kind in line and f"({__file__}, line " in line


@pytest.mark.parametrize(
    "failure, skips", [*((end, True) for end in ENDS), *((end, False) for end in ("exit", "SystemExit", "killed"))]
)
def test_any_end_of_a_worker_ends_the_run_with_a_line(tmp_path, start, failure, skips):
    more = ["machine.workers=2", *["data.on_error=skip"] * skips]
    process = start(command(tmp_path / "out", *more), tmp_path / "log", failure, 500)
    assert ended(process, 2)
    assert LOST in (tmp_path / "log").read_text().splitlines()[-1]  # torch's handler of faults writes a zero before it


def test_a_run_whose_worker_was_lost_goes_on_as_if_nothing_had_been(tmp_path, start):
    outs = [tmp_path / name for name in ("whole", "parts")]
    whole, parts = (command(out, "machine.workers=1") for out in outs)
    assert ended(start(whole, tmp_path / "log"), 0)
    assert ended(start(parts, tmp_path / "log", "killed", 900), 2)
    assert 0 < torch.load(outs[1] / "last.pth", weights_only=True)["step"] < 10
    assert ended(start([*parts, "--resume"], tmp_path / "log"), 0)
    states = [torch.load(out / "last.pth", weights_only=True) for out in outs]
    for part in ("model", "optimizer", "step"):
        assert_equal(states[0][part], states[1][part])


@pytest.mark.parametrize("failure", HANGS)
def test_a_second_ctrl_c_ends_a_run_whose_workers_hang(tmp_path, start, failure):
    process = start(command(tmp_path / "out", "machine.workers=3"), tmp_path / "log", failure, 200)
    wait_for_failure(tmp_path / "log")
    press_twice(process.pid)
    assert ended(process, 130, 10)
    assert error_in(tmp_path / "log").startswith("m2pt: interrupted")


@pytest.mark.parametrize("milliseconds", [1, 5, 20, 50, 200])
def test_a_second_ctrl_c_while_workers_start_that_hang(tmp_path, start, milliseconds):
    arguments = command(tmp_path / "out", "machine.workers=3")
    process = start(arguments, tmp_path / "log", "sleeps", 1, milliseconds)
    assert ended(process, 130, 15)
    assert error_in(tmp_path / "log") == "m2pt: interrupted"


def test_ctrl_c_three_times(tmp_path, start):
    process = start(command(tmp_path / "out", "machine.workers=3"), tmp_path / "log", "sleeps", 200)
    wait_for_failure(tmp_path / "log")
    for pause in (0.5, 0.001, 0):  # the last while the second ends the run
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(pause)
    assert ended(process, 130, 10)
    assert error_in(tmp_path / "log").startswith("m2pt: interrupted")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends with its sample")
def test_workers_that_hang_end_with_the_process_that_trains(tmp_path, start):
    process = start(command(tmp_path / "out", "machine.workers=3"), tmp_path / "log", "sleeps", 200)
    wait_for_failure(tmp_path / "log")
    process.kill()
    assert ended(process, -signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 3])
def test_ctrl_c_at_any_moment(tmp_path, start, workers, repetitions):
    moments = random.Random(workers)
    interrupted = 0
    for number in range(repetitions + 3):
        out, log = tmp_path / str(number), tmp_path / f"{number}.log"
        process = start(command(out, f"machine.workers={workers}"), log)
        while not log.exists():
            time.sleep(0.001)
        process.join(moments.uniform(0.05, 1))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.join(10)
        assert process.exitcode in (0, 130)
        assert ended(process, process.exitcode)
        if process.exitcode == 130:
            interrupted += 1
            lines, has_state = read_log(out), (out / "last.pth").exists()
            step = [f"step {lines[-1]['step']} is saved"] if lines and "stopped" in lines[-1] else []
            assert error_in(log) == "; ".join(["m2pt: interrupted", *step, *[RESUMING] * has_state])
            assert has_state or not lines
            assert not step or torch.load(out / "last.pth", weights_only=True)["step"] == lines[-1]["step"]
    assert interrupted > 0


def test_an_error_of_the_training_process_ends_workers_that_hang(tmp_path, start):
    more = ["machine.workers=2", "optimizer.base_lr=1e30"]
    process = start(command(tmp_path / "out", *more), tmp_path / "log", "sleeps", 700)
    assert ended(process, 2)
    assert "m2pt: error: step 2: the loss is nan" in error_in(tmp_path / "log")


def test_other_processes_are_left_alone():
    """Also one that another thread starts while workers start."""
    context = multiprocessing.get_context("fork")
    other = context.Process(target=time.sleep, args=(1000,))
    init = DataLoader.__iter__

    def beside(loader):
        other.start()
        return init(loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataLoader, "__iter__", beside)
        with received(DataLoader([1, 2, 3], num_workers=1)) as batches:
            assert len(list(batches)) == 3
    assert other.is_alive()
    other.kill()
    other.join()


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="Windows has no such signal")
def test_handlers_of_signals_are_as_before():
    with received(DataLoader([1], num_workers=1)) as batches:
        next(batches)
    before = [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)]
    assert callable(before[0])  # torch's, which it sets only once
    with received(DataLoader([1], num_workers=1)) as batches:
        next(batches)
    assert [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)] == before


class Stream(IterableDataset):
    """One sample, and then an error."""

    def __iter__(self):
        yield 1
        raise ValueError("sample 2 is damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_stream_is_not_left_out_with_a_batch_that_is_not_whole(workers):
    machine, world = Machine(workers=workers), World(0, 1, torch.device("cpu"))
    batches = Batches(StreamedSamples(Stream()), machine, world, batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="sample 2 is damaged"), running(batches) as read:
        list(read)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_worker_s_is_left_as_it_is(workers):
    with pytest.raises(BrokenPipeError), received(DataLoader([1, 2, 3], num_workers=workers)) as batches:
        next(batches)
        raise BrokenPipeError
