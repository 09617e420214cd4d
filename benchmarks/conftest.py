"""Options of `pytest benchmarks/`, the order of its files, and its output: tables in files and a final summary."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _pytest.terminal import TerminalReporter

from benchmarks import results, summary
from benchmarks.results import Row
from benchmarks.timing import ON_GPU, Timing

IMPORTANCE = ("test_operators", "test_training_step", "test_host_overhead")
"""The order that files run in, so that a run cut short has measured the first."""

LEFT_OUT = {
    "full": "on a GPU: every size, precision and variant; takes hours",
    "compile": "also the published formulation under torch.compile, which takes long to tune",
}


@dataclass(frozen=True)
class Measured:
    """The rows of a file, and the table they were written to."""

    rows: list[Row]
    path: Path


MEASURED = pytest.StashKey[dict[str, Measured]]()


class Replay:
    """A timer for pytest-benchmark that replays earlier measurements."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help=results.RECORD)
    for name, included in LEFT_OUT.items():
        parser.addoption(f"--{name}", action="store_true", help=included)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}
    for name in LEFT_OUT:
        config.addinivalue_line("markers", f"{name}: left out without --{name}")
    if not any(str(argument).startswith("--benchmark") for argument in config.invocation_params.args):
        config.option.benchmark_quiet = True  # pytest-benchmark's table is for those who use its options


def pytest_sessionstart(session: pytest.Session) -> None:
    """Treat SIGTERM like Ctrl-C, so that what was measured is written."""

    def stop(*_: object) -> None:
        session.shouldstop = "SIGTERM"  # after this test, if the exception ends in a callback, where it is ignored
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    session.config.add_cleanup(lambda: signal.signal(signal.SIGTERM, previous))


def pytest_report_header() -> str | None:
    return None if ON_GPU else "No GPU was found: these are the CPU path's figures."


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that have to be asked for, and run the most important files first."""
    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    items[:] = sorted((item for item in items if not is_left_out(item)), key=importance)


def is_left_out(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) and not item.config.getoption(name) for name in LEFT_OUT)


def importance(item: pytest.Item) -> int:
    return IMPORTANCE.index(item.path.stem) if item.path.stem in IMPORTANCE else len(IMPORTANCE)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """The rows of the file's table, which is written when the file ends, below the file's docstring."""
    expected = sum(not is_left_out(item) for item in request.node.collect())
    collected: list[Row] = []
    yield collected
    if collected:
        name = request.path.stem.removeprefix("test_").replace("_", "-")
        device = results.device_slug() + ("-full" if request.config.getoption("full") else "")
        record = request.config.getoption("record")
        path = results.write(name, device, collected, request.module.__doc__, record, expected)
        request.config.stash[MEASURED][name] = Measured(collected, path)


@pytest.fixture
def record(benchmark, rows: list[Row]) -> Callable[[Row, Timing | None], None]:
    """Add a row to the file's table, and to pytest-benchmark's report if something was timed."""

    def keep(row: Row, timing: Timing | None) -> None:
        rows.append(row)
        if timing is not None:
            seconds = iter(timing.seconds)
            benchmark.extra_info.update(row)
            benchmark.pedantic(REPLAY.advance, setup=lambda: ((next(seconds),), {}), rounds=len(timing.seconds))

    return keep


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    measured = config.stash[MEASURED]
    if not measured:
        return
    terminalreporter.ensure_newline()
    for name, render in (("operators", summary.operators), ("training-step", summary.training_steps)):
        if name in measured:
            terminalreporter.section(name.replace("-", " "))
            terminalreporter.write_line(render(measured[name].rows))
    terminalreporter.section("results")
    machine = f"{results.device_name()}; {results.clocks()}" if ON_GPU else results.device_name()
    terminalreporter.write_line(results.made_with(machine))
    for each in measured.values():
        terminalreporter.write_line(str(each.path))
