"""Simulates the peak memory of a recipe's training step, with every further lever, and makes it fit a GPU."""

import os
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..checks import check_positive, nearest
from ..simulation import PARTS, Bytes, auxiliary_tensors
from .batches import micro_batch_size
from .distributed import World
from .levers import INT8, cheapest_first, further_levers, settings_of
from .one_step import aux_bytes, built, run_for_peak, simulated_peak
from .recipe import Data, Model, Recipe, Schedule, load_recipe, shipped_recipes
from .recipe import Optimizer as OptimizerSettings

GIB = 2**30
RESERVED = 1 * GIB
"""Kept free on a GPU for CUDA itself, its libraries' workspaces and the allocator's rounding."""

STAND_IN = "an auxiliary model of the same size"


@dataclass(frozen=True)
class MemoryEstimate:
    """The simulated peak of a training step.

    Attributes:
        recipe: what was asked for.
        peak: bytes by part, see `m2pt.simulation.PARTS`, at the moment when their sum is the largest.
        further: the same with each further lever added to those before it.
        fitting: the cheapest levers with which it fits a GPU of `gpu_bytes`, keys of `m2pt.train.levers.LEVERS`; None
            if it never does, or no GPU was given.
        gpu_bytes: the GPU's memory, or None.
    """

    recipe: Recipe
    peak: Bytes
    further: dict[str, Bytes]
    fitting: tuple[str, ...] | None = None
    gpu_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether it fits the given GPU as it is."""
        return self.fitting == ()

    @property
    def step(self) -> str:
        """What is simulated, in words."""
        data, auxiliary, machine = self.recipe.data, self.recipe.auxiliary, self.recipe.machine
        pathway = f", {' and '.join(auxiliary.paths)} as W_aux" if auxiliary.path else ""
        divided = f" in {machine.accumulation} micro-batches" if machine.accumulation > 1 else ""
        return f"a training step of {data.batch_size} samples{divided} in {machine.precision}{pathway}"

    def __str__(self) -> str:
        rows = {"as asked": self.peak} | {f"+ {lever}": peak for lever, peak in self.further.items()}
        width = max(map(len, rows))
        lines = [f"{'GiB':{width}} {'peak':>8} " + " ".join(f"{part:>11}" for part in PARTS)]
        for name, peak in rows.items():
            figures = " ".join(f"{peak[part] / GIB:11.2f}" for part in PARTS)
            lines.append(f"{name:{width}} {sum(peak.values()) / GIB:8.2f} {figures}")
        return "\n".join(lines)


def estimate_memory(
    recipe: str | os.PathLike | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    gpu_gib: float | None = None,
    num_classes: int = 1000,
) -> MemoryEstimate:
    """Simulate the peak memory of a training step in one process, by part, alone and with every further lever.

    Nothing is computed, and no data or checkpoint is read. For transformers of equal blocks, a few blocks are simulated
    and the others follow from them. What CUDA, its libraries and the allocator's rounding take is left out, but 1 GiB
    is kept for it if a GPU is given. If no auxiliary model is named, one of the same size is assumed.

    Args:
        recipe: a `Recipe`, a recipe's name or path, or the name of a timm ViT, which is then trained by AdamW in
            bfloat16 on batches of 64.
        overrides: dotted key -> value, as of `load_recipe`.
        gpu_gib: memory of a GPU in GiB, to find the cheapest levers that fit it.
        num_classes: of the data.

    Raises:
        FileNotFoundError: there is no such recipe and no such timm model.
        TypeError, ValueError: as in `load_recipe`; or the recipe divides the model (machine.sharding) or has an
            optimizer that cannot be simulated.
    """
    check_positive(num_classes=num_classes)
    asked = with_pathway(recipe, overrides)
    return estimate(asked, None if gpu_gib is None else int(gpu_gib * GIB), num_classes=num_classes)


def with_pathway(recipe: str | os.PathLike | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """As `resolved`, with an auxiliary model in any case, unless the recipe is for pretraining."""
    overrides = {} if overrides is None else overrides
    base = resolved(recipe)
    assumed = {} if base.auxiliary.path or base.pretraining else {"auxiliary.path": STAND_IN}
    return resolved(recipe, assumed | dict(overrides))


def free_bytes() -> int | None:
    """Free memory of the current GPU; None without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def whole_bytes() -> int | None:
    """All memory of the first GPU, so that all processes of a machine get the same answer; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def resolved(recipe: str | os.PathLike | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe, also of a timm model by its name."""
    overrides = {} if overrides is None else overrides
    if isinstance(recipe, Recipe):
        return recipe.with_overrides(overrides)
    name = os.fspath(recipe)
    if timm.is_model(name):
        plain = Recipe(Model("image", name), Data("image_folder", 64), OptimizerSettings(1e-3), Schedule(1))
        return plain.with_overrides(overrides)
    try:
        return load_recipe(name, overrides)
    except FileNotFoundError:
        known = nearest(name, [*shipped_recipes(), *timm.list_models()])
        raise FileNotFoundError(f"recipe: {name}: no such file, recipe or timm model{known}") from None


