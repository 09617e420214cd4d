"""Detect what is divided among processes: tensors by DTensor, modules by FSDP."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def check_whole(name: str, tensor: Tensor | None) -> None:
    """Raise a ValueError for a tensor that is divided among processes."""
    if _is_dtensor(tensor):
        raise ValueError(f"{name}: expected a whole tensor, got a DTensor: gather it with its full_tensor()")


def whole(tensor: Any) -> Tensor:
    """Gather a tensor that may be divided among processes; if it is, every process has to call this."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def is_divided(model: nn.Module, place: str) -> bool:
    """Return whether the module at a dotted name has DTensors, or is in one that FSDP divides, even if gathered now."""
    names = place.split(".") if place else []
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    own = (*around[-1].parameters(recurse=False), *around[-1].buffers(recurse=False))
    return bool(fsdp_modules(around) or flattened_modules(around)) or any(map(_is_dtensor, own))


def check_undivided(model: nn.Module, remedy: str) -> None:
    """Raise a ValueError for a model with a module that is divided among processes."""
    if names := [name for name, _ in model.named_modules() if is_divided(model, name)]:
        raise ValueError(f"model: {names[-1] or type(model).__name__} is divided among processes: {remedy}")


def fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the modules that FSDP2 divides."""
    return _of_fsdp(modules, "FSDPModule")


def flattened_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the modules that FSDP1 divides; a process may hold some of their parameters, or none."""
    return _of_fsdp(modules, "FullyShardedDataParallel")


def _of_fsdp(modules: Iterable[nn.Module], kind: str) -> list[Any]:
    """Return those of a class that takes most of a second to import; code that divided a module has imported it."""
    found = getattr(sys.modules.get("torch.distributed.fsdp"), kind, ())
    return [module for module in modules if isinstance(module, found)]


def _is_dtensor(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "full_tensor")
