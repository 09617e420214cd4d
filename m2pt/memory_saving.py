"""Every lever that lowers the peak memory of a training step, in one call."""

from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.optim import AdamW, Optimizer

from .checks import require
from .groups import parameter_groups
from .linear import fused_in
from .optimizer_in_backward import step_in_backward
from .pathway import quantize_aux
from .tensor_checks import check_module


def low_memory(model: nn.Module, lr: float, weight_decay: float = 0.05) -> Optimizer:
    """Prepare a connected model for training in as little memory as possible, and return its optimizer.

    The auxiliary weights become int8, unless some are quantised already. The blocks' activations are recomputed in
    backward, and their inputs are kept in the host's memory until then. Every parameter is updated inside backward:
    after `loss.backward()` call neither `optimizer.step` nor `zero_grad`, see `m2pt.step_in_backward`. The optimizer is
    bitsandbytes' 8-bit AdamW on a GPU, and torch's AdamW elsewhere. `m2pt.estimate_memory` says what each of these
    saves.

    Args:
        model: with fused layers and `set_grad_checkpointing`, as timm's have, on the device that it is trained on.
        lr, weight_decay: as in `m2pt.parameter_groups`.

    Raises:
        ImportError: the model is on a GPU and bitsandbytes is not installed.
        TypeError: `model` is not a module.
        ValueError: it has no fused layers, its auxiliary weights are trained, or it has no `set_grad_checkpointing`.
    """
    check_module("model", model)
    layers = fused_in(model)
    if not layers:
        raise ValueError(f"model: expected fused layers, got a {type(model).__name__} without any")
    set_checkpointing = getattr(model, "set_grad_checkpointing", None)
    if not callable(set_checkpointing):
        raise ValueError(f"model: expected set_grad_checkpointing, as timm's models have, got {type(model).__name__}")
    groups = parameter_groups(model, lr, weight_decay)
    on_gpu = next(model.parameters()).is_cuda
    create: Any = require("bitsandbytes.optim", "adam8bit").AdamW8bit if on_gpu else AdamW
    if all(layer.aux_weight_scale is None for layer in layers):
        quantize_aux(model, "int8")
    set_checkpointing()
    _offload(model)
    optimizer = create(groups, lr=lr)
    step_in_backward(optimizer)
    return optimizer


def _offload(model: nn.Module) -> None:
    """Keep what a forward pass of the model saves in the host's memory until backward."""
    running: list[save_on_cpu] = []

    def begin(*_: Any) -> None:
        running.append(save_on_cpu(pin_memory=next(model.parameters()).is_cuda))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__()

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end, always_call=True)
