"""Simulated peak memory of one training step at 224 pixels: float32 weights, bfloat16 autocast, AdamW.

Run as `python -m benchmarks.memory`. Nothing is computed: fake tensors are allocated and freed as the step's operators
do it. The simulation is of an H100, where AdamW is fused and gradients of few tiles are split, which takes at most 64
MiB of float32 sums while a layer's gradients are computed. The allocator's rounding and fragmentation, the CUDA context
and cuBLAS workspaces are left out. The levers are those of `python -m benchmarks.memory_levers`; without activation
checkpointing, nothing goes to the host.
"""

from dataclasses import dataclass
from functools import cache, partial
from itertools import product

import torch
from bitsandbytes.optim import AdamW8bit
from matplotlib.figure import Figure
from torch.utils._python_dispatch import _disable_current_modes
from tqdm import tqdm

from benchmarks import results
from benchmarks.compile_report import chosen
from benchmarks.cost import H100
from benchmarks.results import Row
from benchmarks.variants import (
    FUSED_ADAMW,
    FUSED_INT4,
    FUSED_INT8,
    FUSED_LEVERS,
    FUSED_LEVERS_ADAMW,
    MODELS,
    NO_LEVERS,
    PUBLISHED_TRAINED,
    VARIANTS,
    Levers,
    adamw,
    every_lever,
    forward,
    vision_transformer,
)
from m2pt import simulation
from m2pt_kernels.products import GradParameters

MEMORY_VARIANTS = (*VARIANTS, FUSED_INT8, FUSED_INT4)
BATCHES = (4, 16, 64)
GIB = 2**30


class SimulatedAdamW8bit(AdamW8bit):
    """bitsandbytes' optimizer for fake tensors: it makes its own states, but computes nothing."""

    def fill_qmap(self) -> None:
        self.name2qmap = {"dynamic": torch.empty(256), "udynamic": torch.empty(256)}

    def update_step(self, *arguments: object) -> None:
        pass


OPTIMIZERS = {FUSED_LEVERS: SimulatedAdamW8bit, FUSED_LEVERS_ADAMW: FUSED_ADAMW}


@cache
def splits_of(rows: int, columns: int, tokens: int) -> int:
    """Return how many blocks of an H100 share the reduction of half-precision gradients."""
    with _disable_current_modes():
        grad_output, x = (torch.empty(tokens, size, dtype=torch.bfloat16, device="meta") for size in (rows, columns))
        product = GradParameters(grad_output, x, None, None, torch.float32, None)
        return chosen("sm_90", product, H100.multiprocessors).splits


@dataclass(frozen=True)
class Step:
    model: str
    batch: int
    checkpointing: bool


STEPS = [Step(*values) for values in product(MODELS, BATCHES, (False, True))]


def peak_gib(step: Step, variant: str, levers: Levers = NO_LEVERS) -> float:
    """Simulate the peak of weights, gradients, Adam states, images and everything kept for backward."""
    model_at = vision_transformer(variant, MODELS[step.model], "meta")
    with model_at as model, simulation.fake():
        model.to_empty(device="cpu")
        model.set_grad_checkpointing(step.checkpointing)
        optimizer = adamw(model, levers)
        images, labels = torch.empty(step.batch, 3, 224, 224), torch.zeros(step.batch, dtype=torch.long)
        batch = images, labels
        loss = partial(forward, model, *batch, autocast=True)
        moments = simulation.simulate(model, optimizer, batch, loss, on_host=levers.on_host, splits=splits_of)
    return max(sum(parts.values()) for parts in moments.values()) / GIB


def row(step: Step, peaks: dict[str, float]) -> Row:
    return {
        "model": step.model,
        "batch": step.batch,
        "checkpointing": "yes" if step.checkpointing else "no",
        **{f"{variant}, simulated GiB": peak for variant, peak in peaks.items()},
        "int8 / published, trained": peaks[FUSED_INT8] / peaks[PUBLISHED_TRAINED],
    }


def plot(rows: list[Row]) -> Figure:
    """Plot simulated GiB: a panel per batch and checkpointing, a group of bars per model, a bar per variant."""
    figure = Figure(figsize=(11, 10), layout="constrained")
    figure.suptitle("Simulated peak memory of a training step, float32 weights, bfloat16 autocast, AdamW")
    settings = list(product(BATCHES, ("no", "yes")))
    for axes, (batch, checkpointing) in zip(figure.subplots(len(BATCHES), 2).flat, settings, strict=True):
        shown = [row for row in rows if (row["batch"], row["checkpointing"]) == (batch, checkpointing)]
        for index, variant in enumerate(MEMORY_VARIANTS):
            heights = [row[f"{variant}, simulated GiB"] for row in shown]
            axes.bar([place + 0.12 * index for place in range(len(MODELS))], heights, 0.12, label=variant)
        axes.set_title(f"batch {batch}, {'activation' if checkpointing == 'yes' else 'no'} checkpointing")
        axes.set_xticks([place + 0.36 for place in range(len(MODELS))], MODELS)
        axes.set_ylabel("simulated GiB")
    figure.axes[0].legend()
    return figure


def simulate() -> list[Row]:
    rows = []
    for step in tqdm(STEPS, unit="step"):
        peaks = {variant: peak_gib(step, variant) for variant in MEMORY_VARIANTS}
        for name, optimizer in OPTIMIZERS.items():
            peaks[name] = peak_gib(step, name, every_lever(step.checkpointing, optimizer))
        rows.append(row(step, peaks))
    return rows


if __name__ == "__main__":
    written = results.run("memory", "simulated", simulate, __doc__)
    plot(results.read(written)).savefig(written.with_suffix(".png"), dpi=80)
