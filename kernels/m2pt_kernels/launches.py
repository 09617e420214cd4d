"""Launch kernels and keep what was compiled: Triton takes longer to look it up than to launch it."""

from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from .devices import active_target

HELD: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}
"""Compiled kernels and their constants, by the arguments and settings that make Triton compile anew.

Hooks that change what Triton compiles are only asked when nothing is held.
"""
MOST_HELD = 2**12


class NotCompiledError(RuntimeError):
    """A kernel does not compile for this GPU with this release of Triton."""


def launch(
    kernel: JITFunction,
    grid: tuple[int, int],
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int | None, ...],
    tile: Any,
    maps: tuple[Any | None, ...] = (),
    **constants: Any,
) -> None:
    """Launch a kernel with a grid on the current device and its current stream.

    Args:
        tensors: the first arguments, on the current device.
        sizes: the arguments after them.
        tile: constants by name; `constants` are the remaining arguments and options.
        maps: arguments before the tensors, made by `tensor_maps`.

    Raises:
        NotCompiledError: a kernel that takes maps does not compile; such kernels use Triton's experimental Gluon.
    """
    target = active_target()
    if target is None or target.backend != "cuda":  # elsewhere code also depends on how large a tensor's storage is
        kernel[grid](*tensors, *sizes, **tile._asdict(), **constants)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    kinds = [None if map is None else map.kind for map in maps]
    pointers = [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors]
    settings = knobs.runtime.debug, getattr(knobs.compilation, "instrumentation_mode", "")
    key = (kernel.fn, device, settings, *kinds, *pointers, sizes, tile, *constants.values())
    arguments = *maps, *tensors, *sizes
    if held := HELD.get(key):
        compiled, values = held
        compiled[grid[0], grid[1], 1](*arguments, *values, stream=driver.get_current_stream(device))
        return
    constants |= tile._asdict()
    if maps:
        _compile(kernel, *arguments, grid=grid, **constants)
    compiled = kernel[grid](*arguments, **constants)
    if isinstance(compiled, CompiledKernel):
        if len(HELD) >= MOST_HELD:  # of sizes that keep changing
            HELD.clear()
        if maps and not any(settings):  # instrumentation adds arguments to a launch
            from .tensor_maps import encode_once  # which needs Gluon, as maps do

            encode_once(compiled)
        HELD[key] = compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]


def _compile(kernel: JITFunction, *arguments: Any, **options: Any) -> None:
    try:
        kernel.warmup(*arguments, **options)
    except OSError:  # of the compiler's cache
        raise
    except Exception as error:  # whatever the compiler raises
        raise NotCompiledError(f"{type(error).__name__}: {error}") from error
