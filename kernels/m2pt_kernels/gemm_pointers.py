"""Pointer GEMMs for any shape and stride, float32, float16 and bfloat16, and a W_aux that may be quantised."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combined import CombinedWeight, model_stride
from .devices import active_target, input_precision
from .launches import launch
from .products import GradParameters
from .quantization import GROUP_SIZE
from .tiles import GROUP, GradTile, count_tiles, offset_of, share_of, tile_of_program
from .versions import OPTIONS

GROUP_SIZE = tl.constexpr(GROUP_SIZE)


@triton.jit
def _indices_inside(tile, size, BLOCK: tl.constexpr):
    """Return the int64 indices of a tile. Those past `size` repeat earlier ones, so no mask is needed."""
    start = tile * BLOCK
    return start.to(tl.int64) + tl.arange(0, BLOCK) % tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def packed_index(column):
    """Return the byte offset of a column's int4 entry in its row."""
    return column // GROUP_SIZE * (GROUP_SIZE // 2) + column % (GROUP_SIZE // 2)


@triton.jit
def unpack(data, column):
    """Return the int4 entries of columns from the bytes read for them."""
    shift = (column // (GROUP_SIZE // 2) % 2 * 4).to(tl.uint8)
    return ((data >> shift) & 15).to(tl.float32) - 8


@triton.jit
def combined_matmul_kernel(
    left_ptr,
    weight_ptr,
    aux_ptr,
    cross_modal_scale_ptr,
    aux_weight_scale_ptr,
    bias_ptr,
    output_ptr,
    rows,
    columns,
    depth,
    stride_left_row,
    stride_left_depth,
    stride_weight_depth,
    stride_weight_column,
    stride_aux_depth,
    stride_aux_column,
    stride_aux_model,
    stride_aux_weight_scale,
    stride_aux_weight_scale_model,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMBINE_IN_WARPS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    SCALED_BY_DEPTH: tl.constexpr,
    MODELS: tl.constexpr,
):
    """Store left (weight + sum of scale * aux) + bias: left (rows, depth), weight and each aux (depth, columns).

    A quantised aux has a scale for each index of the depth if SCALED_BY_DEPTH, otherwise for each column; int4 also has
    one for each group along the other dimension, and no tile touches two groups.
    """
    # Masking rows and columns in the k-loop would cost registers that the largest tiles do not have.
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = _indices_inside(tile_row, rows, BLOCK_M)
    column = _indices_inside(tile_column, columns, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left_ptrs = left_ptr + row[:, None] * stride_left_row + k[None, :] * stride_left_depth
    weight_ptrs = weight_ptr + k[:, None] * stride_weight_depth + column[None, :] * stride_weight_column
    PACKED: tl.constexpr = aux_ptr.dtype.element_ty == tl.uint8
    aux_column = packed_index(column) if PACKED and SCALED_BY_DEPTH else column
    aux_ptrs = aux_ptr + k[:, None] * stride_aux_depth + aux_column[None, :] * stride_aux_column
    step = tl.full((), BLOCK_K, tl.int64)
    if aux_weight_scale_ptr is not None:
        if SCALED_BY_DEPTH:
            aux_weight_scale_ptrs = aux_weight_scale_ptr + k[:, None] * stride_aux_weight_scale
            if PACKED:
                aux_weight_scale_ptrs += tile_column * BLOCK_N // GROUP_SIZE
        else:
            aux_weight_scale_ptrs = aux_weight_scale_ptr + column[None, :] * stride_aux_weight_scale
    scales = tl.tuple([])
    for model in tl.static_range(MODELS):
        if COMBINE_IN_WARPS:
            scale = tl.load(cross_modal_scale_ptr + model + tl.zeros((1, 1), tl.int32)).to(tl.float32)
        else:
            scale = tl.load(cross_modal_scale_ptr + model).to(tl.float32)
        if aux_weight_scale_ptr is not None and not (SCALED_BY_DEPTH or PACKED):
            scale *= tl.load(aux_weight_scale_ptrs + offset_of(model, stride_aux_weight_scale_model))
        scales += (scale,)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K):
        if PACKED and not SCALED_BY_DEPTH:
            aux_depth = packed_index(start + k)
            aux_ptrs = aux_ptr + aux_depth[:, None] * stride_aux_depth + column[None, :] * stride_aux_column
        if EVEN_K:
            left, weight = tl.load(left_ptrs), tl.load(weight_ptrs)
        else:
            left = tl.load(left_ptrs, mask=k[None, :] < depth - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=k[:, None] < depth - start, other=0.0)
        combined = weight.to(tl.float32)
        for model in tl.static_range(MODELS):
            model_ptrs = aux_ptrs + offset_of(model, stride_aux_model)
            aux = tl.load(model_ptrs) if EVEN_K else tl.load(model_ptrs, mask=k[:, None] < depth - start, other=0.0)
            if PACKED:
                aux = unpack(aux, column[None, :] if SCALED_BY_DEPTH else (start + k)[:, None])
            step_scale = scales[model]
            if aux_weight_scale_ptr is not None and (PACKED or SCALED_BY_DEPTH):
                model_scale_ptrs = aux_weight_scale_ptrs + offset_of(model, stride_aux_weight_scale_model)
                if SCALED_BY_DEPTH:
                    step_scale *= tl.load(model_scale_ptrs, mask=k[:, None] < depth - start, other=0.0)
                else:
                    step_scale *= tl.load(model_scale_ptrs + start // GROUP_SIZE)
            combined += step_scale * aux.to(tl.float32)
        accumulator = tl.dot(left, combined.to(left.dtype), accumulator, input_precision=INPUT_PRECISION)
        left_ptrs += step * stride_left_depth
        weight_ptrs += step * stride_weight_depth
        aux_ptrs += step * stride_aux_depth
        if aux_weight_scale_ptr is not None and SCALED_BY_DEPTH:
            aux_weight_scale_ptrs += step * stride_aux_weight_scale
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + column[None, :]).to(tl.float32)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    tl.store(
        output_ptr + row[:, None] * columns + column[None, :],
        accumulator.to(output_ptr.dtype.element_ty),
        mask=(row[:, None] < rows) & (column[None, :] < columns),
    )


@triton.jit
def grad_parameters_kernel(
    grad_ptr,
    x_ptr,
    aux_ptr,
    cross_modal_scale_ptr,
    aux_weight_scale_ptr,
    grad_weight_ptr,
    grad_aux_ptr,
    partial_ptr,
    rows,
    columns,
    depth,
    share,
    stride_grad_depth,
    stride_grad_row,
    stride_x_depth,
    stride_x_column,
    stride_aux_row,
    stride_aux_column,
    stride_aux_model,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MODELS: tl.constexpr,
):
    """Compute G = grad^T x from grad (depth, rows) and x (depth, columns), in float32.

    Store each result whose pointer is not None: G in grad_weight, and for each auxiliary model scale * G in grad_aux,
    and <G, aux> in partial, one number per row of a tile. A quantised aux has a scale per row, int4 per group.
    If share is not None, the depth is divided into shares of that size, one per `program_id(1)`, each with its own G in
    grad_weight.
    """
    if share is not None:
        begin = offset_of(tl.program_id(1), share)
        depth = tl.minimum(depth - begin, share)
        grad_ptr += offset_of(begin, stride_grad_depth)
        x_ptr += offset_of(begin, stride_x_depth)
        grad_weight_ptr += offset_of(tl.program_id(1), offset_of(rows, columns))
    tile_row, tile_column = tile_of_program(rows, columns, BLOCK_M, BLOCK_N, GROUP)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    row_mask = row[:, None] < rows
    column_mask = column[None, :] < columns
    grad_ptrs = grad_ptr + row[:, None] * stride_grad_row + k[None, :] * stride_grad_depth
    x_ptrs = x_ptr + k[:, None] * stride_x_depth + column[None, :] * stride_x_column
    step = tl.full((), BLOCK_K, tl.int64)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, depth, BLOCK_K):
        if EVEN_K:
            grad_mask, x_mask = row_mask, column_mask
        else:
            grad_mask = row_mask & (k[None, :] < depth - start)
            x_mask = column_mask & (k[:, None] < depth - start)
        grad = tl.load(grad_ptrs, mask=grad_mask, other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        accumulator = tl.dot(grad, x, accumulator, input_precision=INPUT_PRECISION)
        grad_ptrs += step * stride_grad_depth
        x_ptrs += step * stride_x_depth
    mask = row_mask & column_mask
    offsets = row[:, None] * columns + column[None, :]
    if partial_ptr is not None:
        PACKED: tl.constexpr = aux_ptr.dtype.element_ty == tl.uint8
        aux_column = packed_index(column) if PACKED else column
        aux_ptrs = aux_ptr + row[:, None] * stride_aux_row + aux_column[None, :] * stride_aux_column
        for model in tl.range(MODELS, num_stages=1):
            aux = tl.load(aux_ptrs + offset_of(model, stride_aux_model), mask, other=0.0)
            if PACKED:
                groups = offset_of(offset_of(model, rows) + row[:, None], columns // GROUP_SIZE)
                aux_weight_scale = tl.load(
                    aux_weight_scale_ptr + groups + column[None, :] // GROUP_SIZE, mask, other=0.0
                )
                aux = unpack(aux, column[None, :]) * aux_weight_scale
            # Past the matrix the accumulator is infinity times zero where an operand is infinite.
            sums = tl.sum(tl.where(mask, accumulator * aux.to(tl.float32), 0.0), 1)
            if aux_weight_scale_ptr is not None and not PACKED:
                sums *= tl.load(aux_weight_scale_ptr + (offset_of(model, rows) + row), row < rows, other=0.0)
            partial = offset_of(offset_of(model, tl.num_programs(0)) + tl.program_id(0), BLOCK_M)
            tl.store(partial_ptr + partial + tl.arange(0, BLOCK_M), sums)
    if grad_aux_ptr is not None:
        for model in tl.range(MODELS, num_stages=1):
            scale = tl.load(cross_modal_scale_ptr + model).to(tl.float32)
            grad_aux = (scale * accumulator).to(grad_aux_ptr.dtype.element_ty)
            tl.store(grad_aux_ptr + offset_of(model, offset_of(rows, columns)) + offsets, grad_aux, mask=mask)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + offsets, accumulator.to(grad_weight_ptr.dtype.element_ty), mask=mask)


class CombinedTile(NamedTuple):
    """The output tile is BLOCK_M x BLOCK_N, a k-step's depth BLOCK_K.

    COMBINE_IN_WARPS: every warp combines its own operand in registers, even if other warps need the same; otherwise the
    block combines a tile once and passes it through shared memory, which costs a barrier per k-step.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    COMBINE_IN_WARPS: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Its rows and columns, and a k-step's depth."""
        return self.BLOCK_M, self.BLOCK_N, self.BLOCK_K


def combined_matmul(
    tile: CombinedTile, left: Tensor, combined: CombinedWeight, bias: Tensor | None, output: Tensor
) -> None:
    """Write a `CombinedMatmul` to a contiguous output."""
    (rows, depth), columns = left.shape, output.shape[1]
    weight, aux_weight, _, aux_weight_scale, transposed = combined
    strides = *left.stride(), *combined.strides(weight), *combined.strides(aux_weight), model_stride(aux_weight)
    scale_strides = (
        (0, 0) if aux_weight_scale is None else (aux_weight_scale.stride(-2), model_stride(aux_weight_scale))
    )
    launch(
        combined_matmul_kernel,
        (count_tiles(tile, rows, columns), 1),
        (left, *combined[:4], bias, output),
        (rows, columns, depth, *strides, *scale_strides),
        tile,
        GROUP=GROUP,
        EVEN_K=depth % tile.BLOCK_K == 0,
        INPUT_PRECISION=input_precision(left.dtype, active_target()),
        SCALED_BY_DEPTH=not transposed and aux_weight_scale is not None,
        MODELS=combined.models,
        **OPTIONS,
    )


def grad_parameters(
    tile: GradTile, product: GradParameters, grad_weight: Tensor | None, grad_aux: Tensor | None, splits: int = 1
) -> Tensor | None:
    """Write those weight gradients that are not None; return the scale's, if wanted, as partial sums (n, ...).

    With several splits only grad_weight is written: (splits, N, K) in float32, one for each share of the tokens.
    """
    grad_output, x, aux_weight, cross_modal_scale, *_, aux_weight_scale = product
    (rows, columns), depth, models = product.shape, len(x), product.models
    tiles = count_tiles(tile, rows, columns)
    partial = None if aux_weight is None else x.new_empty(models, tiles * tile.BLOCK_M, dtype=torch.float32)
    aux_strides = (0, 0, 0) if aux_weight is None else (*aux_weight.stride()[-2:], model_stride(aux_weight))
    launch(
        grad_parameters_kernel,
        (tiles, splits),
        (grad_output, x, aux_weight, cross_modal_scale, aux_weight_scale, grad_weight, grad_aux, partial),
        (rows, columns, depth, share_of(depth, splits, tile.BLOCK_K), *grad_output.stride(), *x.stride(), *aux_strides),
        tile,
        GROUP=GROUP,
        EVEN_K=depth % tile.BLOCK_K == 0,
        INPUT_PRECISION=input_precision(x.dtype, active_target()),
        MODELS=models,
        **OPTIONS,
    )
    return partial
