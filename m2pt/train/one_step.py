"""Finds the peak memory of one training step without data and checkpoints: simulates it, or runs it on a GPU."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ..models import MaskedAutoencoder
from ..optimizer_in_backward import step_in_backward
from ..simulation import PARTS, Bytes, Moment, auxiliary_tensors, blocks_of, fake, simulate
from .batches import micro_batch_size
from .creation import connect, created, restrict
from .engine import autocast, offloading
from .optimization import create_loss, create_optimizer
from .recipe import Recipe

SIMULATED_BLOCKS = (3, 4)
"""The depths that are simulated: a step's moments are linear in the depth, a block's in its place."""

INITIALISE = {
    getattr(Tensor, name) for name in ("add_", "clamp_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_")
}

EIGHT_BIT = ("bnbadam8bit", "bnbadamw8bit")
SIMULATED = ("adam", "adamw", "lamb", "lars", "lion", "momentum", "nadamw", "sgd", *EIGHT_BIT)
"""Optimizers whose states are their own, and which compute everything they need on the device."""


class Uninitialised(TorchFunctionMode):
    """Inside the block nothing is written to tensors, which takes time even on "meta"."""

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), named: Any = None) -> Any:
        return arguments[0] if function in INITIALISE else function(*arguments, **(named or {}))


def simulated_peak(recipe: Recipe, num_classes: int, processes: int = 1, views: int | None = None) -> Bytes:
    """Bytes by part at the peak of one step in one process of several, under DDP."""
    if recipe.machine.sharding == "fsdp":
        raise ValueError("machine.sharding: the memory of 'fsdp' is not simulated")
    of_depth = partial(_moments, recipe, num_classes, processes, views)
    moments = of_depth(None) if (depth := equal_blocks(recipe)) is None else _extrapolated(of_depth, depth)
    return max(moments.values(), key=lambda parts: sum(parts.values()))


EQUAL_BLOCKS: dict[str, int | None] = {}
"""Results of `equal_blocks`, by model."""


def equal_blocks(recipe: Recipe) -> int | None:
    """How many blocks the model has, if they are equal and their number can be chosen and is not small."""
    model = repr(recipe.model)
    if model not in EQUAL_BLOCKS:
        EQUAL_BLOCKS[model] = _count_equal_blocks(recipe)
    return EQUAL_BLOCKS[model]


def _count_equal_blocks(recipe: Recipe) -> int | None:
    with torch.device("meta"), Uninitialised():
        blocks = blocks_of(_created(recipe, 0))
        shapes = [[parameter.shape for parameter in block.parameters()] for block in blocks]
        if len(blocks) <= max(SIMULATED_BLOCKS) or any(shape != shapes[0] for shape in shapes):
            return None
        try:
            fewer = blocks_of(_created(_with_depth(recipe, min(SIMULATED_BLOCKS)), 0))
        except (TypeError, ValueError, RuntimeError):  # a model that has no such argument
            return None
    return len(blocks) if len(fewer) == min(SIMULATED_BLOCKS) else None


def _extrapolated(of_depth: Callable[[int], dict[Moment, Bytes]], depth: int) -> dict[Moment, Bytes]:
    fewer, more = map(of_depth, SIMULATED_BLOCKS)
    left = depth - max(SIMULATED_BLOCKS)
    return {
        moment: {part: more[moment][part] + left * (more[moment][part] - fewer[moment][part]) for part in PARTS}
        for moment in fewer.keys() & more.keys()
    }


def _with_depth(recipe: Recipe, depth: int | None) -> Recipe:
    return recipe if depth is None else recipe.with_overrides({"model.overrides.depth": depth})


def _created(recipe: Recipe, num_classes: int) -> Any:
    model = recipe.model
    if timm.is_model(model.size):
        return timm.create_model(model.size, num_classes=num_classes, **model.overrides)
    return created(recipe, num_classes)


def _moments(
    recipe: Recipe, num_classes: int, processes: int, views: int | None, depth: int | None
) -> dict[Moment, Bytes]:
    """The peaks of a step's moments, with the model at a depth."""
    recipe = _with_depth(recipe, depth)
    with torch.device("meta"), Uninitialised():
        module = built(recipe, num_classes).train()
        average = copy.deepcopy(module) if recipe.run.ema_decay else None
    with fake():
        for each in (module, *([] if average is None else [average])):
            each.to_empty(device="cpu")
        optimizer = _optimizer(module, recipe, simulated=True)
        batch = _example(module, recipe, processes, views, "cpu")
        return simulate(
            module,
            optimizer,
            batch,
            partial(_loss, module, recipe, batch),
            micro_batches=recipe.machine.accumulation,
            on_host=recipe.machine.offload_activations,
            average=average,
            buckets=processes > 1,
        )


