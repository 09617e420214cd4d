"""Optimizer, scheduler and loss of a recipe, from timm."""

from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from ..checks import nearest, require
from ..groups import parameter_groups
from .recipe import Loss, Recipe

FUSED = {"adam", "adamw"}
"""Optimizers whose fused form is used unless the recipe says otherwise: it can skip an update on the device.
Momentum's cannot skip the first one: its state would then be whatever was in memory."""

SCHEDULERS = ("cosine", "tanh", "step", "multistep", "plateau", "poly")
"""Some schedulers that every supported timm has."""


def create_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer for the trainable parameters, with a learning rate for each layer.

    Raises:
        ImportError: the optimizer's package is not installed.
        ValueError: the optimizer is unknown, or cannot run here: bitsandbytes' need a GPU and whole parameters.
    """
    settings = recipe.optimizer
    is_fused = settings.name in FUSED and settings.options.keys().isdisjoint({"fused", "foreach", "differentiable"})
    known = [str(name) for name in list_optimizers()]
    if settings.name.lower().rpartition("_")[2] not in known:  # "lookahead" may come before it
        raise ValueError(
            f"optimizer.name: expected one of timm's optimizers, got {settings.name!r}{nearest(settings.name, known)}"
        )
    if settings.name.startswith("bnb"):
        require("bitsandbytes", "adam8bit")
        if recipe.machine.sharding == "fsdp":
            raise ValueError(f"optimizer.name: {settings.name} does not support the shards of machine.sharding=fsdp")
    try:
        return create_optimizer_v2(
            module,
            opt=settings.name,
            lr=recipe.learning_rate,
            param_group_fn=lambda model: scaled_groups(model, recipe),
            **settings.options | ({"fused": True} if is_fused else {}),
        )
    except AssertionError as error:  # timm's for a missing GPU
        raise ValueError(f"optimizer.name: {settings.name}: {error}") from None


def scaled_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """`m2pt.parameter_groups` as timm's schedulers take them: with a factor of the learning rate, `lr_scale`."""
    settings = recipe.optimizer
    groups = parameter_groups(module, 1.0, settings.weight_decay, settings.scale_learning_rate, settings.layer_decay)
    for group in groups:
        group["lr_scale"] = group.pop("lr")
    if settings.name == "lars":  # matrices adapt even without weight decay, vectors never (MAE's linear probe)
        groups = [group | {"always_adapt": all(p.ndim > 1 for p in group["params"])} for group in groups]
    return groups


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> Scheduler:
    """timm's scheduler, a function of the number of updates.

    Raises:
        ValueError: there is no such scheduler, or it does not fit the number of epochs.
    """
    settings = recipe.schedule
    epochs: dict[str, Any] = {"num_epochs": settings.epochs - settings.warmup, "warmup_epochs": settings.warmup}
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=settings.name,
            **epochs,  # which timm declares as integers; fractions do as well
            warmup_lr=settings.warmup_lr,
            warmup_prefix=True,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except ValueError as error:
        raise ValueError(f"schedule.name: {str(error).rstrip('.')}{nearest(settings.name, SCHEDULERS)}") from None
    return scheduler


def create_mixing(loss: Loss, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix of inputs (B, C, ..., H, W) and class indices (B,), or None; the targets get smoothed."""
    if not (loss.mixup or loss.cutmix):
        return None
    mixup = Mixup(loss.mixup, loss.cutmix, label_smoothing=loss.label_smoothing, num_classes=num_classes)

    def mix(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        flat, target = mixup(input.flatten(1, -3), target)  # timm cuts boxes out of the third and fourth axis
        return flat.view_as(input), target

    return mix


def create_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """timm's losses of logits (..., classes), in float32, for class indices (...) or soft targets (..., classes)."""
    binary = BinaryCrossEntropy(loss.label_smoothing)
    hard, soft = LabelSmoothingCrossEntropy(loss.label_smoothing), SoftTargetCrossEntropy()

    def compute(logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.float()
        if loss.name == "binary_cross_entropy":
            return binary(logits, target)
        if target.is_floating_point():
            return soft(logits, target)
        return hard(logits.flatten(0, -2), target.flatten())

    return compute
