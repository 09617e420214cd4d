"""Time and memory of a training step (forward, backward, AdamW) of a timm ViT.

Times are compared with the published formulation with W_aux frozen. The peak is what lasts between steps (weights,
W_aux, Adam's states and the images) plus what the step adds according to the allocator. On a GPU the simulated peak is
beside it, from the table of `python -m benchmarks.memory`, which says what the levers are. Rounds end when the median
is known to 2 %, or at a limit.
"""

import gc
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import chain

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from benchmarks import results
from benchmarks.results import Row
from benchmarks.timing import DEVICE, ON_GPU, nbytes, peak_bytes, time_alone
from benchmarks.variants import (
    FUSED,
    FUSED_ADAMW,
    FUSED_INT8,
    FUSED_LEVERS,
    FUSED_LEVERS_ADAMW,
    MODELS,
    NO_LEVERS,
    PLAIN,
    PUBLISHED_FROZEN,
    PUBLISHED_TRAINED,
    Levers,
    adamw,
    every_lever,
    training_step,
    vision_transformer,
)

MIB = 2**20


@dataclass(frozen=True)
class Model:
    name: str
    architecture: str
    batch: int
    image_size: int
    options: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}, {self.batch}"


GPU_MODELS = [Model(name, MODELS[name], batch, 224) for batch in (64, 16) for name in ("ViT-B", "ViT-L", "ViT-g")]
CPU_MODELS = [Model("ViT-Ti, 2 blocks, 64 px", "vit_tiny_patch16_224", 2, 64, {"depth": 2, "img_size": 64})]
STEP_MODELS, MOST_ROUNDS = (GPU_MODELS, 10) if ON_GPU else (CPU_MODELS, 15)

WITH_LEVERS = FUSED_LEVERS if find_spec("bitsandbytes") else FUSED_LEVERS_ADAMW
GPU_VARIANTS = [PUBLISHED_FROZEN, PLAIN, FUSED, FUSED_INT8, WITH_LEVERS]
CPU_VARIANTS = [PUBLISHED_FROZEN, PLAIN, FUSED]
STEP_VARIANTS = [*(GPU_VARIANTS if ON_GPU else CPU_VARIANTS), PUBLISHED_TRAINED]
"""The baseline of times comes first."""

ONLY_IN_FULL = pytest.mark.full if ON_GPU else ()


def levers_of(variant: str, checkpointing: bool) -> Levers:
    if variant == FUSED_LEVERS:
        return every_lever(checkpointing, import_module("bitsandbytes.optim").AdamW8bit)
    return every_lever(checkpointing, FUSED_ADAMW) if variant == FUSED_LEVERS_ADAMW else NO_LEVERS


def prepare_step(
    stack: ExitStack, variant: str, model: Model, checkpointing: bool, autocast: bool
) -> tuple[Callable[[], None], int]:
    """A training step of a new model, which lives as long as the stack, and the bytes that last between steps."""
    network = stack.enter_context(vision_transformer(variant, model.architecture, DEVICE, **model.options))
    network.set_grad_checkpointing(checkpointing)
    levers = levers_of(variant, checkpointing)
    optimizer = adamw(network, levers)
    images = torch.randn(model.batch, 3, model.image_size, model.image_size, device=DEVICE)
    labels = torch.randint(1000, (model.batch,), device=DEVICE)

    def step() -> None:
        with save_on_cpu(pin_memory=True) if levers.on_host else nullcontext():
            training_step(network, optimizer, images, labels, autocast)

    states = (value for state in optimizer.state.values() for value in state.values())
    return step, nbytes(chain(network.parameters(), network.buffers(), states, [images]))


def published_milliseconds(setting: Row, rows: list[Row]) -> float | None:
    """The published formulation's time, if it was measured in this setting."""
    published = {**setting, "variant": PUBLISHED_FROZEN}.items()
    found = [row["median, ms"] for row in rows if row.items() >= published]
    return found[0] if found and isinstance(found[0], float) else None


def simulated_mib(setting: Row, variant: str) -> float | None:
    """The peak in the tracked table, if it is there."""
    step = {column: setting[column] for column in ("model", "batch", "checkpointing")}.items()
    for row in results.read(results.TRACKED / "memory-simulated.md"):
        if row.items() >= step and setting["precision"] == "autocast" and f"{variant}, simulated GiB" in row:
            return row[f"{variant}, simulated GiB"] * 1024
    return None


@pytest.fixture(autouse=True)
def _nothing_left_over() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=ONLY_IN_FULL if each == PUBLISHED_TRAINED else ()) for each in STEP_VARIANTS]
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "autocast", [pytest.param(False, id="float32", marks=ONLY_IN_FULL), pytest.param(True, id="autocast")]
)
@pytest.mark.parametrize("model", STEP_MODELS, ids=str)
def test_training_step(record, rows, model, autocast, checkpointing, variant):
    setting = {
        "model": model.name,
        "batch": model.batch,
        "precision": "autocast" if autocast else "float32",
        "checkpointing": "yes" if checkpointing else "no",
    }
    row = {
        **setting,
        "variant": variant,
        "p20, ms": "-",
        "median, ms": "out of memory",
        "p80, ms": "-",
        "rounds": "-",
        "time / published": "-",
        "peak, MiB": "-",
        "of it added by the step, MiB": "-",
    }
    timing = None
    with suppress(torch.OutOfMemoryError), ExitStack() as stack:
        step, lasting = prepare_step(stack, variant, model, checkpointing, autocast)
        step()
        added = peak_bytes(step)
        timing = time_alone(step, MOST_ROUNDS)
        row |= timing.columns("ms")
        row |= {"peak, MiB": (lasting + added) / MIB, "of it added by the step, MiB": added / MIB}
        if published := published_milliseconds(setting, [*rows, row]):
            row["time / published"] = row["median, ms"] / published
    if ON_GPU:
        simulated = simulated_mib(setting, variant)
        row["simulated peak, MiB"] = simulated or "-"
        row["measured / simulated"] = row["peak, MiB"] / simulated if simulated and timing else "-"
    record(row, timing)
