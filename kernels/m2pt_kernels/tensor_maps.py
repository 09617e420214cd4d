"""TMA tensor maps, made on the host and cached.

A map depends only on its cache key, and holds an address instead of a tensor: it cannot become stale, and keeps no
memory alive. The same goes for Triton's encoding of it, which depends on dtype and tile and is equal for all kernels.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .versions import NEWEST, RELEASE

DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}
MOST_MAPS = 2**14
"""How many are kept, of about a kilobyte each."""


class Address(NamedTuple):
    """Stands in for a tensor."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


class TensorMap(TensorDescriptor):
    """How TMA copies tiles of a matrix.

    Attributes:
        kind: what a kernel is compiled for.
        encoded: Triton's encoding, after the first launch.
    """

    encoded: list[Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kind = self.base.dtype, *self.block_shape


def tensor_map(matrix: Tensor, shape: tuple[int, int], pitch: int, tile: tuple[int, int]) -> TensorMap:
    """Make a map of a matrix of `shape` whose rows begin `pitch` entries apart, to copy tiles of it.

    Entries past the matrix are read as zero and not written. `plans` says what TMA can address.
    """
    return _map(matrix.data_ptr(), matrix.dtype, shape, (pitch, 1), tile)


def map_of_several(matrices: Tensor, height: int, width: int) -> TensorMap:
    """Make a map of matrices, (n, rows, columns) or just one, to copy tiles of height x width, each from one matrix."""
    rows, columns = matrices.shape[-2:]
    pitch = matrices.stride(-2)
    count, distance = (1, rows * pitch) if matrices.dim() == 2 else (len(matrices), matrices.stride(0))
    strides = distance, pitch, 1
    return _map(matrices.data_ptr(), matrices.dtype, (count, rows, columns), strides, (1, height, width))


@lru_cache(MOST_MAPS)
def _map(
    pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], tile: tuple[int, ...]
) -> TensorMap:
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), DTYPES[dtype])
    return TensorMap(Address(pointer, dtype), list(shape), list(strides), list(tile), layout)


def encode_once(compiled: CompiledKernel) -> None:
    """Let launches reuse a map's encoding: encoding all of a product's takes longer than the rest of a launch.

    Triton before 3.8 has no hook for this, and the hooks of newer releases are unknown.
    """
    launcher = compiled.run
    if isinstance(launcher, nvidia.CudaLauncher) and (3, 8) <= RELEASE <= NEWEST:
        launcher.launch = nvidia.wrap_handle_tensordesc_impl(
            triton.runtime.driver.active.utils.launch,
            compiled.src.signature,
            compiled.metadata.tensordesc_meta,
            _encoded,
        )


def _encoded(map: TensorMap, *described: Any) -> list[Any]:
    if map.encoded is None:
        map.encoded = nvidia.make_tensordesc_arg(map, *described)
    return map.encoded
