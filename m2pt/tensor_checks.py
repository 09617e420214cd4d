"""Checks of modules, tensors and state dicts. Every message begins with the name of the argument."""

from collections.abc import Mapping

from torch import Tensor, nn

from m2pt_kernels.checks import check_tensor
from m2pt_kernels.divided import check_whole

from .checks import qualified_name


def check_module(argument: str, module: nn.Module) -> None:
    """Raise a TypeError unless it is a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(module).__name__}")


def check_readable(argument: str, tensor: Tensor) -> None:
    """Raise a TypeError for a tensor of a class whose operators another package defines, such as a quantised one."""
    if type(tensor).__module__.split(".")[0] not in ("torch", __package__) and _has_own_operators(type(tensor)):
        remedy = "connect unquantised layers, and quantise what merging leaves"
        raise TypeError(f"{argument}: expected a plain tensor, got a {qualified_name(tensor)}: {remedy}")


def _has_own_operators(kind: type[Tensor]) -> bool:
    own = [vars(base) for base in kind.__mro__[: kind.__mro__.index(Tensor)] if base is not nn.Parameter]
    return any(name in entries for entries in own for name in ("__torch_function__", "__torch_dispatch__"))


def check_state_dict(state_dict: Mapping[str, Tensor]) -> None:
    """Check that it holds named tensors with data.

    Raises:
        TypeError: it holds anything else.
        ValueError: a tensor is sparse, nested, divided among processes, or on the meta device.
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
