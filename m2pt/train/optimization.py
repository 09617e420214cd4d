"""Optimizer, scheduler and loss of a recipe, from timm."""

from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from ..checks import require
from .recipe import Loss, Recipe


def create_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer over what is trainable, each layer with its learning rate.

    Vectors have no weight decay, and neither have the cross-modal scales, which are vectors too.

    Raises:
        ImportError: the optimizer's package is not installed.
        ValueError: there is no such optimizer, or none here: those of bitsandbytes need a GPU and whole parameters.
    """
    settings = recipe.optimizer
    if settings.name.startswith("bnb"):
        require("bitsandbytes", "adam8bit")
        if recipe.machine.sharding == "fsdp":
            raise ValueError(f"optimizer.name: {settings.name} does not know the shards of machine.sharding=fsdp")
    try:
        return create_optimizer_v2(
            module,
            opt=settings.name,
            lr=recipe.learning_rate,
            param_group_fn=lambda model: parameter_groups(model, recipe),
            **settings.options,
        )
    except AssertionError as error:  # timm's for a missing GPU
        raise ValueError(f"optimizer.name: {settings.name}: {error}") from None


def parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """timm's groups with layer decay, and the cross-modal scales apart from the others of their block."""
    settings = recipe.optimizer
    scales = {id(p) for name, p in module.named_parameters() if name.endswith("cross_modal_scale")}
    decay: dict[str, Any] = {"weight_decay": settings.weight_decay}
    if (no_weight_decay := getattr(module, "no_weight_decay", None)) is not None:
        decay["no_weight_decay_list"] = no_weight_decay()
    if settings.layer_decay == 1:
        whole = param_groups_weight_decay(module, **decay)
    else:
        whole = param_groups_layer_decay(module, layer_decay=settings.layer_decay, **decay)
    groups = []
    for group in whole:
        rate = group.get("lr_scale", 1.0)
        own = [p for p in group["params"] if id(p) in scales]
        others = [p for p in group["params"] if id(p) not in scales]
        groups.append(group | {"params": others, "lr_scale": rate})
        groups.append(group | {"params": own, "lr_scale": rate * settings.scale_learning_rate})
    groups = [group for group in groups if group["params"]]
    if settings.name == "lars":  # matrices adapt even without weight decay, vectors never (MAE's linear probe)
        groups = [group | {"always_adapt": all(p.ndim > 1 for p in group["params"])} for group in groups]
    return groups


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> Scheduler:
    """timm's scheduler, a function of the number of updates."""
    settings = recipe.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.name,
        num_epochs=settings.epochs - settings.warmup_epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_lr=settings.warmup_lr,
        warmup_prefix=True,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
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
