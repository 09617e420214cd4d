"""Plain GEMMs, `y = x w^T`, written and compiled like the fused ones: what the fusion is compared with offline."""

import triton
import triton.language as tl

from m2pt_kernels.tiles import tile_of_program


@triton.jit
def plain_matmul_kernel(
    x_ptr,
    weight_ptr,
    output_ptr,
    rows,
    columns,
    depth,
    stride_x,
    stride_weight,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """By pointers: x (rows, depth), weight (columns, depth)."""
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    row_mask = row[:, None] < rows
    column_mask = column[None, :] < columns
    x_ptrs = x_ptr + row[:, None] * stride_x + k[None, :]
    weight_ptrs = weight_ptr + k[:, None] + column[None, :] * stride_weight
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, depth, BLOCK_K):
        x = tl.load(x_ptrs, mask=row_mask, other=0.0)
        accumulator = tl.dot(x, tl.load(weight_ptrs, mask=column_mask, other=0.0), accumulator)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    output_ptrs = output_ptr + row[:, None] * columns + column[None, :]
    tl.store(output_ptrs, accumulator.to(output_ptr.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit
def plain_matmul_tma_kernel(
    x_ptr,
    weight_ptr,
    output_ptr,
    rows,
    columns,
    depth,
    stride_x,
    stride_weight,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Warp-specialised, by TMA, both operands in shared memory."""
    x = tl.make_tensor_descriptor(x_ptr, [rows, depth], [stride_x, 1], [BLOCK_M, BLOCK_K])
    weight = tl.make_tensor_descriptor(weight_ptr, [columns, depth], [stride_weight, 1], [BLOCK_N, BLOCK_K])
    output = tl.make_tensor_descriptor(output_ptr, [rows, columns], [columns, 1], [BLOCK_M, BLOCK_N])
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, depth, BLOCK_K, warp_specialize=True):
        weight_tile = weight.load([tile_column * BLOCK_N, k])
        accumulator = tl.dot(x.load([tile_row * BLOCK_M, k]), weight_tile.T, accumulator)
    output.store([tile_row * BLOCK_M, tile_column * BLOCK_N], accumulator.to(output_ptr.dtype.element_ty))
