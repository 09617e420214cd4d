"""What the runs say: mean, spread and paired difference to the baseline, in percentage points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .experiment import Run


@dataclass(frozen=True)
class Summary:
    """A variant's test accuracy in percent over seeds, and its difference to the baseline of the same seed, in points.

    `standard_error` is that of the mean difference. Both are zero for the baseline itself.
    """

    variant: str
    mean: float
    standard_deviation: float
    difference: float
    standard_error: float


def accuracies(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Test accuracies in percent, in the order of the seeds, by variant."""
    percent: dict[str, list[float]] = {}
    for run in runs:
        percent.setdefault(run.variant, []).append(100 * run.accuracy)
    return percent


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """A summary per variant, from at least two seeds."""
    by_variant = accuracies(runs)
    summaries = []
    for variant, percent in by_variant.items():
        differences = [ours - theirs for ours, theirs in zip(percent, by_variant["baseline"], strict=True)]
        error = stdev(differences) / math.sqrt(len(differences))
        summaries.append(Summary(variant, fmean(percent), stdev(percent), fmean(differences), error))
    return summaries


def conclusion(summaries: Sequence[Summary]) -> str:
    """The sentence that the figures allow."""
    larger = [
        f"{summary.variant} ({summary.difference:+.2f} points)"
        for summary in summaries
        if abs(summary.difference) > 2 * summary.standard_error
    ]
    if not larger:
        return "No difference to the baseline is larger than twice its standard error."
    return f"Larger than twice its standard error is the difference to the baseline of {' and '.join(larger)}."
