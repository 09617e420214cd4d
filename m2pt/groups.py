"""Parameter groups for an optimizer, each with its learning rate and weight decay."""

from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .checks import check_kind, check_not_negative
from .linear import fused_in
from .tensor_checks import check_module


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, scale_lr: float | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group a model's trainable parameters for an optimizer: `AdamW(parameter_groups(model, 1e-3, 0.05))`.

    Vectors, such as biases and the cross-modal scales, get no weight decay. Neither do the parameters that the model's
    own `no_weight_decay()` names; timm's models have that method.

    Args:
        model: with or without a pathway. Its own methods are called, so pass a part of a larger module by itself.
        lr: the learning rate.
        weight_decay: for tensors of two or more dimensions.
        scale_lr: the learning rate of the cross-modal scales; None for `lr`.
        layer_decay: a block's learning rates divided by those of the next block (BEiT, ICLR 2022).

    Returns:
        A group for each learning rate and weight decay. Frozen parameters are in none.

    Raises:
        TypeError: `model` is not a module, or a rate is not a number.
        ValueError: a rate is negative or not finite; `layer_decay` is not in (0, 1], or is below 1 for a model without
            `group_matcher()`.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # takes longer than all of m2pt

    check_module("model", model)
    model = _inner(model)
    scale_lr = lr if scale_lr is None else scale_lr
    check_kind((int, float), "a number", lr=lr, weight_decay=weight_decay, scale_lr=scale_lr, layer_decay=layer_decay)
    check_not_negative(lr=lr, weight_decay=weight_decay, scale_lr=scale_lr)
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: expected a number in (0, 1], got {layer_decay!r}")
    if layer_decay < 1 and not hasattr(type(model), "group_matcher"):
        kind = type(model).__name__
        raise ValueError(f"layer_decay: expected 1, as {kind} has no group_matcher() like timm's models")
    decay: dict[str, Any] = {"weight_decay": weight_decay}
    if hasattr(type(model), "no_weight_decay"):
        decay["no_weight_decay_list"] = cast(Any, model).no_weight_decay()
    if layer_decay == 1:
        blocks = param_groups_weight_decay(model, **decay)
    else:
        blocks = param_groups_layer_decay(model, layer_decay=layer_decay, **decay)
    layers = fused_in(model)
    scales = {id(layer.cross_modal_scale) for layer in layers}
    frozen = {id(layer.aux_weight) for layer in layers if not layer.is_aux_trainable}
    groups = []
    for block in blocks:
        rate = block.pop("lr_scale", 1.0)
        own = [p for p in block["params"] if id(p) in scales]
        others = [p for p in block["params"] if id(p) not in scales | frozen]
        groups += [block | {"params": others, "lr": lr * rate}, block | {"params": own, "lr": scale_lr * rate}]
    return [group for group in groups if group["params"]]


def _inner(model: nn.Module) -> nn.Module:
    """The model inside torch's wrappers: its own methods use names without the wrappers."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return _inner(model.module)
    compiled = model._modules.get("_orig_mod")
    return model if compiled is None else _inner(compiled)
