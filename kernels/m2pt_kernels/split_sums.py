"""Finish gradients whose reduction over the tokens was split: add the splits in order, in float32, without atomics."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .combined import model_stride
from .gemm_pointers import packed_index, unpack
from .launches import launch
from .products import GradParameters
from .quantization import GROUP_SIZE
from .tiles import ceil_div, offset_of
from .versions import OPTIONS

GROUP_SIZE = tl.constexpr(GROUP_SIZE)


class SumsTile(NamedTuple):
    """A row's columns are added BLOCK at a time."""

    BLOCK: int
    num_warps: int


_LARGEST_BLOCK = 1024
"""Eight columns per thread: two loads of 16 bytes."""


@triton.jit
def split_sums_kernel(
    splits_ptr,
    aux_ptr,
    cross_modal_scale_ptr,
    aux_weight_scale_ptr,
    grad_weight_ptr,
    grad_aux_ptr,
    partial_ptr,
    rows,
    columns,
    stride_aux_row,
    stride_aux_column,
    stride_aux_model,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    MODELS: tl.constexpr,
):
    """Store the same as `grad_parameters_kernel` for a row of G, the sum of splits (SPLITS, rows, columns).

    partial has a number for each row and block of columns.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = column < columns
    offsets = row * columns + column
    total = tl.load(splits_ptr + offsets, mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(splits_ptr + offset_of(split, offset_of(rows, columns)) + offsets, mask, other=0.0)
    if partial_ptr is not None:
        PACKED: tl.constexpr = aux_ptr.dtype.element_ty == tl.uint8
        aux_column = packed_index(column) if PACKED else column
        aux_ptrs = aux_ptr + row * stride_aux_row + aux_column * stride_aux_column
        for model in tl.static_range(MODELS):
            aux = tl.load(aux_ptrs + offset_of(model, stride_aux_model), mask, other=0.0)
            of_model = offset_of(model, rows) + row
            if PACKED:
                aux = unpack(aux, column)
                groups = of_model * (columns // GROUP_SIZE) + column // GROUP_SIZE
                aux *= tl.load(aux_weight_scale_ptr + groups, mask, other=0.0)
            # Without `where` the product would be fused with the first step of the sum, and lanes differ by a rounding.
            sums = tl.sum(tl.where(mask, total * aux.to(tl.float32), 0.0))
            if aux_weight_scale_ptr is not None and not PACKED:
                sums *= tl.load(aux_weight_scale_ptr + of_model)
            tl.store(partial_ptr + of_model * tl.num_programs(1) + tl.program_id(1), sums)
    if grad_aux_ptr is not None:
        for model in tl.static_range(MODELS):
            scale = tl.load(cross_modal_scale_ptr + model).to(tl.float32)
            grad_aux = (scale * total).to(grad_aux_ptr.dtype.element_ty)
            tl.store(grad_aux_ptr + offset_of(model, offset_of(rows, columns)) + offsets, grad_aux, mask)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + offsets, total.to(grad_weight_ptr.dtype.element_ty), mask)


def grad_parameters(
    splits: Tensor, product: GradParameters, grad_weight: Tensor | None, grad_aux: Tensor | None
) -> Tensor | None:
    """Write those weight gradients that are not None; return the scale's, if wanted, as partial sums (n, ...).

    splits are the parts of G, (splits, N, K) in float32.
    """
    _, _, aux_weight, cross_modal_scale, *_, aux_weight_scale = product
    (rows, columns), models = product.shape, product.models
    tile = SumsTile(min(triton.next_power_of_2(columns), _LARGEST_BLOCK), num_warps=4)
    blocks = ceil_div(columns, tile.BLOCK)
    partial = None if aux_weight is None else splits.new_empty(models, rows * blocks)
    aux_strides = (0, 0, 0) if aux_weight is None else (*aux_weight.stride()[-2:], model_stride(aux_weight))
    launch(
        split_sums_kernel,
        (rows, blocks),
        (splits, aux_weight, cross_modal_scale, aux_weight_scale, grad_weight, grad_aux, partial),
        (rows, columns, *aux_strides),
        tile,
        SPLITS=len(splits),
        MODELS=models,
        **OPTIONS,
    )
    return partial
