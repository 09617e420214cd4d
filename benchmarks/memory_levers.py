"""Simulated peak memory of a training step with activation checkpointing, and everything that lowers it.

Run as `python -m benchmarks.memory_levers`; simulated like `python -m benchmarks.memory`. Ratios are to the published
formulation. "Step in backward" is `m2pt.step_in_backward`. "8-bit Adam" is bitsandbytes' AdamW8bit: it allocates its
own states; its update, one in-place kernel on a GPU, is left out. "Block inputs on the host" is
`torch.autograd.graph.save_on_cpu`: saved tensors leave the GPU and come back as new tensors; host memory and the time
of the copies are not counted.
"""

from itertools import product

from tqdm import tqdm

from benchmarks import results
from benchmarks.memory import SimulatedAdamW8bit, Step, peak_gib
from benchmarks.results import Row
from benchmarks.variants import FUSED_INT8, NO_LEVERS, PUBLISHED_TRAINED, Levers

STEPS = [Step(model, batch, checkpointing=True) for model, batch in product(("ViT-g", "ViT-G"), (4, 64))]


LEVERS = {
    "": NO_LEVERS,
    ", step in backward": Levers(in_backward=True),
    ", 8-bit Adam": Levers(SimulatedAdamW8bit),
    ", 8-bit Adam, step in backward": Levers(SimulatedAdamW8bit, in_backward=True),
    ", 8-bit Adam, step in backward, block inputs on the host": Levers(SimulatedAdamW8bit, True, on_host=True),
}


def row(name: str, peaks: list[float], published: list[float]) -> Row:
    figures: Row = {}
    for step, peak, reference in zip(STEPS, peaks, published, strict=True):
        place = f"{step.model}, batch {step.batch}"
        figures |= {f"{place}, simulated GiB": peak, f"{place}, ratio": peak / reference}
    return {"with activation checkpointing": name, **figures}


def simulate() -> list[Row]:
    published = [peak_gib(step, PUBLISHED_TRAINED) for step in tqdm(STEPS)]
    rows = [row(PUBLISHED_TRAINED, published, published)]
    for name, levers in LEVERS.items():
        peaks = [peak_gib(step, FUSED_INT8, levers) for step in tqdm(STEPS)]
        rows.append(row(FUSED_INT8 + name, peaks, published))
    return rows


if __name__ == "__main__":
    results.run("memory-levers", "simulated", simulate, __doc__)
