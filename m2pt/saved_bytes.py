"""Counts the bytes that autograd saves for backward, and offers the published formulation for comparison."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from m2pt_kernels.divided import check_undivided

from .linear import FusedCrossModalLinear
from .tensor_checks import check_module


def saved_for_backward_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes that `model(*inputs)` saves for backward: every storage once, without the model's parameters and buffers.

    Precision, device and required gradients are the caller's: call it inside `torch.autocast` to measure that.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it is divided among processes.
    """
    check_module("model", model)
    check_undivided(model, "ask before dividing the model")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*inputs)
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in saved)}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@contextmanager
def published_formulation(model: nn.Module) -> Iterator[None]:
    """Inside the block, every fused layer of `model` computes as the published code does, storing the combined weight.

    Raises:
        TypeError: `model` is not a module.
        ValueError: no fused layer in `model`, or one with a quantised W_aux or several, which the published code does
            not have.
    """
    check_module("model", model)
    layers = [module for module in model.modules() if isinstance(module, FusedCrossModalLinear)]
    if not layers:
        raise ValueError(f"model: there is no FusedCrossModalLinear in this {type(model).__name__}")
    if any(layer.aux_weight_scale is not None or layer.aux_weight.dim() != 2 for layer in layers):
        raise ValueError("model: expected one floating auxiliary weight a layer, got quantised ones or several")
    for layer in layers:
        layer.forward = partial(_published_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _published_forward(layer: FusedCrossModalLinear, input: Tensor) -> Tensor:
    return F.linear(input, layer.weight + layer.cross_modal_scale * layer.aux_weight, layer.bias)
