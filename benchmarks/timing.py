"""Time and memory of single calls, on the GPU where there is one and on the CPU elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import truediv
from statistics import median, quantiles
from time import perf_counter

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.profiler import ProfilerActivity, profile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

Prepare = Callable[[], Callable[[], object]]
"""Does what is not to be timed and returns what is."""


class Stopwatch:
    """Seconds spent inside `time` so far: a timer for pytest-benchmark that sees the device's time and nothing else.

    On a GPU a call is timed by events on the stream, behind a kernel that empties the L2 cache and keeps the device
    busy while the call is being launched.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._cache = torch.empty(2**28 if ON_GPU else 0, dtype=torch.int8, device=DEVICE)

    def __call__(self) -> float:
        return self.total

    def time(self, function: Callable[[], object]) -> float:
        """The seconds of one call, which are added to the total."""
        seconds = self._on_gpu(function) if ON_GPU else self._on_cpu(function)
        self.total += seconds
        return seconds

    def _on_gpu(self, function: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _on_cpu(self, function: Callable[[], object]) -> float:
        start = perf_counter()
        function()
        return perf_counter() - start


STOPWATCH = Stopwatch()


@dataclass(frozen=True)
class Timing:
    """Quantiles in seconds; `ratio` is the median of the ratios to the reference's call just before."""

    p20: float
    p50: float
    p80: float
    ratio: float


def run_paired(
    benchmark: BenchmarkFixture, subject: Prepare, reference: Prepare, rounds: int, warmup_rounds: int
) -> Timing:
    """Run a benchmark whose timer is STOPWATCH, with a call of the reference before each call of the subject."""
    reference_seconds: list[float] = []

    def setup():
        reference_seconds.append(STOPWATCH.time(reference()))
        return (subject(),), {}

    benchmark.pedantic(STOPWATCH.time, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
    seconds = benchmark.stats.stats.data
    p20, _, _, p80 = quantiles(seconds, n=5)
    ratio = median(map(truediv, seconds, reference_seconds[warmup_rounds:]))
    return Timing(p20, median(seconds), p80, ratio)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory a call has allocated at a time, what was there before left out."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = (event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(changes), default=0)
