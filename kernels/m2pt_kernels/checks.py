"""Checks shared by every function: dense tensors, floating dtypes, one device. Messages begin with the argument."""

import torch
from torch import Tensor, strided

GEMM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Check that an argument is a dense tensor, with an element at every index.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is sparse or nested.
    """
    if getattr(tensor, "layout", None) is strided and not tensor.is_nested:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    raise ValueError(f"{name}: expected a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")


def check_operand(name: str, tensor: Tensor, device: torch.device | None) -> None:
    """Check that an argument is a dense tensor of a floating dtype, on a device.

    Raises:
        TypeError, ValueError: it is not.
    """
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected weight's device {device}, got {tensor.device}")