def estimate(
    recipe: Recipe, gpu_bytes: int | None, *, num_classes: int, processes: int = 1, views: int | None = None
) -> MemoryEstimate:
    """As `estimate_memory`, but in one of several processes, and with the recipe's own pathway."""

    @cache
    def simulated(levers: tuple[str, ...]) -> Bytes:
        return simulated_peak(recipe.with_overrides(settings_of(levers)), num_classes, processes, views)

    @cache
    def int8_bytes() -> int:
        return aux_bytes(recipe.with_overrides(settings_of([INT8])))

    def peak(levers: Sequence[str]) -> Bytes:
        """W_aux is held all the time, so its dtype moves all peaks alike."""
        parts = simulated(tuple(lever for lever in levers if lever != INT8))
        return parts | {"W_aux": int8_bytes()} if INT8 in levers else parts

    levers = further_levers(recipe, processes)
    further = {lever: peak(levers[: index + 1]) for index, lever in enumerate(levers)}
    fitting = None
    if gpu_bytes is not None and does_fit(peak(levers), gpu_bytes):
        fitting = next(chosen for chosen in cheapest_first(recipe, processes) if does_fit(peak(chosen), gpu_bytes))
    return MemoryEstimate(recipe, peak(()), further, fitting, gpu_bytes)


def does_fit(peak: Bytes, gpu_bytes: int) -> bool:
    """Whether a peak fits a GPU with so much free memory."""
    return sum(peak.values()) + RESERVED <= gpu_bytes


def fit_micro_batches(recipe: Recipe, gpu_bytes: int, *, num_classes: int = 1000, processes: int = 1) -> Recipe:
    """The recipe with the fewest micro-batches a step, machine.accumulation, with which a GPU holds its batch.

    Raises:
        ValueError: no number of them will do.
    """
    if recipe.machine.step_in_backward:
        raise ValueError(
            "data.batch_size: expected a number with machine.step_in_backward, got auto: a step is one micro-batch"
        )
    possible = []
    for micro_batches in range(1, recipe.data.batch_size + 1):
        if recipe.data.batch_size % micro_batches:
            continue
        with suppress(ValueError):  # not among so many processes, or not in pairs
            micro_batch_size(changed := recipe.with_overrides({"machine.accumulation": micro_batches}), processes)
            possible.append(changed)
    peak = partial(simulated_peak, num_classes=num_classes, processes=processes)
    place = bisect_left(possible, True, key=lambda changed: does_fit(peak(changed), gpu_bytes))
    if place == len(possible):
        samples = recipe.data.batch_size // possible[-1].machine.accumulation
        need = f"need {gib(peak(possible[-1]))} GiB, more than {(gpu_bytes - RESERVED) / GIB:.1f}"
        raise ValueError(f"data.batch_size: auto: micro-batches of {samples} samples {need}")
    return possible[place]


def gib(parts: Bytes) -> str:
    """A sum in GiB."""
    return f"{sum(parts.values()) / GIB:.1f}"


def in_words(parts: Bytes) -> str:
    """The parts in GiB, except negligible ones."""
    return ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size >= 0.05 * GIB) or "little"


