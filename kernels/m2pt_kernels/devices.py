"""Facts from torch and Triton about the device that kernels are compiled for and launched on."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from .quantization import cuda_capability
from .versions import check_interpreter

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, as decided by TRITON_INTERPRET before this import."""

# Triton's interpreter multiplies the bits of bfloat16 as integers.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of floating operands that kernels read."""

OLDEST_CAPABILITY = 80
"""Older CUDA devices have no tensor cores that Triton supports, and would spill: plain torch is faster there."""


@cache
def supports(device: torch.device) -> bool:
    """Return whether a GPU can run the kernels well."""
    capability = cuda_capability(device)
    return capability is None or capability >= OLDEST_CAPABILITY


def check_runs_kernels() -> None:
    """Check that Triton can run the kernels on its active device, or in its interpreter.

    Raises:
        RuntimeError: it cannot.
    """
    if INTERPRETED:
        check_interpreter()
    try:
        capability = capability_of(active_target())
    except RuntimeError as error:
        raise RuntimeError('implementation("triton"): Triton has no active driver') from error
    if capability is not None and capability < OLDEST_CAPABILITY:
        raise RuntimeError(f'implementation("triton"): needs compute capability 8.0, got {capability / 10}')


def active_target() -> GPUTarget | None:
    """Return the target of Triton's active driver; None in the interpreter.

    Raises:
        RuntimeError: Triton has no active driver.
    """
    if INTERPRETED:
        return None
    driver = triton.runtime.driver.active
    return _target_of(driver, driver.get_current_device())


@cache
def _target_of(driver: DriverBase, device: int) -> GPUTarget:
    """Ask a driver for a device's target only once, as that takes microseconds."""
    return driver.get_current_target()


def capability_of(target: GPUTarget | None) -> int | None:
    """Return ten times the compute capability of a CUDA target; None for others."""
    return target.arch if target is not None and target.backend == "cuda" else None


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device current inside: Triton compiles for the current device and launches on it."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def device_name(device: torch.device) -> str:
    """Return the name of a GPU; its target is the same for its whole generation."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many SMs a GPU has; without a GPU, as many as an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def input_precision(dtype: torch.dtype, target: GPUTarget | None) -> str:
    """Return how float32 operands are multiplied: "ieee", or "tf32" where torch's precision setting allows it."""
    if dtype != torch.float32 or target is None or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if target.backend == "cuda" or target.arch == "gfx942" else "ieee"
