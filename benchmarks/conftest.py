"""Collects what the benchmarks of a file measure and writes it once all of them have run."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import results
from benchmarks.results import Row
from benchmarks.timing import DEVICE


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """The lines of the file's table; the file's docstring goes above it."""
    collected: list[Row] = []
    yield collected
    selected = request.config.option.keyword or any("::" in argument for argument in request.config.args)
    if collected and not selected and not request.session.testsfailed:
        name = request.module.__name__.rpartition(".")[2].removeprefix("test_").replace("_", "-")
        results.write(name, DEVICE, collected, request.module.__doc__)


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
