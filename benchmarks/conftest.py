"""Collects what the benchmarks of a file measure and writes it once all of them have run."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import results
from benchmarks.results import Row


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="on a GPU: every size and precision, and torch.compile; hours")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out without --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full`, unless it is asked for."""
    if not config.option.full:
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """The lines of the file's table; the file's docstring goes above it."""
    collected: list[Row] = []
    yield collected
    options = request.config.option
    selected = options.keyword or options.markexpr or any("::" in argument for argument in request.config.args)
    if collected and not selected and not request.session.testsfailed:
        name = request.module.__name__.rpartition(".")[2].removeprefix("test_").replace("_", "-")
        device = results.device_slug() + ("-full" if options.full else "")
        results.write(name, device, collected, request.module.__doc__)


@pytest.fixture
def record(benchmark, rows: list[Row]) -> Callable[[Row], None]:
    """Keep a line in pytest-benchmark's own report and in the file's table."""

    def keep(row: Row) -> None:
        benchmark.extra_info.update(row)
        rows.append(row)

    return keep


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