def advice(recipe: Recipe, fitting: Sequence[str] | None, processes: int = 1) -> str:
    """What to add to a command so that it fits."""
    if fitting:
        return f"it fits with {assignments(fitting)}"
    least = further_levers(recipe, processes)
    more = [f"--preset low-memory ({assignments(least)})"] if least else []
    can_accumulate = not recipe.machine.step_in_backward and recipe.machine.sharding == "ddp"
    alone = ["data.batch_size=auto"] if can_accumulate else []
    return "try " + " or ".join([*more, *alone, "a smaller data.batch_size"])


def assignments(levers: Sequence[str]) -> str:
    """The levers as `key=value` on the command line."""
    said = {key: str(value).lower() if value is True else value for key, value in settings_of(levers).items()}
    return " ".join(f"{key}={value}" for key, value in said.items())


def memory_in_words(recipe: Recipe, num_classes: int, processes: int, views: int) -> str:
    """The simulated peak of a step in one process, or why it is not known."""
    try:
        peak = simulated_peak(recipe, num_classes, processes, views)
    except ValueError as error:
        return f"not known: {error}"
    return f"simulated peak of a step {gib(peak)} GiB ({in_words(peak)})"


def announce(recipe: Recipe, num_classes: int, world: World, views: int) -> None:
    """Say on stderr how much memory a step takes, and warn if the GPU has less free; without a GPU, say nothing."""
    if world.device.type != "cuda" or not world.is_first:
        return
    free = torch.cuda.mem_get_info()[0]
    try:
        peak = simulated_peak(recipe, num_classes, world.size, views)
        said = f"simulated peak of a step {gib(peak)} GiB ({in_words(peak)}); {free / GIB:.1f} GiB of the GPU are free"
        print(f"m2pt: {said}", file=sys.stderr)
        if not does_fit(peak, free):
            found = estimate(recipe, free, num_classes=num_classes, processes=world.size, views=views)
            how = advice(recipe, found.fitting, world.size)
            print(f"m2pt: warning: that does not fit: {how}", file=sys.stderr)
    except ValueError as error:
        print(f"m2pt: the memory of a step is not known: {error}", file=sys.stderr)


@contextmanager
def explained(
    recipe: Recipe, module: nn.Module, processes: int = 1, optimizer: Optimizer | None = None
) -> Iterator[None]:
    """Inside the block, a GPU out of memory raises a MemoryError of one line: what was held, and what to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        held = _held(module, optimizer)
        said = f"{gib(held)} GiB were held ({in_words(held)}): {advice(recipe, None, processes)}"
        raise MemoryError(f"the GPU is out of memory: {said}") from None


@contextmanager
def evaluation_explained(recipe: Recipe) -> Iterator[None]:
    """The same for an evaluation, where only the batch can be made smaller."""
    try:
        yield
    except torch.OutOfMemoryError:
        size = recipe.data.test_batch_size
        raise MemoryError(
            f"the GPU is out of memory in an evaluation: try a smaller data.test_batch_size than {size}"
        ) from None


def _held(module: nn.Module, optimizer: Optimizer | None) -> Bytes:
    """Bytes by part at the peak of this process."""
    states = {} if optimizer is None else optimizer.state
    aux = _nbytes(auxiliary_tensors(module))
    parts = {
        "weights": _nbytes([*module.parameters(), *module.buffers()]) - aux,
        "W_aux": aux,
        "gradients": _nbytes(parameter.grad for parameter in module.parameters()),
        "optimizer": _nbytes(value for state in states.values() for value in state.values()),
    }
    return parts | {"activations and transient": max(0, torch.cuda.max_memory_allocated() - sum(parts.values()))}


def _nbytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among the values; of divided ones, this process's part."""
    local = (value.to_local() if isinstance(value, DTensor) else value for value in values)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in local if isinstance(tensor, Tensor)}.values())


def measured_peak(recipe: Recipe, num_classes: int = 1000) -> int:
    """Measured bytes of a step at its peak on the current GPU, in this process alone.

    Raises:
        MemoryError: it does not fit.
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--measure: there is no GPU to run a step on")
    with torch.device("meta"):
        module = built(recipe, num_classes).train()
    with explained(recipe, module):
        return run_for_peak(recipe, module)
