"""Levers: settings of a recipe that lower the peak memory of a training step."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from .recipe import Recipe

INT8 = "int8 W_aux"
ADAM = "8-bit Adam"
IN_BACKWARD = "step in backward"
CHECKPOINTING = "checkpointing"
ON_HOST = "block inputs on the host"

ALONE = ("adam", "adamw", "bnbadamw8bit", "sgd", "momentum")
"""Optimizers known to update every parameter by itself."""

QUANTIZED = ("int8", "int4", "float8_e4m3fn")

LEVERS: dict[str, dict[str, Any]] = {
    INT8: {"auxiliary.dtype": "int8"},
    ADAM: {"optimizer.name": "bnbadamw8bit"},
    IN_BACKWARD: {"machine.step_in_backward": True},
    CHECKPOINTING: {"machine.checkpoint_activations": True},
    ON_HOST: {"machine.offload_activations": True},
}
"""In order of the time they cost: the first three little, the next a second forward pass, the last copies too."""

IN_PYTHON = {
    INT8: 'reparameterize_aux_into_target_model(..., aux_dtype="int8")',
    ADAM: "bitsandbytes.optim.AdamW8bit",
    IN_BACKWARD: "m2pt.step_in_backward(optimizer)",
    CHECKPOINTING: "model.set_grad_checkpointing()",
    ON_HOST: "the forward pass inside torch.autograd.graph.save_on_cpu(pin_memory=True)",
}

COSTS = {INT8: 1, ADAM: 1, IN_BACKWARD: 1, CHECKPOINTING: 10, ON_HOST: 20}
"""Their sums rank combinations; they are not times."""


def further_levers(recipe: Recipe, processes: int = 1) -> list[str]:
    """Levers that the recipe does not use but could, in so many processes; the last needs checkpointing."""
    auxiliary, optimizer, machine = recipe.auxiliary, recipe.optimizer, recipe.machine
    alone = machine.accumulation == 1 and not optimizer.clip_grad and machine.precision != "float16"
    alone = alone and (processes == 1 or machine.sharding == "fsdp")  # DDP adds gradients later
    can_have = {
        INT8: bool(auxiliary.path) and not auxiliary.trainable and auxiliary.dtype not in QUANTIZED,
        ADAM: optimizer.name == "adamw" and machine.sharding != "fsdp",
        IN_BACKWARD: not machine.step_in_backward and alone and not machine.compile and optimizer.name in ALONE,
        CHECKPOINTING: not machine.checkpoint_activations,
        ON_HOST: not (machine.offload_activations or machine.compile),
    }
    return [lever for lever in LEVERS if can_have[lever]]


def settings_of(levers: Sequence[str]) -> dict[str, Any]:
    """The levers' settings by dotted key, as `load_recipe` takes them."""
    return {key: value for lever in levers for key, value in LEVERS[lever].items()}


def low_memory(recipe: Recipe, on_gpu: bool, processes: int = 1) -> dict[str, Any]:
    """The settings of every further lever; 8-bit Adam needs a GPU."""
    return settings_of([lever for lever in further_levers(recipe, processes) if on_gpu or lever != ADAM])


def cheapest_first(recipe: Recipe, processes: int = 1) -> Iterator[tuple[str, ...]]:
    """All combinations of further levers, from none to all, in the order of `COSTS`."""
    levers = further_levers(recipe, processes)
    found = [chosen for count in range(len(levers) + 1) for chosen in combinations(levers, count)]
    has_checkpointing = recipe.machine.checkpoint_activations
    possible = [chosen for chosen in found if ON_HOST not in chosen or has_checkpointing or CHECKPOINTING in chosen]
    yield from sorted(possible, key=lambda chosen: sum(COSTS[lever] for lever in chosen))
