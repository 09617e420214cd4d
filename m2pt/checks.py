"""What arguments of several functions have to be, and packages that may be missing.

Every message begins with the name of the argument or of the module.
"""

import importlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsIndex

from torch import Tensor, nn

from m2pt_kernels.checks import check_tensor
from m2pt_kernels.divided import check_whole


def qualified_name(value: Any) -> str:
    """Its class with the module that defines it."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def check_module(argument: str, module: nn.Module) -> None:
    """Raise a TypeError unless it is a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(module).__name__}")


def check_kind(kind: Any, expected: str, **arguments: Any) -> None:
    """Raise a TypeError for an argument of another kind than the expected."""
    for name, value in arguments.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {expected}, got {value!r}")


def check_readable(argument: str, tensor: Tensor) -> None:
    """Raise a TypeError for a tensor of a class whose operators another package defines, as quantised ones are."""
    if type(tensor).__module__.split(".")[0] not in ("torch", __package__) and _has_own_operators(type(tensor)):
        remedy = "connect unquantised layers, and quantise what merging leaves"
        raise TypeError(f"{argument}: expected a plain tensor, got a {qualified_name(tensor)}: {remedy}")


def _has_own_operators(kind: type[Tensor]) -> bool:
    own = [vars(base) for base in kind.__mro__[: kind.__mro__.index(Tensor)] if base is not nn.Parameter]
    return any(name in entries for entries in own for name in ("__torch_function__", "__torch_dispatch__"))


def check_sizes(**sizes: int) -> None:
    """Raise a TypeError for what is no integer, and a ValueError for one below zero."""
    check_kind(SupportsIndex, "an integer", **sizes)
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name}: expected 0 or more, got {size}")


def checked_path(argument: str, path: str | os.PathLike) -> Path:
    """The path, or a TypeError."""
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"{argument}: expected a path, got {path!r}") from None


def check_state_dict(state_dict: Mapping[str, Tensor]) -> None:
    """That it holds named tensors with data.

    Raises:
        TypeError: something else.
        ValueError: a tensor that is sparse, nested, divided among processes, or on the meta device.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected tensors by name, got {type(state_dict).__name__}")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict: expected tensors by name, got {type(tensor).__name__} for {name!r}")
        check_tensor(f"state_dict: {name}", tensor)
        check_whole(f"state_dict: {name}", tensor)
        if tensor.is_meta:
            raise ValueError(f"state_dict: {name}: expected a tensor with data, got one on the meta device")


def one_of(argument: str, value: str, allowed: Collection[str]) -> str:
    """`value`, if it is allowed; otherwise a ValueError that lists what is."""
    if value not in list(allowed):
        raise ValueError(f"{argument}: expected one of {', '.join(sorted(allowed))}; got {value!r}")
    return value


def check_positive(**settings: int) -> None:
    """Raise a ValueError for a setting that is no positive integer."""
    for name, value in settings.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_probability(**settings: float) -> None:
    """Raise a ValueError for a setting that is no number in [0, 1]."""
    for name, value in settings.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a probability in [0, 1], got {value!r}")


def check_not_negative(**settings: float) -> None:
    """Raise a ValueError for a setting that is no finite number of 0 or more."""
    for name, value in settings.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected 0 or more, got {value!r}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or raise an ImportError that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install 'm2pt-triton[{extra}]'") from error
