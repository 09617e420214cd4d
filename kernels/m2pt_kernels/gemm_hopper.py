"""The GEMMs for sm_90: tensors arrive by TMA in a warp of their own, and consumer warps feed wgmma from registers.

Products of weights are computed transposed, `Y^T = (W + s * W_aux) X^T`: then the combined tile is wgmma's A operand,
which may stay in registers, so that it is never written anywhere, not even to shared memory. Half-precision activations
only; matrices that TMA cannot address go to `gemm.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .configs import GROUP
from .tiles import store_gradients, tile_of_program


@triton.jit
def _relabel(tile, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Permute every 8 rows as an OUTER x INNER matrix transposed; (4, 2) and (2, 4) undo each other.

    In wgmma's A operand four lanes share a row, and eight rows a warp: relabelled, they read float32 rows without bank
    conflicts. Rows of the weight are independent, so nothing else changes.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tile.reshape([ROWS // 8, OUTER, INNER, COLUMNS]).permute((0, 2, 1, 3)).reshape([ROWS, COLUMNS])


@triton.jit
def _store_transposed(descriptor, accumulator, row, column, RELABEL: tl.constexpr):
    tile = accumulator.to(descriptor.dtype)
    if RELABEL:
        tile = _relabel(tile, 2, 4)
    descriptor.store([row, column], tile.T)


@triton.jit
def combined_matmul_tma_kernel(
    left_ptr,
    weight_ptr,
    aux_ptr,
    scale_ptr,
    bias_ptr,
    output_ptr,
    rows,
    columns,
    depth,
    stride_left,
    stride_weight,
    stride_aux,
    BLOCK_M: tl.constexpr,
    MORE_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DEPTH_FIRST: tl.constexpr,
):
    """output = left (weight + scale * aux) + bias, tiles of BLOCK_M + MORE_M rows, an accumulator each.

    left is (rows, depth); weight and aux lie in memory as (columns, depth), or (depth, columns) if DEPTH_FIRST.
    """
    RELABEL: tl.constexpr = not DEPTH_FIRST
    left = tl.make_tensor_descriptor(left_ptr, [rows, depth], [stride_left, 1], [BLOCK_M, BLOCK_K])
    output = tl.make_tensor_descriptor(output_ptr, [rows, columns], [columns, 1], [BLOCK_M, BLOCK_N])
    if MORE_M > 0:
        more_left = tl.make_tensor_descriptor(left_ptr, [rows, depth], [stride_left, 1], [MORE_M, BLOCK_K])
        more_output = tl.make_tensor_descriptor(output_ptr, [rows, columns], [columns, 1], [MORE_M, BLOCK_N])
        more = tl.zeros((BLOCK_N, MORE_M), tl.float32)
    if DEPTH_FIRST:
        weight = tl.make_tensor_descriptor(weight_ptr, [depth, columns], [stride_weight, 1], [BLOCK_K, BLOCK_N])
        aux = tl.make_tensor_descriptor(aux_ptr, [depth, columns], [stride_aux, 1], [BLOCK_K, BLOCK_N])
    else:
        weight = tl.make_tensor_descriptor(weight_ptr, [columns, depth], [stride_weight, 1], [BLOCK_N, BLOCK_K])
        aux = tl.make_tensor_descriptor(aux_ptr, [columns, depth], [stride_aux, 1], [BLOCK_N, BLOCK_K])
    # A (1, 1) block: a scalar would send the combined tile through shared memory.
    scale = tl.load(scale_ptr + tl.zeros((1, 1), tl.int32)).to(tl.float32)
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M + MORE_M, BLOCK_N, GROUP)
    row = tile_row * (BLOCK_M + MORE_M)
    column = tile_column * BLOCK_N
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, depth, BLOCK_K, warp_specialize=True):
        if DEPTH_FIRST:
            weight_tile = weight.load([k, column]).T
            aux_tile = aux.load([k, column]).T
        else:
            weight_tile = weight.load([column, k])
            aux_tile = aux.load([column, k])
        if RELABEL:
            weight_tile = _relabel(weight_tile, 4, 2)
            aux_tile = _relabel(aux_tile, 4, 2)
        combined = (weight_tile.to(tl.float32) + scale * aux_tile.to(tl.float32)).to(left.dtype)
        accumulator = tl.dot(combined, left.load([row, k]).T, accumulator)
        if MORE_M > 0:
            more = tl.dot(combined, more_left.load([row + BLOCK_M, k]).T, more)
    if bias_ptr is not None:
        # By TMA too: Triton 3.8 offsets the mask of an ordinary load twice in the second of the two consumer groups.
        bias_tile = tl.make_tensor_descriptor(bias_ptr, [columns], [1], [BLOCK_N]).load([column])
        bias = bias_tile.to(tl.float32)[:, None]
        if RELABEL:
            bias = _relabel(bias, 4, 2)
        accumulator += bias
        if MORE_M > 0:
            more += bias
    _store_transposed(output, accumulator, row, column, RELABEL)
    if MORE_M > 0:
        _store_transposed(more_output, more, row + BLOCK_M, column, RELABEL)


@triton.jit
def grad_parameters_tma_kernel(
    grad_ptr,
    x_ptr,
    aux_ptr,
    scale_ptr,
    grad_weight_ptr,
    grad_aux_ptr,
    partial_ptr,
    rows,
    columns,
    depth,
    stride_grad,
    stride_x,
    stride_aux_row,
    stride_aux_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """G = grad^T x, with grad (depth, rows) and x (depth, columns), in float32; `store_gradients` writes it."""
    grad = tl.make_tensor_descriptor(grad_ptr, [depth, rows], [stride_grad, 1], [BLOCK_K, BLOCK_M])
    x = tl.make_tensor_descriptor(x_ptr, [depth, columns], [stride_x, 1], [BLOCK_K, BLOCK_N])
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, depth, BLOCK_K, warp_specialize=True):
        grad_tile = grad.load([k, tile_row * BLOCK_M])
        accumulator = tl.dot(grad_tile.T, x.load([k, tile_column * BLOCK_N]), accumulator)
    store_gradients(
        accumulator,
        tile_row,
        tile_column,
        rows,
        columns,
        aux_ptr,
        scale_ptr,
        grad_weight_ptr,
        grad_aux_ptr,
        partial_ptr,
        stride_aux_row,
        stride_aux_column,
    )


class _Tile(NamedTuple):
    BLOCK_M: int
    MORE_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_stages: int


# 384 rows a tile is what the registers hold; the stages are what shared memory does.
_TILES_BY_WEIGHT_BYTES = {
    4: _Tile(256, 128, 128, 32, 3),
    6: _Tile(256, 128, 128, 32, 3),
    8: _Tile(256, 128, 128, 32, 2),
}
_MIN_ROWS = 512


def takes_combined_matmul(
    target: GPUTarget | None, left: Tensor, weight: Tensor, aux_weight: Tensor, bias: Tensor | None
) -> bool:
    """Whether `combined_matmul` can compute this product here, and is worth it."""
    unit = 0 if weight.stride(0) == 1 else 1
    return (
        _is_hopper(target)
        and left.dtype.itemsize == 2
        and left.shape[0] >= _MIN_ROWS
        and weight.shape[1] * left.itemsize % 16 == 0
        and _by_tma(left, 1)
        and _by_tma(weight, unit)
        and _by_tma(aux_weight, unit)
        and (bias is None or bias.data_ptr() % 16 == 0)
    )


def takes_grad_parameters(target: GPUTarget | None, grad_output: Tensor, x: Tensor) -> bool:
    """Whether `grad_parameters` can compute this product here."""
    return _is_hopper(target) and x.dtype.itemsize == 2 and _by_tma(grad_output, 1) and _by_tma(x, 1)


def _is_hopper(target: GPUTarget | None) -> bool:
    return target is not None and target.backend == "cuda" and target.arch == 90


def _by_tma(matrix: Tensor, unit: int) -> bool:
    """Whether TMA can address a matrix that is contiguous along dimension `unit`."""
    pitch = matrix.stride(1 - unit)
    return (
        matrix.numel() > 0
        and matrix.stride(unit) == 1
        and pitch >= matrix.shape[unit]
        and pitch * matrix.itemsize % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def combined_matmul(
    left: Tensor, weight: Tensor, aux_weight: Tensor, scale: Tensor, bias: Tensor | None, output: Tensor
) -> None:
    """output = left (weight + scale * aux_weight) + bias: left (M, R), weights (R, C), output (M, C) contiguous."""
    rows, depth = left.shape
    columns = weight.shape[1]
    depth_first = weight.stride(0) != 1
    tile = _TILES_BY_WEIGHT_BYTES[weight.itemsize + aux_weight.itemsize]
    tiles = triton.cdiv(rows, tile.BLOCK_M + tile.MORE_M) * triton.cdiv(columns, tile.BLOCK_N)
    _provide_descriptor_memory()
    combined_matmul_tma_kernel[(tiles,)](
        left,
        weight,
        aux_weight,
        scale,
        bias,
        output,
        rows,
        columns,
        depth,
        left.stride(0),
        weight.stride(0 if depth_first else 1),
        aux_weight.stride(0 if depth_first else 1),
        **tile._asdict(),
        GROUP=GROUP,
        DEPTH_FIRST=depth_first,
        num_warps=4,
    )


def grad_parameters(
    grad_output: Tensor,
    x: Tensor,
    aux_weight: Tensor | None,
    scale: Tensor | None,
    grad_weight: Tensor | None,
    grad_aux: Tensor | None,
) -> Tensor | None:
    """Write the gradients asked for; returns partial sums of the scale's, in fixed order, if `aux_weight` is given."""
    depth, rows = grad_output.shape
    columns = x.shape[1]
    block = 128
    tiles = triton.cdiv(rows, block) * triton.cdiv(columns, block)
    partial = None if aux_weight is None else x.new_empty(tiles * block, dtype=torch.float32)
    _provide_descriptor_memory()
    grad_parameters_tma_kernel[(tiles,)](
        grad_output,
        x,
        aux_weight,
        scale,
        grad_weight,
        grad_aux,
        partial,
        rows,
        columns,
        depth,
        grad_output.stride(0),
        x.stride(0),
        *((0, 0) if aux_weight is None else aux_weight.stride()),
        BLOCK_M=block,
        BLOCK_N=block,
        BLOCK_K=64,
        GROUP=GROUP,
        num_warps=4,
        num_stages=4,
    )
    return partial


def _provide_descriptor_memory() -> None:
    """Give Triton, for this thread, an allocator of the memory on the current device that descriptors lie in."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
