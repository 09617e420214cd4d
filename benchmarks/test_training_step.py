"""A training step (forward, backward, AdamW) of a timm ViT: time and memory.

Ratios of time are to the published formulation with W_aux frozen. Memory is weights and Adam states, plus the peak that
the step adds to them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import pytest
import torch

from benchmarks.timing import DEVICE, ON_GPU, STOPWATCH, peak_bytes, run_paired
from benchmarks.variants import FUSED_INT8, PUBLISHED_FROZEN, VARIANTS, adamw, training_step, vision_transformer

MIB = 2**20


@dataclass(frozen=True)
class Model:
    name: str
    batch: int
    image_size: int
    options: dict[str, int] = field(default_factory=dict)


GPU_MODELS = (Model("vit_base_patch16_224", 64, 224), Model("vit_large_patch16_224", 64, 224))
STEP_VARIANTS = (*VARIANTS, FUSED_INT8) if ON_GPU else VARIANTS
CPU_MODELS = (Model("vit_tiny_patch16_224", 2, 64, {"depth": 2, "img_size": 64}),)
MODELS, ROUNDS = (GPU_MODELS, 6) if ON_GPU else (CPU_MODELS, 10)


def prepare_step(
    stack: ExitStack, variant: str, model: Model, checkpointing: bool, autocast: bool
) -> tuple[Callable[[], None], int]:
    """A training step of a new model, which lives as long as the stack, and the bytes of its weights and states."""
    network = stack.enter_context(vision_transformer(variant, model.name, DEVICE, **model.options))
    network.set_grad_checkpointing(checkpointing)
    optimizer = adamw(network)
    images = torch.randn(model.batch, 3, model.image_size, model.image_size, device=DEVICE)
    labels = torch.randint(1000, (model.batch,), device=DEVICE)
    states = (value for state in optimizer.state.values() for value in state.values())
    lasting = sum(tensor.nbytes for tensor in chain(network.parameters(), states))
    return partial(training_step, network, optimizer, images, labels, autocast), lasting


@pytest.mark.benchmark(timer=STOPWATCH)
@pytest.mark.parametrize("variant", STEP_VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "autocast",
    [pytest.param(False, id="float32", marks=pytest.mark.full if ON_GPU else ()), pytest.param(True, id="autocast")],
)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_training_step(benchmark, record, model, autocast, checkpointing, variant):
    with ExitStack() as stack:
        step, lasting = prepare_step(stack, variant, model, checkpointing, autocast)
        step()
        added = peak_bytes(step)
        reference, _ = prepare_step(stack, PUBLISHED_FROZEN, model, checkpointing, autocast)
        timing = run_paired(benchmark, lambda: step, lambda: reference, ROUNDS, warmup_rounds=2)
    size = ", ".join(f"{name} {value}" for name, value in model.options.items())
    record(
        {
            "model": f"{model.name} {size}".strip(),
            "batch": model.batch,
            "precision": "autocast" if autocast else "float32",
            "checkpointing": "yes" if checkpointing else "no",
            "variant": variant,
            "p20, ms": timing.p20 * 1e3,
            "median, ms": timing.p50 * 1e3,
            "p80, ms": timing.p80 * 1e3,
            "time / published, frozen": timing.ratio,
            "peak, MiB": (lasting + added) / MIB,
            "of it added by the step, MiB": added / MIB,
        }
    )
