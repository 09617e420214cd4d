"""Measure time and memory of single calls, on the GPU if there is one, otherwise on the CPU.

A call is timed repeatedly until a 95 % confidence interval lies within 2 % of the median on both sides.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import comb
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

PRECISION = 0.02
CONFIDENCE = 0.95
WARMUP_ROUNDS = 2
LEAST_ROUNDS = 6
"""With fewer, not even the shortest and the longest time enclose the median with that confidence."""

UNITS = {"ms": 1e3, "us": 1e6}

Prepare = Callable[[], Callable[[], object]]
"""Does the untimed preparation and returns the call to time."""


@dataclass(frozen=True)
class Timing:
    """The seconds of every round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def columns(self, unit: str, calls: int = 1) -> dict[str, float]:
        """Columns of a table: quantiles for one call, with `calls` per round."""
        p20, _, _, p80 = quantiles(self.seconds, n=5)
        named = {"p20": p20, "median": self.median, "p80": p80}
        figures = {f"{name}, {unit}": seconds / calls * UNITS[unit] for name, seconds in named.items()}
        return {**figures, "rounds": len(self.seconds)}


def time_alone(subject: Callable[[], object], most: int) -> Timing:
    """Time in at most so many rounds; the subject has run before."""
    rounds = until_known(lambda: (seconds_of(subject),), most)
    return Timing(tuple(seconds for (seconds,) in rounds))


def time_paired(subject: Prepare, reference: Prepare, most: int) -> tuple[Timing, float]:
    """Time in at most so many rounds, each with a reference call first; also return the median ratio to that."""

    def pair() -> tuple[float, float]:
        expected = seconds_of(reference())
        seconds = seconds_of(subject())
        return seconds, seconds / expected

    for _ in range(WARMUP_ROUNDS):
        pair()
    seconds, ratios = zip(*until_known(pair, most), strict=True)
    return Timing(seconds), median(ratios)


def until_known(measure: Callable[[], tuple[float, ...]], most: int) -> list[tuple[float, ...]]:
    """Measure in rounds until the median of each quantity is known or there are as many as allowed."""
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < most and not (len(rounds) >= LEAST_ROUNDS and all(map(is_known, zip(*rounds, strict=True)))):
        rounds.append(measure())
    return rounds


def is_known(samples: Sequence[float]) -> bool:
    """Whether the confidence interval of the median ends within PRECISION of it on both sides."""
    middle = median(samples)
    return all(abs(end - middle) <= PRECISION * middle for end in median_interval(samples))


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Two of the samples between which the median lies with CONFIDENCE, whatever their distribution.

    The number of samples below the median is binomial, so the same number may be left out at both ends.
    """
    count, left_out = len(samples), 0
    outside = 2 / 2**count  # the chance that the median is beyond either end
    while outside + 2 * comb(count, left_out + 1) / 2**count <= 1 - CONFIDENCE:
        left_out += 1
        outside += 2 * comb(count, left_out) / 2**count
    ordered = sorted(samples)
    return ordered[left_out], ordered[-1 - left_out]


def seconds_of(function: Callable[[], object]) -> float:
    """Time one call: on a GPU by events on the stream, after passes over 1 GiB that empty the L2 cache and keep the
    device busy while the call is being launched."""
    if ON_GPU:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(4):
            _larger_than_l2().zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = perf_counter()
    function()
    return perf_counter() - began


@cache
def _larger_than_l2() -> Tensor:
    return torch.empty(2**28, dtype=torch.int8, device=DEVICE)


def peak_bytes(function: Callable[[], object]) -> int:
    """The peak memory that a call allocates, without what was there before."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = (event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(changes), default=0)


def nbytes(values: Iterable[object]) -> int:
    """Bytes of the tensors among the values, counting shared storage once."""
    storages = (value.untyped_storage() for value in values if isinstance(value, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
