"""The CPU fallback: a training step of a ViT-B of depth 2 in float32, this package against the published formulation.

Run as `python -m benchmarks.cpu_step`. W_aux is frozen in both. Every measurement has its own process, because a
process's peak resident memory never falls; the two of a pair run one after the other, in alternating order. Most of the
peak is torch itself: the last quantity leaves out what the imports took.
"""

import resource
import subprocess
import sys
from itertools import repeat
from statistics import median
from time import perf_counter

import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.results import Row
from benchmarks.variants import FUSED, PUBLISHED_FROZEN, adamw, training_step, vision_transformer

PAIRS = 7
STEPS = 5
BATCHES = (1, 8)
MIB = 2**20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024

QUANTITIES = ("step, s", "peak RSS, MiB", "peak RSS above the imports', MiB")
Measurement = tuple[float, ...]
"""A figure for each of QUANTITIES; a step's time is the median of STEPS."""


def measure(variant: str, batch: int) -> Measurement:
    """Measure in this process."""
    seconds, imported = [], peak_rss()
    with vision_transformer(variant, "vit_base_patch16_224", depth=2) as model:
        optimizer = adamw(model)
        images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
        for _ in range(STEPS + 1):
            start = perf_counter()
            training_step(model, optimizer, images, labels, autocast=False)
            seconds.append(perf_counter() - start)
    return median(seconds[1:]), peak_rss(), peak_rss() - imported


def peak_rss() -> float:
    """Return this process's peak so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / MIB


def measure_apart(variant: str, batch: int) -> Measurement:
    """Measure in a new process."""
    command = [sys.executable, "-m", "benchmarks.cpu_step", variant, str(batch)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(map(float, output.split()))


def row(batch: int, quantity: str, fused: tuple[float, ...], published: tuple[float, ...]) -> Row:
    ratios = [ours / theirs for ours, theirs in zip(fused, published, strict=True)]
    return {
        "batch": batch,
        "quantity": quantity,
        "this package, median": median(fused),
        "published, median": median(published),
        "ratio, min": min(ratios),
        "ratio, median": median(ratios),
        "ratio, max": max(ratios),
    }


def compare() -> list[Row]:
    rows = []
    with tqdm(total=2 * PAIRS * len(BATCHES), unit="process") as progress:
        for batch in BATCHES:
            found: dict[str, list[Measurement]] = {FUSED: [], PUBLISHED_FROZEN: []}
            for pair in range(PAIRS):
                for variant in (FUSED, PUBLISHED_FROZEN)[:: 1 if pair % 2 else -1]:
                    found[variant].append(measure_apart(variant, batch))
                    progress.update()
            columns = (zip(*values, strict=True) for values in found.values())
            rows += map(row, repeat(batch), QUANTITIES, *columns)
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(*measure(sys.argv[1], int(sys.argv[2])))
    else:
        results.run("cpu-step", "cpu", compare, __doc__)