def aux_bytes(recipe: Recipe) -> int:
    """Bytes of the auxiliary weights and their scales."""
    with torch.device("meta"), Uninitialised():
        return sum(tensor.nbytes for tensor in auxiliary_tensors(built(recipe, 0)))


def run_for_peak(recipe: Recipe, module: nn.Module) -> int:
    """Bytes that a step of a model on "meta" takes at its peak on the current GPU, in this process alone."""
    module.to_empty(device="cuda")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()
    average = copy.deepcopy(module) if recipe.run.ema_decay else None
    optimizer = _optimizer(module, recipe, simulated=False)
    batch = _example(module, recipe, 1, None, "cuda")
    for _ in range(2):  # the first allocates the libraries' workspaces
        torch.cuda.reset_peak_memory_stats()
        for _ in range(min(recipe.machine.accumulation, 2)):
            with offloading(recipe.machine):
                loss = _loss(module, recipe, batch)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()
    del average
    return torch.cuda.max_memory_allocated()


def built(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model, with auxiliary models of its own size in place of those of the recipe."""
    module = _created(recipe, 0 if recipe.pretraining else num_classes)
    if recipe.auxiliary.path:
        connect(module, {path: _created(recipe, 0) for path in recipe.auxiliary.paths}, recipe)
    restrict(module, recipe)
    if recipe.machine.checkpoint_activations:
        module.set_grad_checkpointing()
    return MaskedAutoencoder(module, **vars(recipe.pretraining)).freeze_unused() if recipe.pretraining else module


def _optimizer(module: nn.Module, recipe: Recipe, simulated: bool) -> Optimizer:
    """The recipe's optimizer, with its states created."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if simulated and recipe.optimizer.name not in SIMULATED:
        raise ValueError(f"optimizer.name: {recipe.optimizer.name} is not simulated, only {', '.join(SIMULATED)}")
    if simulated and recipe.optimizer.name in EIGHT_BIT:
        optimizer: Optimizer = EightBitStates(trained, {})
    else:
        optimizer = create_optimizer(module, recipe)
    if simulated:
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True  # as torch does on a GPU
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except DataDependentOutputException as error:
        raise ValueError(f"optimizer.name: {recipe.optimizer.name} cannot be simulated: {error}") from None
    optimizer.zero_grad()
    if recipe.machine.step_in_backward:
        step_in_backward(optimizer)
    return optimizer


class EightBitStates(Optimizer):
    """The states of bitsandbytes' 8-bit Adam, whose kernels update in place: nothing is computed."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self.states_of(parameter)

    def states_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Two moments: float32 for small parameters, otherwise bytes with a float32 for each block of 256."""
        count = parameter.numel()
        if count < 4096:
            return {name: torch.empty_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
        states = {name: torch.empty_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")}
        blocks = {name: torch.empty(math.ceil(count / 256)) for name in ("absmax1", "absmax2")}
        return states | blocks


def _example(module: Any, recipe: Recipe, processes: int, views: int | None, device: str) -> tuple[Any, Tensor]:
    """Input and target of one process's micro-batch."""
    settings = recipe.data.settings
    size = micro_batch_size(recipe, processes)
    size *= settings.get("repeats", 1) if views is None else views
    labels = torch.zeros(size, dtype=torch.long, device=device)
    model = module.model if recipe.pretraining else module
    empty = partial(torch.zeros, device=device)
    if recipe.model.modality == "point":
        segments = recipe.model.task == "segmentation"
        cloud = empty(size, settings.get("points", 2048 if segments else 1024), 3)
        return ((cloud, labels), labels.new_zeros(cloud.shape[:2])) if segments else (cloud, labels)
    embed = model.patch_embed
    shape = getattr(embed, "clip_size", None) or embed.img_size or model.default_cfg["input_size"][1:]
    return empty(size, embed.proj.in_channels, *shape), labels


def _loss(module: nn.Module, recipe: Recipe, batch: tuple[Any, Tensor]) -> Tensor:
    """The loss of a micro-batch, in the recipe's precision."""
    input, target = batch
    with autocast(recipe.machine, target.device):
        if recipe.pretraining:
            return module(input)
        logits = module(input)
        if recipe.loss.name == "binary_cross_entropy" or recipe.loss.mixup or recipe.loss.cutmix:
            target = torch.zeros_like(logits, dtype=torch.float32)
        return create_loss(recipe.loss)(logits, target)
